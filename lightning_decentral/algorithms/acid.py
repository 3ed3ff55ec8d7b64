"""A2CiD2: asynchronous pairwise averaging with a continuous momentum (Nabli et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from lightning_decentral.algorithms.adpsgd import ADPSGD
from lightning_decentral.algorithms.pairwise import AbstractPairwise, Partners, pairwise_mixing
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import Call, Mixing
from lightning_decentral.topology import AbstractTopology, BipartiteRing, Complete, Ring, TopologyLike
from lightning_decentral.worker import Worker


def bipartite_ring_or_ring(size: int) -> AbstractTopology:
    """Choose `BipartiteRing` for an even number of workers, `Ring` for an odd one; `Complete` for one."""
    if size % 2 == 0:
        return BipartiteRing(size)
    return Ring(size) if size > 1 else Complete(1)


@dataclass(frozen=True)
class Rates:
    """How fast the two vectors of A2CiD2 mix, by the graph.

    Args:
        mixing: ``eta``, per unit of time, in which each worker that calls makes one call.
        companion: ``alpha~``: by which share of a difference the companion moves; 1/2 is what the model moves by.
        exchanges: by worker, how many it takes part in per unit of time.
    """

    mixing: float
    companion: float
    exchanges: tuple[float, ...]


def rates(peers: Sequence[Sequence[int]]) -> Rates:
    r"""Compute the rates from the constants of the graph.

    With the Laplacian ``L = sum_ij rate_ij (e_i - e_j)(e_i - e_j)^T`` of the rates at which pairs average,
    ``chi_1 = 1 / lambda_2(L)``, and ``chi_2`` half of the largest effective resistance of an edge::

        eta = 1 / (2 sqrt(chi_1 chi_2)),   alpha~ = 1/2 sqrt(chi_1 / chi_2)

    Args:
        peers: by worker: whom it calls, equally often; nobody if it only answers.

    Example:
        >>> rates([(1,), ()]).companion
        0.5
    """
    laplacian = torch.zeros(len(peers), len(peers), dtype=torch.float64, device="cpu")
    edges = [(rank, peer, 1.0 / len(others)) for rank, others in enumerate(peers) for peer in others]
    for rank, peer, share in edges:
        for row, column, sign in ((rank, rank, 1), (peer, peer, 1), (rank, peer, -1), (peer, rank, -1)):
            laplacian[row, column] += sign * share
    exchanges = tuple(laplacian.diagonal().tolist())
    there = [rank for rank, often in enumerate(exchanges) if often]
    if not there:
        return Rates(0.0, 0.5, exchanges)
    slowest = float(torch.linalg.eigvalsh(laplacian[there][:, there])[1])
    inverse = torch.linalg.pinv(laplacian, hermitian=True)
    resistances = [float(inverse[i, i] + inverse[j, j] - 2.0 * inverse[i, j]) for i, j, _ in edges]
    one, two = 1.0 / slowest, max(resistances) / 2.0
    return Rates(0.5 / math.sqrt(one * two), max(0.5, 0.5 * math.sqrt(one / two)), exchanges)


@dataclass(frozen=True, repr=False)
class ACiD(AbstractPairwise):
    r"""A2CiD2: AD-PSGD with a momentum between each model and a companion, so that sparse graphs average faster.

    Worker ``i`` has its model ``x_i`` and a companion ``x~_i``, equal at first. Both get each of the worker's updates.
    Between two events they flow towards each other, ``dx = eta (x~ - x) dt`` and ``dx~ = eta (x - x~) dt``. When ``i``
    and ``j`` average, with ``d = x_i - x_j``::

        x_i  <- x_i  - d / 2,        x_j  <- x_j  + d / 2
        x~_i <- x~_i - alpha~ d,     x~_j <- x~_j + alpha~ d

    ``eta`` and ``alpha~`` follow from the graph (`rates`). Kept is the difference ``y = x~ - x``, which updates do not
    change: so any optimizer works. Time is counted by the exchanges that a worker takes part in, divided by how many
    the graph gives it per unit of time: so the rates do not depend on how fast computing and the network are.

    Calls go on beside the steps as with `ADPSGD`: nobody waits for a slow worker or a slow network.

    Args:
        topology: who may average with whom, as a topology or a function of the number of workers. A `BipartiteRing` by
            default, for an odd number a `Ring`: on dense graphs there is nothing to gain over `ADPSGD`.
        partners: ``"rotating"``, the default: one after the other; ``"random"``: drawn uniformly, as in the paper.
        max_pending_steps: steps after which a worker waits for its call, if that has not come back; 64 by default.

    Raises:
        ConfigurationError: for other numbers or names.

    Cost:
        One model each way per call, as for `ADPSGD`; between workers of one host, too. Memory: two copies of the model
        (the snapshot and ``y``), what a call sends while it is under way, what is received, and for each neighbour that
        may call what it sends. A lost peer raises `PeerLost`, but with `OpenStrategy`, where the others go on, on the
        graph of those that are there; whoever joins begins with a companion that is its model.

    Differences with the paper:
        There is no coordinator that pairs workers: any worker is called while it computes. The time between two events
        is counted and not measured. The paper averages all models exactly before and after training.

    References:
        Adel Nabli, Eugene Belilovsky, Edouard Oyallon. A2CiD2: Accelerating Asynchronous Communication in Decentralized
        Deep Learning. NeurIPS 2023, arXiv:2306.08289.

    Example:
        >>> ACiD().resolved(4)
        ACiD(topology=BipartiteRing(size=4))
    """

    topology: TopologyLike = bipartite_ring_or_ring
    partners: Partners = field(default="rotating", repr=False)
    max_pending_steps: int = field(default=64, repr=False)

    @cached_property
    def rates(self) -> Rates:
        """The rates on this graph."""
        return rates([self.peers(rank) for rank in range(self.graph.size)])

    def mixing(self, world_size: int) -> Mixing:
        plain = pairwise_mixing([self.peers(rank) for rank in range(world_size)])
        gap = max(plain.spectral_gap, -math.expm1(-self.rates.mixing))  # what is left shrinks by exp(-eta) in a step
        rounds = math.ceil(math.log(1e-3) / math.log1p(-gap)) if 0 < gap < 1 else plain.rounds_to_consensus
        return Mixing(gap, min(rounds, plain.rounds_to_consensus))

    def messages(self, worker: Worker) -> Mapping[str, AbstractVector]:
        return {"difference and share": worker.x.beside(worker.x.new_numbers(0.0))}

    def mass(self, worker: Worker) -> AbstractVector:
        return worker.x.clone().add_(worker.state["beyond"], alpha=0.5)  # half of model and companion

    def for_buffers(self) -> ADPSGD:
        """Return AD-PSGD with the same partners."""
        return ADPSGD(self.topology, partners=self.partners, max_pending_steps=self.max_pending_steps)

    def init(self, worker: Worker) -> None:
        worker.state["beyond"] = worker.x.clone().mul_(0.0)

    def _call(self, worker: Worker, peer: int) -> Call:
        self._flow(worker)
        return Call(peer, worker.x, then=self._approach, may_change=True)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        self._flow(worker)
        worker.x.approach_(theirs)
        share = self.rates.companion
        worker.state["beyond"].add_(theirs, alpha=share - 0.5)
        # x_i - x_j: one end moves by half of it, the other by minus that, to the last bit. So do the companions: where
        # workers come and go, the caller may see others than this one, and compute another share.
        return theirs.beside(theirs.new_numbers(share))

    def _approach(self, worker: Worker, answer: AbstractVector) -> None:
        difference, share = answer.apart(worker.x, worker.x.new_numbers(0.0))
        worker.x.add_(difference, alpha=-0.5)
        worker.state["beyond"].add_(difference, alpha=0.5 - share.numbers()[0])

    def _flow(self, worker: Worker) -> None:
        """Let model and companion flow towards each other, for as long as there is between two exchanges."""
        often = self.rates.exchanges[worker.rank]
        if not often:  # called by a worker that sees more of the others than this one does
            return
        share = -math.expm1(-2.0 * self.rates.mixing / often) / 2.0
        worker.x.add_(worker.state["beyond"], alpha=share)
        worker.state["beyond"].mul_(1.0 - 2.0 * share)
