"""Synchronous data-parallel SGD: the baseline, through the same engine as everything else."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.local_updates import MeansOfRounds, Rounds
from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, LocalStep
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class SyncSGD(AbstractAlgorithm):
    r"""Synchronous data-parallel SGD: every worker applies the mean of all gradients.

    Update rule::

        x_i <- x_i - learning_rate * (1/n) sum_j gradient_j(x_j)

    All workers start equal and stay equal. It is what `DDPStrategy` computes, without its overlap of the reduction with
    the backward pass: use it as the baseline that shares everything but the method with the others, and Lightning's
    ``strategy="ddp"`` for the fastest all-reduce.

    Cost:
        ``2 (n - 1) / n`` models sent per step; one extra copy of the model (the gradients, contiguous). Every worker
        waits for the slowest. A lost peer ends the run.

    Differences with the field's usual form:
        A parameter that no worker used gets a zero gradient, not none: weight decay and momentum act on it.

    Example:
        >>> SyncSGD()
        SyncSGD()
    """

    exchanges_gradients = True
    same_updates = True

    def resolved(self, world_size: int) -> SyncSGD:
        return self

    def init(self, worker: Worker) -> None:
        pass

    def for_buffers(self) -> AbstractAlgorithm:
        """Return the mean over all workers after each step."""
        return MeansOfRounds(Rounds(1))

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await AllReduce(worker.gradient)
        await LocalStep()
