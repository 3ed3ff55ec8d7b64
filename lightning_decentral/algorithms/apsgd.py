"""Asynchronous parallel SGD with a parameter server (Lian et al., 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_decentral.algorithms.server import AbstractServer, require_count, summed
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class APSGD(AbstractServer):
    r"""A-PSGD (AsySG-con): a server applies the gradients of all workers as they come; nobody waits for anybody.

    Of worker ``i``, and of the server when the next ``M`` gradients are there, of whichever workers::

        x_i <- x                                       # a consistent copy, at the end of the call before
        send g_i(x_i)
        x   <- x - learning_rate * (1/M) sum_m g_m     # with your optimizer: momentum, clipping, schedule

    Args:
        gradients: ``M``, per update; the paper's figures have the size of a mini-batch of them. 1 is the plain
            asynchronous SGD that is meant by most who write of it.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        A worker sends a gradient and receives the model in each step. The server receives and sends as much as all
        others together: its link is the limit from some number of workers on. Memory at the server: one buffer for
        each gradient that is being received, and one for the sum where ``M`` is more than 1.
        A lost worker ends the run with `PeerLost`; so does the server. With `OpenStrategy` only the server does: the
        others may be lost, come back and join (`OpenServer`).

    Differences with the paper:
        The mean of ``M`` gradients, where the paper has their sum: its learning rate is ``M`` times smaller.

    References:
        Xiangru Lian, Yijun Huang, Yuncheng Li, Ji Liu. Asynchronous Parallel Stochastic Gradient for Nonconvex
        Optimization. NeurIPS 2015, arXiv:1506.08272.

    Example:
        >>> APSGD().resolved(4)
        APSGD(server='beside', gradients=1)
    """

    gradients: int = 1

    def check(self, trainers: int | None) -> None:
        require_count("APSGD", "gradients", self.gradients)

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        return 1.0

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        return summed(worker, gradient, weight, self.gradients)
