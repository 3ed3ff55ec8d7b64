"""Centralized parallel SGD, the baseline of the D-PSGD paper (Lian et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.local_updates import MeansOfRounds, Rounds
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep, NeighborExchange
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class CPSGD(AbstractAlgorithm):
    r"""C-PSGD: all gradients go to one worker, which sends their mean to all: synchronous SGD with a bottleneck.

    Update rule, the same on all workers::

        x <- x - learning_rate * (1/n) sum_j gradient_j(x)

    The models are those of `SyncSGD`, which comes to the same mean by an all-reduce without a bottleneck. This is what
    papers compare D-PSGD with. Any optimizer may apply the mean; its state is the same everywhere.

    Args:
        server: the rank to which gradients go; it trains, too.

    Cost:
        One gradient to the server per step, and n - 1 from it one after the other through its link, after the gradient.
        Extra memory: the gradient; at the server a receive buffer per worker. A lost peer raises `PeerLost`.

    References:
        Xiangru Lian, Ce Zhang, Huan Zhang, Cho-Jui Hsieh, Wei Zhang, Ji Liu. Can Decentralized Algorithms Outperform
        Centralized Algorithms? NeurIPS 2017, arXiv:1705.09056.

    Example:
        >>> CPSGD()
        CPSGD(server=0)
    """

    exchanges_gradients = True
    same_updates = True

    server: int = 0

    def resolved(self, world_size: int) -> CPSGD:
        if not 0 <= self.server < world_size:
            raise ConfigurationError(
                f"CPSGD got server={self.server!r} for {world_size} workers, needs one of the ranks 0 to "
                f"{world_size - 1}. Leave it out for worker 0."
            )
        return self

    def init(self, worker: Worker) -> None:
        pass

    def for_buffers(self) -> AbstractAlgorithm:
        """Return the mean over all workers after each step."""
        return MeansOfRounds(Rounds(1))

    async def step(self, worker: Worker) -> None:
        await Gradient()
        gradient, share = worker.gradient, 1.0 / worker.world_size
        if worker.rank == self.server:
            others = tuple(rank for rank in range(worker.world_size) if rank != worker.rank)
            received = await NeighborExchange(gradient, (), others)
            gradient.mix_(gradient, share, [(theirs, share) for theirs in received.values()])
            del received
            await NeighborExchange(gradient, others, ())
        else:
            await NeighborExchange(gradient, (self.server,), ())
            gradient.copy_((await NeighborExchange(gradient, (), (self.server,)))[self.server])
        await LocalStep()
