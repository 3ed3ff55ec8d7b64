"""Hogwild: lock-free SGD on one model in shared memory (Niu et al., 2011; Lian et al., 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Gradient, LocalStep, Mixing
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class Hogwild(AbstractAsynchronousAlgorithm):
    r"""Hogwild (AsySG-incon): the processes of one machine train one model in shared memory, and nobody takes a lock.

    Of each worker, all at the same time::

        x_hat <- x                                     # element by element, while others write
        x[k]  <- x[k] - learning_rate * g(x_hat)[k]    # each element as it comes; with its own optimizer

    A read may have some elements from before an update of another worker and some from after it (a torn read), and of
    two that write the same element at the same moment one may be lost. Neither does harm where updates are small, or
    sparse, so that they rarely meet.

    Args:
        copy: whether a gradient is taken at a copy of the model, which each step makes, so that its forward and its
            backward pass see the same values. Without it the passes read what others write meanwhile, as in most
            published code, and a step costs nothing that has the size of the model: for sparse gradients of large ones.

    Cost:
        Nothing is sent. Per worker: a copy of the model (the snapshot) and one pass for it, unless ``copy`` is false;
        the state of its own optimizer (momentum, Adam's moments), which is not shared. A worker that is lost ends the
        run with `PeerLost`; the model may have half of its last update.

    Differences with the papers:
        All elements of a gradient are written, in order, where the analyses draw them at random. Each worker has the
        state of an optimizer of its own.

    References:
        Feng Niu, Benjamin Recht, Christopher Re, Stephen Wright. Hogwild!: A Lock-Free Approach to Parallelizing
        Stochastic Gradient Descent. NeurIPS 2011, arXiv:1106.5730.
        Xiangru Lian, Yijun Huang, Yuncheng Li, Ji Liu. Asynchronous Parallel Stochastic Gradient for Nonconvex
        Optimization. NeurIPS 2015, arXiv:1506.08272.

    Example:
        >>> Hogwild().resolved(2)
        Hogwild(copy=True)
    """

    shares_model = True

    copy: bool = True

    def resolved(self, world_size: int) -> Self:
        return self

    def init(self, worker: Worker) -> None:
        if not self.copy:
            worker.snapshot = worker.x

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return (0,)  # all have the same

    def peers(self, rank: int) -> tuple[int, ...]:
        return ()

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, 1)

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        return worker.x  # nobody calls
