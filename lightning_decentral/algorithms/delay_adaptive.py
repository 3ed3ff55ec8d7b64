"""Delay-adaptive asynchronous SGD (Mishchenko et al., 2022; Koloskova et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_decentral.algorithms.server import AbstractServer
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class DelayAdaptive(AbstractServer):
    r"""Delay-adaptive asynchronous SGD: a gradient that is staler than usual has a smaller learning rate.

    ``n`` workers train; ``tau`` is how many updates the server has made since a gradient's worker got the model::

        x <- x - learning_rate * min(1, n / tau) * g

    Of equal workers every gradient is about ``n`` updates old, and counts in full. So the learning rate has to fit the
    number of workers, and not the slowest of them.

    Args:
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        As `APSGD`: a gradient and a model per step of a worker; nothing is kept at the server. A lost worker ends the
        run with `PeerLost`; so does the server. With `OpenStrategy` only the server does: the others may be lost, come
        back and join.

    Differences with the papers:
        The rule of the first one. In the second a gradient that is too stale may be dropped instead: see `Ringmaster`.

    References:
        Konstantin Mishchenko, Francis Bach, Mathieu Even, Blake Woodworth. Asynchronous SGD Beats Minibatch SGD Under
        Arbitrary Delays. NeurIPS 2022, arXiv:2206.07638.
        Anastasia Koloskova, Sebastian U. Stich, Martin Jaggi. Sharper Convergence Guarantees for Asynchronous SGD for
        Distributed and Federated Learning. NeurIPS 2022, arXiv:2206.08307.

    Example:
        >>> DelayAdaptive().resolved(4)
        DelayAdaptive(server='beside')
    """

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        trainers = len(state["given"])
        return trainers / max(trainers, staleness)

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        return gradient if weight == 1.0 else gradient.mul_(weight)
