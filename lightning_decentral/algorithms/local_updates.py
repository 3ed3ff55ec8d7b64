"""Local SGD and its relatives: workers make several steps by themselves, and average only now and then."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.optim import Optimizer

from lightning_decentral.averaging.messages import same_types
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector, Vector
from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, LocalStep, Mixing, Start, Ticket
from lightning_decentral.worker import Worker

OuterOptimizer = Callable[[Iterable[torch.nn.Parameter]], Optimizer]
"""Makes an optimizer of parameters, as ``partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)``."""


@dataclass(frozen=True)
class AbstractLocalUpdates(AbstractAlgorithm):
    r"""Rounds of local steps: ``every`` steps of each worker's own optimizer, then one average.

    The model is cut into ``fragments`` of nearly equal size, which have their rounds one after the other: each is
    averaged every ``every`` steps, at an offset of its own. For a fragment whose round ends after step t::

        difference = global - (1/n) sum_i x_i(t)                      # what the workers have moved, on average
        global     <- outer optimizer's step with `difference` as the gradient
        x_i        <- local_share x_i(t + delay) + (1 - local_share) global     # after `delay` more local steps

    Without an outer optimizer ``global`` is the mean itself. The mean is computed beside the next ``delay`` steps.

    Subclasses are frozen dataclasses that give these names a value.
    """

    @property
    @abstractmethod
    def rounds(self) -> Rounds:
        """When what is averaged."""

    @property
    @abstractmethod
    def outer_optimizer(self) -> OuterOptimizer | None:
        """What applies the difference to the global model; none: the mean is the global model."""

    def __post_init__(self) -> None:
        self.rounds.check(type(self).__name__)

    def resolved(self, world_size: int) -> Self:
        return self

    def period(self, world_size: int) -> int:
        return self.rounds.every

    def mixing(self, world_size: int) -> Mixing:
        rounds = self.rounds
        left = rounds.kept_share
        needed = math.ceil(math.log(1e-3) / math.log(left)) if left else 1
        return Mixing(1.0 - left ** (1.0 / rounds.every), needed * rounds.every)

    def init(self, worker: Worker) -> None:
        rounds = self.rounds
        if rounds.fragments > 1:
            worker.x.slices(rounds.fragments)  # refuses more fragments than parameters
        if self.outer_optimizer is not None:
            worker.state["global"] = worker.x.zeros_like().copy_(worker.x)
            worker.state["outer"] = [[] for _ in range(rounds.fragments)]
        worker.state["sent"] = {}  # by fragment: what is averaged beside the steps, and since which step
        worker.state["tickets"] = {}

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        rounds, now = self.rounds, worker.step + 1
        for fragment in rounds.begun_after(now):
            await self._begin(worker, fragment)
        for fragment in rounds.due_after(now, worker.state["sent"]):
            await self._end(worker, fragment)

    async def rest(self, worker: Worker) -> None:
        for ticket in worker.state["tickets"].values():
            await ticket
        worker.state["tickets"].clear()

    async def _begin(self, worker: Worker, fragment: int) -> None:
        """Send what the mean is of, or for a mean that is needed at once, make it in the parameters' own memory."""
        state = worker.state
        x = self._fragment(worker.x, fragment)
        before = self._fragment(state["global"], fragment) if "global" in state else None
        in_place = self.rounds.delay == 0 and (before is None or same_types(x, before))
        value = x if in_place else (x.clone() if before is None else before.clone())
        if before is not None and in_place:
            value.mul_(-1.0).add_(before)
        elif before is not None:
            value.add_(x, alpha=-1.0)
        if in_place:
            await AllReduce(value)
            self._merge(worker, fragment, value)
            return
        ticket: Ticket[Any] = await Start(AllReduce(value))
        state["sent"][fragment] = {"value": value, "step": worker.step + 1}
        state["tickets"][fragment] = ticket

    async def _end(self, worker: Worker, fragment: int) -> None:
        ticket = worker.state["tickets"].pop(fragment, None)
        if ticket is not None:
            await ticket
        self._merge(worker, fragment, worker.state["sent"].pop(fragment)["value"])

    def _merge(self, worker: Worker, fragment: int, mean: AbstractVector) -> None:
        """Let the fragment become the new global one, or go a part of the way to it.

        Args:
            worker: whose.
            fragment: its number.
            mean: of all workers' fragments, or of their differences to the global one; may be the fragment itself.
        """
        x, state = self._fragment(worker.x, fragment), worker.state
        if self.outer_optimizer is not None:
            merged = self._fragment(state["global"], fragment)
            outer_step(self.outer_optimizer, state["outer"], fragment, merged, mean)
        else:
            merged = mean
        share = self.rounds.kept_share
        if share:
            x.mix_(x, share, [(merged if same_types(x, merged) else x.clone().copy_(merged), 1.0 - share)])
        elif merged is not mean or self.rounds.delay:
            x.copy_(merged)

    def _fragment(self, vector: AbstractVector, number: int) -> AbstractVector:
        return vector if self.rounds.fragments == 1 else vector.slices(self.rounds.fragments)[number]


@dataclass(frozen=True, slots=True)
class Rounds:
    """When which fragment of a model is averaged; steps are counted from 1, and averages follow them.

    Attributes:
        every: steps of a round.
        fragments: how many, which have their rounds one after the other.
        delay: steps for which the average may be under way.
        local_share: weight of what a worker has then, in what it goes on with.
        warm_up_steps: steps after each of which everything is averaged, in the beginning.
    """

    every: int
    fragments: int = 1
    delay: int = 0
    local_share: float = 0.0
    warm_up_steps: int = 0

    @property
    def kept_share(self) -> float:
        """The local share, of which there is none if everybody waits for the average."""
        return self.local_share if self.delay else 0.0

    def check(self, method: str) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigurationError: with the method's name.
        """
        if self.every < 1:
            raise ConfigurationError(f"{method}(every={self.every}): needs at least 1 step. Use 1 for each step.")
        if not 1 <= self.fragments <= self.every:
            raise ConfigurationError(
                f"{method}(fragments={self.fragments}): needs 1 to every={self.every}, because at most one fragment "
                "begins its average after a step. Use fewer fragments or longer rounds."
            )
        if not 0 <= self.delay < max(self.every // self.fragments, 1):
            raise ConfigurationError(
                f"{method}(delay={self.delay}): needs 0 or more, and less than every / fragments = "
                f"{self.every / self.fragments:g} steps: a fragment's average ends before the next one's begins. Use a "
                "shorter delay, longer rounds or fewer fragments."
            )
        if not 0.0 <= self.local_share < 1.0:
            raise ConfigurationError(
                f"{method}(local_share={self.local_share}): needs a share in [0, 1). Use 0 to go on with the average "
                "alone."
            )
        if self.warm_up_steps < 0:
            raise ConfigurationError(f"{method}(warm_up_steps={self.warm_up_steps}): needs 0 or more. Use 0 for none.")
        if self.warm_up_steps and self.delay:
            raise ConfigurationError(
                f"{method}(warm_up_steps={self.warm_up_steps}) needs delay=0, got {self.delay}: in these steps all "
                "wait for the average. Leave one of them out."
            )

    def begun_after(self, step: int) -> list[int]:
        """Whose average begins after so many steps."""
        if step <= self.warm_up_steps:
            return list(range(self.fragments))
        return [
            fragment
            for fragment in range(self.fragments)
            if (step - self.warm_up_steps - (fragment + 1) * self.every // self.fragments) % self.every == 0
        ]

    def due_after(self, step: int, sent: dict[int, Any]) -> list[int]:
        """Whose average is merged after so many steps."""
        return [fragment for fragment, each in sent.items() if step >= each["step"] + self.delay]


def outer_step(
    make: OuterOptimizer, states: list[Any], fragment: int, merged: AbstractVector, difference: AbstractVector
) -> None:
    """Apply a difference to the global fragment; all workers compute the same."""
    if not (isinstance(merged, Vector) and isinstance(difference, Vector)):
        return  # the planner's have no values
    with torch.no_grad():
        parameters = [torch.nn.Parameter(buffer.detach(), requires_grad=True) for buffer in merged.buffers]
        for parameter, gradient in zip(parameters, difference.buffers, strict=True):
            parameter.grad = gradient
        optimizer = make(parameters)
        for parameter, state in zip(parameters, states[fragment], strict=False):
            optimizer.state[parameter] = dict(state)
        optimizer.step()
        states[fragment] = [dict(optimizer.state[parameter]) for parameter in parameters]
