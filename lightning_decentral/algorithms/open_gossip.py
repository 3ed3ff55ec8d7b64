"""D-PSGD whose workers come and go: each step is a round of those that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from lightning_decentral.algorithms.base import AbstractGossip, Order
from lightning_decentral.averaging import neighbor_average
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractOpenRounds, Gradient, LocalStep, Mixing
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class OpenGossip(AbstractOpenRounds):
    """D-PSGD among those that are there: before each step they agree on who that is, and average on a graph of these.

    A round is made by all that are there, or by nobody: where one of them is lost in the middle, the others make it
    again without it, from the same models. So nothing is averaged at one end of an edge only, and the mean of those
    that are there stays what it is. The rounds are counted, and the count is handed over to who joins: a graph that
    changes with the step is the same on all.

    With ``"awc"`` the average is made of the models at which the gradient is taken, before it, and not beside it; it
    becomes the model after the gradient. That needs a copy of the model. With ``"atc"`` it follows the update.

    Args:
        method: whose graph it is, doubly stochastic, as a function of the number of workers.
        order: see `AbstractDPSGD`.
    """

    may_end_early = False  # without an annotation: see `AbstractAlgorithm`

    method: AbstractGossip
    order: Order

    @property
    def ends_with_epoch(self) -> bool:  # type: ignore[override]
        """Whether all average at the end of an epoch, too: if that is what the last step still lacks."""
        return self.order == "atc"

    def resolved(self, world_size: int) -> Self:
        return type(self)(self.method.resolved(world_size), self.order)

    def among(self, ranks: Sequence[int], size: int) -> Self:
        """Return the algorithm for those that are there."""
        return type(self)(self.method.among(ranks, size), self.order)

    def period(self, world_size: int) -> int:
        return self.method.period(world_size)

    def mixing(self, world_size: int) -> Mixing:
        return self.method.mixing(world_size)

    def init(self, worker: Worker) -> None:
        worker.state.update({"round": 0, "due": self.order == "awc"})
        if self.order == "awc":
            worker.state["average"] = worker.x.clone()

    async def step(self, worker: Worker) -> None:
        state = worker.state
        await Gradient()
        if self.order == "awc" and not state["due"]:  # or no round was made before this step
            worker.x.copy_(state["average"])
        await LocalStep()
        state["due"] = True

    def is_due(self, worker: Worker) -> bool:
        due: bool = worker.state["due"]
        return due

    async def end_round(self, worker: Worker) -> None:
        state = worker.state
        value = state["average"].copy_(worker.x) if self.order == "awc" else worker.x
        await neighbor_average(worker, self.method.graph, value, state["round"])
        state.update({"round": state["round"] + 1, "due": False})

    def handed_over(self, worker: Worker) -> dict[str, Any]:
        names = ("round", "due") if worker.state["due"] or self.order == "atc" else ("round", "due", "average")
        return {name: worker.state[name] for name in names}

    def mass(self, worker: Worker) -> AbstractVector:
        averaged = self.order == "awc" and not worker.state["due"]
        value: AbstractVector = worker.state["average"] if averaged else worker.x
        return value.clone()

    def join(self, worker: Worker, given: Mapping[str, Any]) -> None:
        worker.state.update(given)
