"""Asynchronous decentralized parallel SGD (Lian et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_decentral.algorithms.pairwise import AbstractPairwise, Partners, pairwise_mixing
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import Call, Mixing
from lightning_decentral.topology import (
    AbstractTopology,
    BipartiteExponential,
    BipartiteRing,
    Complete,
    Exponential,
    TopologyLike,
)
from lightning_decentral.worker import Worker


def complete_or_sparse(size: int) -> AbstractTopology:
    """Choose `Complete` up to 8 workers, `Exponential` beyond; for two workers `BipartiteRing`.

    If both of two called, their calls would cross, and crossing calls of two swap their models.
    """
    if size == 2:
        return BipartiteRing(2)
    return Complete(size) if size <= 8 else Exponential(size)


def halves_or_all(size: int) -> AbstractTopology:
    """Choose `BipartiteExponential` for an even number of workers; otherwise, and for two, `complete_or_sparse`."""
    return BipartiteExponential(size) if size > 2 and size % 2 == 0 else complete_or_sparse(size)


@dataclass(frozen=True, repr=False)
class ADPSGD(AbstractPairwise):
    r"""Asynchronous decentralized parallel SGD: average with one neighbour at a time, wait for nobody's gradient.

    Worker ``i`` computes gradients, and averages beside that. With ``s_i`` its parameters when a call begins, and
    ``x_j`` what neighbour ``j`` has when it is asked::

        x_j <- x_j + (s_i - x_j) / 2        # at the neighbour, whatever it is doing
        x_i <- x_i + (x_j - s_i) / 2        # when the answer is there, whatever worker i is doing
        x_i <- x_i - learning_rate * gradient_i

    Both ends use the same two vectors, in difference form: the sum over all workers is kept whatever happens in
    between. A worker answers while it computes, so a call takes no longer than the network, and no graph can deadlock.
    A call begins with a step. If it takes longer than a gradient it goes on beside the next steps: a step does not
    wait for the network, and an average comes as often as the network allows.

    Args:
        topology: who may average with whom, as a topology or a function of the number of workers; a partner is one of
            ``topology.peers(rank)``. By default `BipartiteExponential` for an even number of workers: only odd ranks
            call, and even ranks answer, as in the paper. For two `BipartiteRing`: two that call each other at the same
            time exchange their models instead of averaging them. For an odd number `Complete` up to 8 workers,
            `Exponential` beyond, where everybody calls.
        partners: ``"rotating"``, the default: one after the other, beginning with the next rank; those that call at
            the same time call different workers then, and no two share a link. ``"random"``: drawn uniformly, as in
            the paper.
        max_pending_steps: steps after which a worker waits for its call, if that has not come back: so many it may go
            without an average of its own. 64 by default. Where a model takes longer than a gradient, use several times
            as many steps as it takes. 1: each step waits for its own call.

    Raises:
        ConfigurationError: for other numbers or names.

    Cost:
        By default one model sent and one received per step, on average over the workers, and less where the network
        carries no more; hidden behind the gradients. Twice that if everybody calls. Between workers of one
        host nothing is sent: two passes over a model in shared memory per call, by the caller. Extra memory: a copy of
        the model (the snapshot); where calls go to other hosts what is received, what a call sends if
        ``max_pending_steps`` is above 1, and for each neighbour that may call three parts of 1/16 of the model, at most
        2 MB each.
        Nobody waits for a slow worker. A lost peer raises `PeerLost` on all workers (in the simulator, at those that
        call it), but with `OpenStrategy`, where the others go on.

    Differences with the paper:
        Any connected graph of any size works, not only bipartite ones. A worker has one call of its own under way.
        Partners take turns by default. The paper sets no bound on the steps between two averages.

    References:
        Xiangru Lian, Wei Zhang, Ce Zhang, Ji Liu. Asynchronous Decentralized Parallel Stochastic Gradient Descent.
        ICML 2018, arXiv:1710.06952.

    Example:
        >>> ADPSGD().resolved(4), ADPSGD().resolved(3)
        (ADPSGD(topology=BipartiteExponential(size=4)), ADPSGD(topology=Complete(size=3)))
    """

    answers_in_parts = True

    topology: TopologyLike = halves_or_all
    partners: Partners = field(default="rotating", repr=False)
    max_pending_steps: int = field(default=64, repr=False)

    def init(self, worker: Worker) -> None:
        pass

    def for_buffers(self) -> ADPSGD:
        """Return the same."""
        return self

    def mixing(self, world_size: int) -> Mixing:
        return pairwise_mixing([self.peers(rank) for rank in range(world_size)])

    def _call(self, worker: Worker, peer: int) -> Call:
        if self.max_pending_steps == 1:  # then the model as it is when the step begins is there until the answer is
            return Call(peer, worker.snapshot, then=self._approach)
        return Call(peer, worker.x, then=self._approach, may_change=True)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        worker.x.approach_(theirs)
        return theirs  # s_i - x_j: one end moves by half of it, the other by minus that, to the last bit

    def _approach(self, worker: Worker, difference: AbstractVector) -> None:
        worker.x.add_(difference, alpha=-0.5)
