"""Asynchronous decentralized parallel SGD (Lian et al., 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_decentral.algorithms.base import AbstractGossip
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Call, Gradient, LocalStep, Mixing, Start
from lightning_decentral.topology import (
    AbstractTopology,
    BipartiteRing,
    Complete,
    Exponential,
    TopologyLike,
    pairwise_gap,
)
from lightning_decentral.worker import Worker


def complete_or_sparse(size: int) -> AbstractTopology:
    """Choose `Complete` up to 8 workers, `Exponential` beyond; for two workers `BipartiteRing`.

    If both of two called, their calls would cross, and crossing calls of two swap their models.
    """
    if size == 2:
        return BipartiteRing(2)
    return Complete(size) if size <= 8 else Exponential(size)


def pairwise_mixing(peers: Sequence[Sequence[int]]) -> Mixing:
    """Tell how fast models come together if each worker averages with a random one of its peers in each step."""
    if len(peers) == 1:
        return Mixing(1.0, 1)
    gap = pairwise_gap(peers)
    rounds = math.ceil(math.log(1e-3) / math.log1p(-gap)) if 0 < gap < 1 else (1 if gap >= 1 else math.inf)
    return Mixing(gap, rounds)


@dataclass(frozen=True, repr=False)
class ADPSGD(AbstractGossip, AbstractAsynchronousAlgorithm):
    r"""Asynchronous decentralized parallel SGD: average with one random neighbour, wait for nobody's gradient.

    Each step of worker ``i``, with ``s_i`` its parameters at the beginning of the step and ``x_j`` what neighbour ``j``
    has when it is asked::

        x_i <- x_i + (x_j - s_i) / 2        # while the gradient is computed
        x_j <- x_j + (s_i - x_j) / 2        # at the neighbour, whatever it is doing
        x_i <- x_i - learning_rate * gradient_i(s_i)

    Both ends use the same two vectors, in difference form: the sum over all workers is kept whatever happens in
    between. A worker answers while it computes, so a call takes no longer than the network, and no graph can deadlock.

    Args:
        topology: who may average with whom, as a topology or a function of the number of workers; a partner is drawn
            uniformly from ``topology.peers(rank)``. By default `Complete` up to 8 workers, `Exponential` beyond; for
            two workers `BipartiteRing`, because two that call each other at the same time exchange their models instead
            of averaging them. On a `BipartiteRing` or `BipartiteExponential`, as in the paper, only the active half
            calls and the passive half answers.

    Cost:
        One model sent and one received per step of its own (hidden behind the gradient), the same again for each call
        that it answers. Between workers of one host nothing is sent: two passes over a model in shared memory per call,
        by the caller. Extra memory: a copy of the model (the snapshot); where calls go to other hosts another one (what
        is received), and for each neighbour that may call three parts of 1/16 of the model, at most 2 MB each.
        Nobody waits for a slow worker. A lost peer raises `PeerLost` on all workers (in the simulator, at those that
        call it), but with `OpenStrategy`, where the others go on.

    Differences with the paper:
        Any connected graph of any size works, not only bipartite ones; the gradient's update is applied after the
        averaging of its own step, never during it.

    References:
        Xiangru Lian, Wei Zhang, Ce Zhang, Ji Liu. Asynchronous Decentralized Parallel Stochastic Gradient Descent.
        ICML 2018, arXiv:1710.06952.

    Example:
        >>> ADPSGD().resolved(4)
        ADPSGD(topology=Complete(size=4))
    """

    answers_in_parts = True
    tolerates_loss = True

    topology: TopologyLike = complete_or_sparse

    def init(self, worker: Worker) -> None:
        pass

    def peers(self, rank: int) -> tuple[int, ...]:
        return self.graph.peers(rank) if self.graph.initiates(rank) else ()

    def mixing(self, world_size: int) -> Mixing:
        return pairwise_mixing([self.peers(rank) for rank in range(world_size)])

    async def step(self, worker: Worker) -> None:
        averaging = await Start(self._average(worker))
        await Gradient()
        await averaging
        await LocalStep()

    async def _average(self, worker: Worker) -> None:
        peers = self.peers(worker.rank)
        if peers:
            await Call(worker.rng.choice(peers), worker.snapshot, then=self._approach)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        worker.x.approach_(theirs)
        return theirs  # s_i - x_j: one end moves by half of it, the other by minus that, to the last bit

    def _approach(self, worker: Worker, difference: AbstractVector) -> None:
        worker.x.add_(difference, alpha=-0.5)
