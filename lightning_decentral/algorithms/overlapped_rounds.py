"""Rounds of local steps, each beside the average of what the round before it has made."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

from lightning_decentral.algorithms.local_updates import MeansOfRounds, Rounds
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, LocalStep, Mixing, Start
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class AbstractOverlappedRounds(AbstractAlgorithm):
    """Rounds of ``every`` local steps; at the end of each the average arrives that was begun at the end of the last.

    Args:
        every: local steps of a round.
    """

    every: int = 8

    def __post_init__(self) -> None:
        Rounds(self.every).check(type(self).__name__)

    @abstractmethod
    def turn(self, worker: Worker, mean: AbstractVector | None) -> AbstractVector:
        """Do what comes between two rounds.

        Args:
            worker: changes its ``x``.
            mean: over all workers, of what they gave when the last round ended; none after the first round.

        Returns:
            What is averaged beside the next round, in memory of its own.
        """

    def resolved(self, world_size: int) -> Self:
        return self

    def period(self, world_size: int) -> int:
        return self.every

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, 2 * self.every)

    def for_buffers(self) -> AbstractAlgorithm:
        """Return the mean over all workers after each round."""
        return MeansOfRounds(Rounds(self.every))

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        if (worker.step + 1) % self.every == 0:
            await self.rest(worker)
            state = worker.state
            state["mean"] = self.turn(worker, state.get("mean"))
            state["ticket"] = await Start(AllReduce(state["mean"]))

    async def rest(self, worker: Worker) -> None:
        ticket: Any = worker.state.pop("ticket", None)
        if ticket is not None:
            await ticket
