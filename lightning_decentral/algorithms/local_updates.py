"""Local SGD and its relatives: workers make several steps by themselves, and average only now and then."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_decentral.algorithms.base import as_written
from lightning_decentral.averaging import CompressedMean, MeanInParts, goes_in_parts
from lightning_decentral.averaging.messages import (
    compressed,
    require_compressor,
    require_contraction,
    require_fixed_size,
    same_types,
)
from lightning_decentral.compression import AbstractCompressor
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector, Vector, mean_over
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AbstractErrorFeedbackAlgorithm,
    AbstractOpenRounds,
    AllReduce,
    Gradient,
    LocalStep,
    Mixing,
    Start,
    Ticket,
)
from lightning_decentral.worker import Worker

OuterOptimizer = Callable[[Iterable[torch.nn.Parameter]], Optimizer]
"""Makes an optimizer of parameters, as ``partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)``."""

InnerState = Literal["kept", "reset", "averaged"]
"""What becomes of what a worker's own optimizer remembers, its momenta, when the models have been averaged."""

COUNTS = "counts"
"""In a worker's state: what it counts in an average, if not as much as any."""


@dataclass(frozen=True, repr=False)
class AbstractLocalUpdates(AbstractErrorFeedbackAlgorithm):
    r"""Rounds of local steps: ``every`` steps of each worker's own optimizer, then one average.

    The model is cut into ``fragments`` of nearly equal size, which have their rounds one after the other: each is
    averaged every ``every`` steps, at an offset of its own. For a fragment whose round ends after step t::

        difference = global - (1/n) sum_i x_i(t)                      # what the workers have moved, on average
        global     <- outer optimizer's step with `difference` as the gradient
        x_i        <- local_share x_i(t + delay) + (1 - local_share) global     # after `delay` more local steps

    Without an outer optimizer ``global`` is the mean itself. The mean is computed beside the next ``delay`` steps.

    With a compressor C the workers send their differences, and remember what the messages leave out::

        e_i        <- error_feedback (1 - local_share) e_i + global - x_i(t)
        difference = (1/n) sum_j C(e_j)
        e_i        <- e_i - C(e_i)

    and without an outer optimizer ``global`` moves by the difference. What a worker keeps of its own model it sends
    again in the next round, with what is in its error: hence the factor. Messages of a dense compressor travel in parts
    if there are more than two workers: each worker averages one, and sends its mean compressed once more
    (`averaging.MeanInParts`).

    What the workers' own optimizers remember, they keep from round to round; or forget it after each average, or
    average it, too: momenta and second moments, and no counts. Who has not remembered as much as the others, because it
    made no update, is refused. The planner knows no optimizer, and leaves out what is sent for it.

    Subclasses are frozen dataclasses, without a repr of their own, that give the names below a value.

    Args:
        inner_state: ``"kept"``, ``"reset"`` or ``"averaged"``; the last two need one fragment and no delay.
    """

    inner_state: InnerState = field(default="kept", kw_only=True, repr=False)

    @property
    @abstractmethod
    def rounds(self) -> Rounds:
        """What is averaged when."""

    @property
    @abstractmethod
    def outer_optimizer(self) -> OuterOptimizer | None:
        """What applies the difference to the global model; none: the mean is the global model."""

    @property
    def has_outer_gradient(self) -> bool:
        return self.outer_optimizer is not None

    @property
    def exchange(self) -> Differences:
        """How differences travel: as they are."""
        return Differences()

    def __post_init__(self) -> None:
        self.rounds.check(type(self).__name__)
        self.exchange.check(type(self).__name__)
        name, rounds = type(self).__name__, self.rounds
        if self.inner_state not in get_args(InnerState):
            raise ConfigurationError(
                f"{name}(inner_state={self.inner_state!r}): needs 'kept', 'reset' or 'averaged'. Use 'kept' to let "
                "each worker's optimizer remember its own steps."
            )
        if self.inner_state != "kept" and (rounds.fragments > 1 or rounds.delay):
            raise ConfigurationError(
                f"{name}(inner_state={self.inner_state!r}) got fragments={rounds.fragments} and delay={rounds.delay}; "
                "it needs one fragment and no delay, so that whole models are averaged between two steps. Use 'kept'."
            )

    def __repr__(self) -> str:
        """Write it as a program does; how inner state is treated only where it is not kept."""
        return as_written(self)

    def resolved(self, world_size: int) -> Self:
        return self

    def opened(self) -> AbstractAsynchronousAlgorithm:
        rounds = self.rounds
        if rounds.fragments > 1 or rounds.delay or self.exchange.compressor is not None:
            raise ConfigurationError(
                f"OpenStrategy got {self!r}, of workers that come and go; it needs whole models that all wait for: one "
                "fragment, no delay, and no compressor. Use DiLoCo(every=...) or LocalSGD(every=...), or a strategy "
                "whose workers stay."
            )
        return OpenRounds(self)

    def period(self, world_size: int) -> int:
        return self.rounds.last_every

    def mixing(self, world_size: int) -> Mixing:
        rounds = self.rounds
        left = rounds.kept_share
        needed = math.ceil(math.log(1e-3) / math.log(left)) if left else 1
        return Mixing(1.0 - left ** (1.0 / rounds.last_every), needed * rounds.last_every)

    def for_buffers(self) -> AbstractAlgorithm:
        """Return the mean over all workers after each round of the first fragment, which is waited for."""
        return MeansOfRounds(Rounds(self.rounds.every, warm_up_steps=self.rounds.warm_up_steps))

    def init(self, worker: Worker) -> None:
        rounds = self.rounds
        self._fragment(worker, worker.x, 0)  # refuses more fragments than there can be
        if self._outer_optimizer is not None:
            worker.state["global"] = worker.x.zeros_like().copy_(worker.x)
            worker.state["outer"] = [[] for _ in range(rounds.fragments)]
        exchange = self.exchange
        if exchange.compressor is not None and exchange.error_feedback:
            for fragment in range(rounds.fragments):
                name = type(self).__name__
                require_contraction(name, exchange.compressor, self._fragment(worker, worker.state["global"], fragment))
            worker.state["error"] = worker.x.zeros_like()
        worker.state["sent"] = {}  # by fragment: what is averaged beside the steps, and since which step
        worker.state["tickets"] = {}

    def regrouped(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what all workers have in common, and the mean of what their messages left out."""
        state = dict(states[0])
        if "error" in state:
            state["error"] = mean_over([each["error"] for each in states])
        return state

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        rounds, now = self.rounds, worker.step + 1
        for fragment in rounds.due_after(now, worker.state["sent"]):
            await self._end(worker, fragment)
        await self.average(worker, rounds.begun_after(now))

    async def average(self, worker: Worker, fragments: Sequence[int] = (0,)) -> None:
        """Begin to average some fragments; by default the whole of a model that has one, which all wait for."""
        for fragment in fragments:
            await self._begin(worker, fragment)
        if fragments and self.inner_state != "kept":
            await self._renew_memory(worker)

    async def _renew_memory(self, worker: Worker) -> None:
        """Let the worker's optimizer forget its steps, or remember what those of all do on average."""
        if worker.memory is None:
            return
        if self.inner_state == "reset":
            worker.memory.forget()
            return
        values = worker.memory.values()
        count = 0 if values is None else values.num_bytes
        mean = worker.x.new_numbers(count)
        await AllReduce(mean)
        if abs(mean.numbers()[0] - count) > 1e-6 * count:  # a sum and a division in double precision
            raise ConfigurationError(
                f"{type(self).__name__}(inner_state='averaged') got {count} bytes that the optimizer of worker "
                f"{worker.rank} remembers after step {worker.step + 1}, and another number from others; it needs the "
                "same everywhere. Let all workers make the same updates, or use 'kept' or 'reset'."
            )
        if values is not None:
            await AllReduce(values)
            worker.memory.replace(values)

    async def rest(self, worker: Worker) -> None:
        for ticket in worker.state["tickets"].values():
            await ticket
        worker.state["tickets"].clear()

    async def _begin(self, worker: Worker, fragment: int) -> None:
        """Send what the mean is of, or for a mean that is needed at once, make it in the parameters' own memory."""
        state = worker.state
        x = self._fragment(worker, worker.x, fragment)
        before = self._fragment(worker, state["global"], fragment) if "global" in state else None
        if self.exchange.compressor is not None:
            await self._begin_compressed(worker, fragment, self.exchange.compressor)
            return
        waits, keeps = self.rounds.delay == 0, self.rounds.kept_share > 0.0
        in_place = waits and not keeps and (before is None or same_types(x, before))
        value = x if in_place else (x.clone() if before is None else before.clone())
        if before is not None and in_place:
            value.mul_(-1.0).add_(before)
        elif before is not None:
            value.add_(x, alpha=-1.0)
        if waits:
            await AllReduce(value, weight=state.get(COUNTS, 1.0))
            self._merge(worker, fragment, value)
            return
        ticket: Ticket[Any] = await Start(AllReduce(value))
        state["sent"][fragment] = {"value": value, "step": worker.step + 1}
        state["tickets"][fragment] = ticket

    async def _begin_compressed(self, worker: Worker, fragment: int, compressor: AbstractCompressor) -> None:
        """Send what a message says of the difference and of what earlier ones left out."""
        state, exchange = worker.state, self.exchange
        difference = (
            self._fragment(worker, state["global"], fragment)
            .clone()
            .add_(self._fragment(worker, worker.x, fragment), -1.0)
        )
        error = self._fragment(worker, state["error"], fragment) if "error" in state else None
        if error is not None:
            difference.add_(error, alpha=exchange.error_feedback * (1.0 - self.rounds.kept_share))
        if goes_in_parts(compressor, difference, worker.world_size):
            averaging = MeanInParts(worker, compressor, difference, error).mean()
        else:
            message = compressed(compressor, difference, worker)
            scratch = difference.zeros_like()
            if error is not None:
                message.decode_(message.payloads, scratch)
                error.copy_(difference).add_(scratch, alpha=-1.0)
            averaging = _mean_of_messages(CompressedMean(worker, message), difference.mul_(0.0), scratch)
        if self.rounds.delay == 0:
            self._merge(worker, fragment, await averaging)
            return
        state["sent"][fragment] = {"value": difference, "step": worker.step + 1}
        state["tickets"][fragment] = await Start(averaging)

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
        x, state = self._fragment(worker, worker.x, fragment), worker.state
        if self._outer_optimizer is not None:
            merged = self._fragment(worker, state["global"], fragment)
            outer_step(self._outer_optimizer, state["outer"], fragment, merged, mean)
        else:
            merged = mean
        share = self.rounds.kept_share
        if share:
            x.mix_(x, share, [(merged if same_types(x, merged) else x.clone().copy_(merged), 1.0 - share)])
        elif merged is not mean or self.rounds.delay:
            x.copy_(merged)

    @property
    def _outer_optimizer(self) -> OuterOptimizer | None:
        """What applies differences: those that are compressed need something that does."""
        if self.outer_optimizer is None and self.exchange.compressor is not None:
            return _whole_step
        return self.outer_optimizer

    def _fragment(self, worker: Worker, vector: AbstractVector, number: int) -> AbstractVector:
        """Return a fragment of a vector like the worker's model."""
        if self.rounds.fragments == 1:
            return vector
        return vector.slices(self.rounds.fragments, worker.x.borders if self.rounds.by_layer else None)[number]


@dataclass(frozen=True, slots=True)
class Differences:
    """How the differences to the global model travel.

    Attributes:
        compressor: of fixed size; none: as they are.
        error_feedback: how much of what a message leaves out is added to the next one, in [0, 1].
    """

    compressor: AbstractCompressor | None = None
    error_feedback: float = 1.0

    def check(self, method: str) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigurationError: with the method's name.
        """
        if self.compressor is not None:
            require_compressor(method, self.compressor)
            require_fixed_size(method, self.compressor)
        if not 0.0 <= self.error_feedback <= 1.0:
            raise ConfigurationError(
                f"{method}(error_feedback={self.error_feedback}): needs a share in [0, 1]. Use 1 to lose nothing, 0 to "
                "forget what a message leaves out."
            )


@dataclass(frozen=True, slots=True)
class Rounds:
    """When which fragment of a model is averaged; steps are counted from 1, and averages follow them.

    Attributes:
        every: steps of a round; or from which step on how many, as ``{0: 1, 1000: 8}``.
        fragments: how many, which have their rounds one after the other.
        delay: steps for which the average may be under way.
        local_share: weight of what a worker has then, in what it goes on with.
        warm_up_steps: steps after each of which everything is averaged, in the beginning.
        by_layer: whether fragments are made of whole layers, where it is known where these begin.
        early: whether an average begins ``delay`` steps before its round ends, and not there.
    """

    every: int | dict[int, int]
    fragments: int = 1
    delay: int = 0
    local_share: float = 0.0
    warm_up_steps: int = 0
    by_layer: bool = False
    early: bool = False

    @property
    def schedule(self) -> dict[int, int]:
        """The steps of a round, by the step from which on they hold."""
        return {0: self.every} if isinstance(self.every, int) else dict(self.every)

    @property
    def last_every(self) -> int:
        """The steps of a round in the end."""
        return self.schedule[max(self.schedule)]

    @property
    def kept_share(self) -> float:
        """The local share; if everybody waits for the average there is none, but for rounds that are torchft's."""
        return self.local_share if self.delay or self.early else 0.0

    def check(self, method: str) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigurationError: with the method's name.
        """
        schedule = self.schedule
        if 0 not in schedule or min(schedule) < 0:
            raise ConfigurationError(
                f"{method}(every={self.every}): needs a number of steps from step 0 on. Write {{0: 1, 1000: 8}} to "
                "average after every step at first, and from step 1000 on after every 8."
            )
        shortest = min(schedule.values())
        if shortest < 1:
            raise ConfigurationError(f"{method}(every={self.every}): needs at least 1 step. Use 1 for each step.")
        if not 1 <= self.fragments <= shortest:
            raise ConfigurationError(
                f"{method}(fragments={self.fragments}): needs 1 to every={shortest}, because at most one fragment "
                "begins its average after a step. Use fewer fragments or longer rounds."
            )
        if not 0 <= self.delay < max(shortest // self.fragments, 1):
            raise ConfigurationError(
                f"{method}(delay={self.delay}): needs 0 or more, and less than every / fragments = "
                f"{shortest / self.fragments:g} steps: a fragment's average ends before the next one's begins. Use a "
                "shorter delay, longer rounds or fewer fragments."
            )
        if not 0.0 <= self.local_share < 1.0:
            raise ConfigurationError(
                f"{method}(local_share={self.local_share}): needs a share in [0, 1), since with 1 nothing that is "
                "received gets into a worker's model, and all train alone. Use 0 to go on with the average alone."
            )
        if self.warm_up_steps < 0:
            raise ConfigurationError(f"{method}(warm_up_steps={self.warm_up_steps}): needs 0 or more. Use 0 for none.")
        if self.warm_up_steps and self.delay:
            raise ConfigurationError(
                f"{method}(warm_up_steps={self.warm_up_steps}) needs delay=0, got {self.delay}: in these steps all "
                "wait for the average. Leave one of them out."
            )

    def begun_after(self, step: int) -> list[int]:
        """List the fragments whose average begins after so many steps."""
        if step <= self.warm_up_steps:
            return list(range(self.fragments))
        schedule = self.schedule
        since = max(begin for begin in schedule if begin < step)
        every = schedule[since]
        since = max(since, self.warm_up_steps) - self.delay * self.early
        return [
            fragment
            for fragment in range(self.fragments)
            if (step - since - (fragment + 1) * every // self.fragments) % every == 0
        ]

    def length_from(self, step: int) -> int:
        """Tell of how many steps a round is that begins after so many."""
        if step < self.warm_up_steps:
            return 1
        return self.schedule[max(begin for begin in self.schedule if begin <= step)]

    def due_after(self, step: int, sent: dict[int, Any]) -> list[int]:
        """List the fragments whose average is merged after so many steps."""
        return [fragment for fragment, each in sent.items() if step >= each["step"] + self.delay]


@dataclass(frozen=True)
class MeansOfRounds(AbstractAlgorithm):
    """Averages over all workers after each round, and does nothing else: for buffers.

    Args:
        rounds: when; of one fragment, without a delay.
    """

    rounds: Rounds

    def resolved(self, world_size: int) -> Self:
        return self

    def init(self, worker: Worker) -> None:
        pass

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        if self.rounds.begun_after(worker.step + 1):
            await AllReduce(worker.x)


@dataclass(frozen=True)
class OpenRounds(AbstractOpenRounds):
    """Rounds of local steps of workers that come and go: whoever is there at the end of a round averages.

    All that are there wait for each other. A round ends with an epoch, too. Who has joined counts in an average once it
    has made a step of its own; it begins at the common model of the round, or where there is none, at another worker's.

    Args:
        method: what is averaged how; see `AbstractLocalUpdates.opened`.
    """

    method: AbstractLocalUpdates

    def resolved(self, world_size: int) -> Self:
        return type(self)(self.method.resolved(world_size))

    @property
    def has_outer_gradient(self) -> bool:
        return self.method.has_outer_gradient

    def among(self, ranks: Sequence[int], size: int) -> Self:
        """Return the algorithm for those that are there."""
        return self.resolved(len(ranks))

    def period(self, world_size: int) -> int:
        return self.method.period(world_size)

    def mixing(self, world_size: int) -> Mixing:
        return self.method.mixing(world_size)

    def init(self, worker: Worker) -> None:
        self.method.init(worker)
        worker.state.update({"began": worker.step, COUNTS: 0.0})

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        worker.state[COUNTS] = 1.0

    def is_due(self, worker: Worker) -> bool:
        began: int = worker.state["began"]
        return worker.step >= began + self.method.rounds.length_from(began)

    async def end_round(self, worker: Worker) -> None:
        await self.method.average(worker)
        worker.state.update({"began": worker.step, COUNTS: 0.0})

    def handed_over(self, worker: Worker) -> dict[str, Any]:
        return {name: worker.state[name] for name in ("began", "global", "outer") if name in worker.state}

    def join(self, worker: Worker, given: Mapping[str, Any]) -> None:
        worker.state.update(given)
        if "global" in given:
            worker.x.copy_(given["global"])


def _whole_step(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=1.0)


async def _mean_of_messages(exchange: CompressedMean, mean: AbstractVector, scratch: AbstractVector) -> AbstractVector:
    """Add the mean of what all workers' messages stand for to ``mean``."""
    exchange.add_(mean, scratch, await exchange.request(), 1.0)
    return mean


def outer_step(
    make: OuterOptimizer, states: list[Any], fragment: int, merged: AbstractVector, difference: AbstractVector
) -> None:
    """Apply a difference to the global fragment; all workers compute the same.

    The state of a fragment has what the optimizer remembers of each of its buffers, and then what its groups remember
    beyond the options that they are made with, as the counts of one that is free of schedules.
    """
    if not (isinstance(merged, Vector) and isinstance(difference, Vector)):
        return  # the planner's have no values
    with torch.no_grad():
        parameters = [torch.nn.Parameter(buffer.detach()) for buffer in merged.buffers]
        known = states[fragment][: len(parameters)] or [{} for _ in parameters]
        optimizer = make(parameters)
        if type(optimizer) in _BY_ELEMENT:
            del optimizer  # and what it remembers of parameters from the beginning
            steps = zip(parameters, difference.buffers, known, strict=True)
            states[fragment] = [_step_in_pieces(make, *each) for each in steps]
            return
        for parameter, gradient, state in zip(parameters, difference.buffers, known, strict=True):
            parameter.grad = gradient
            if state:
                optimizer.state[parameter] = dict(state)
        made = [dict(group) for group in optimizer.param_groups]
        for group, counts in zip(optimizer.param_groups, states[fragment][len(parameters) :], strict=False):
            group.update(copy.deepcopy(counts))
        optimizer.step()
        for parameter, buffer in zip(parameters, merged.buffers, strict=True):
            if parameter.data_ptr() != buffer.data_ptr():  # the optimizer has put new data there
                buffer.copy_(parameter)
        counts = [_changed(*pair) for pair in zip(made, optimizer.param_groups, strict=True)]
        states[fragment] = [dict(optimizer.state[parameter]) for parameter in parameters] + counts * any(counts)


def _changed(made: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group that are not what it was made with."""
    found = {name: value for name, value in group.items() if name != "params"}
    return {name: value for name, value in found.items() if name not in made or not _equal(made[name], value)}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


_BY_ELEMENT = (SGD, Adagrad, Adam, AdamW, RMSprop)  # these treat each element by itself
_PIECE, _DEVICE_PIECE = 1 << 20, 1 << 24  # elements


def _step_in_pieces(make: OuterOptimizer, whole: Tensor, gradient: Tensor, known: dict[str, Any]) -> dict[str, Any]:
    """Let an optimizer step one piece after the other: what it computes on the way is as large as what it is given.

    Args:
        make: makes it.
        whole: what it changes.
        gradient: of it.
        known: what it remembers of it; changed in place.

    Returns:
        What it remembers now.
    """
    now: dict[str, Any] = {}
    size = _PIECE if whole.device.type == "cpu" else _DEVICE_PIECE
    for begin in range(0, max(whole.numel(), 1), size):
        own = slice(begin, begin + size)
        piece = torch.nn.Parameter(whole.detach()[own])
        piece.grad = gradient[own]
        optimizer = make([piece])
        if known:  # a number is the piece's own: it may be counted up in place
            optimizer.state[piece] = {
                name: value[own] if _is_like(value, whole) else copy.deepcopy(value) for name, value in known.items()
            }
        optimizer.step()
        for name, value in optimizer.state[piece].items():
            if not _is_like(value, piece):
                now[name] = value
                continue
            if name not in now:
                now[name] = known[name] if name in known else torch.empty_like(whole, dtype=value.dtype)
            place = now[name][own]
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
    return now


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
