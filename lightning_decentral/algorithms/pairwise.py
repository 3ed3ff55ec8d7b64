"""What the methods have in common whose workers average in pairs, by calls that go on beside the steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final, get_args

from lightning_decentral.algorithms.base import AbstractGossip
from lightning_decentral.algorithms.server import require_count
from lightning_decentral.compression.validation import require_one_of
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    Call,
    Gradient,
    LocalStep,
    Mixing,
    Start,
)
from lightning_decentral.topology import AbstractTopology, pairwise_gap
from lightning_decentral.worker import Worker

Partners = Literal["random", "rotating"]
"""How a worker chooses whom it calls: by chance, or one after the other, so that as few as possible call the same."""


def partner_in_turn(worker: Worker, peers: Sequence[int], partners: Partners) -> int:
    """Choose whom a worker calls next.

    Args:
        worker: that calls; whose turn it was is kept in its state.
        peers: of which one is chosen.
        partners: how.
    """
    if partners == "random":
        return worker.rng.choice(peers)
    turn: int = (worker.state.get("turn", -1) + 1) % len(peers)
    worker.state["turn"] = turn
    return sorted(peers, key=lambda peer: (peer - worker.rank) % worker.world_size)[turn]


def pairwise_mixing(peers: Sequence[Sequence[int]]) -> Mixing:
    """Tell how fast models come together if each worker averages with a random one of its peers in each step."""
    if len(peers) == 1:
        return Mixing(1.0, 1)
    gap = pairwise_gap(peers)
    rounds = math.ceil(math.log(1e-3) / math.log1p(-gap)) if 0 < gap < 1 else (1 if gap >= 1 else math.inf)
    return Mixing(gap, rounds)


@dataclass(frozen=True, repr=False)
class AbstractPairwise(AbstractGossip, AbstractAsynchronousAlgorithm):
    """An algorithm whose workers call one neighbour at a time, and go on with their steps meanwhile.

    A call begins with a step. If it takes longer than a gradient it goes on beside the next steps. A subclass says what
    a call sends, how it is answered, and what becomes of the answer.

    Args:
        topology: who may average with whom.
        partners: how a worker chooses whom it calls.
        max_pending_steps: steps after which a worker waits for its call.
    """

    tolerates_loss = True

    partners: Partners
    max_pending_steps: int

    @final
    def check(self, graph: AbstractTopology | None) -> None:
        name = type(self).__name__
        require_count(name, "max_pending_steps", self.max_pending_steps)
        require_one_of(name, "partners", self.partners, get_args(Partners))

    @final
    def peers(self, rank: int) -> tuple[int, ...]:
        return self.graph.peers(rank) if self.graph.initiates(rank) else ()

    @final
    async def step(self, worker: Worker) -> None:
        state = worker.state
        if "averaging" not in state:
            state.update(arrived=False, pending=0)
            state["averaging"] = await Start(self._average(worker))
        await Gradient()
        state["pending"] += 1
        if state["arrived"] or state["pending"] >= self.max_pending_steps:
            await state.pop("averaging")
        await LocalStep()

    @final
    async def rest(self, worker: Worker) -> None:
        if "averaging" in worker.state:
            await worker.state.pop("averaging")

    @final
    async def depart(self, worker: Worker, neighbors: Sequence[int]) -> None:
        """Average with a neighbour once more, which is called though it may be one that calls only."""
        await self.rest(worker)
        if neighbors:
            beside = replace(self, max_pending_steps=2)  # with 1 a call is of the snapshot, which is of a step
            await beside._call(worker, worker.rng.choice(sorted(neighbors)))

    @abstractmethod
    def for_buffers(self) -> AbstractAlgorithm:
        """Return AD-PSGD with the same partners."""

    @abstractmethod
    def _call(self, worker: Worker, peer: int) -> Call:
        """Return the call of a neighbour."""

    @abstractmethod
    def _approach(self, worker: Worker, answer: AbstractVector) -> None:
        """Average with who has answered."""

    async def _average(self, worker: Worker) -> None:
        state, peers = worker.state, self.peers(worker.rank)
        if peers:
            await self._call(worker, partner_in_turn(worker, peers, self.partners))
        state["arrived"] = True
