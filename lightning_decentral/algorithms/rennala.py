"""Rennala SGD (Tyurin and Richtarik, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.server import AbstractCollector, known_count, summed
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class Rennala(AbstractCollector):
    r"""Rennala SGD: all compute gradients at the same model, each as many as it can, until there are enough.

    ::

        x(t+1) = x(t) - learning_rate * (1/S) sum over the first S gradients at x(t), of whichever workers

    Nobody waits: who has sent a gradient gets the model as it is, and computes another one. A gradient at an older
    model is dropped and counted. So no gradient is stale, and a fast worker makes more of them.

    Args:
        gradients: ``S``, per update; by default the number of workers that train. The analysis has
            ``max(1, sigma^2 / epsilon)``, the variance of a gradient over the accuracy that is wanted.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        As `APSGD`: a gradient and a model per step of a worker. At most one gradient of each worker is dropped for each
        update: with an ``S`` of several times the number of workers that is little. Memory at the server: one buffer
        for the sum. A lost worker ends the run with `PeerLost`; so does the server. With `OpenStrategy` only the server
        does: the others may be lost, come back and join.

    Differences with the paper:
        None in the rule.

    References:
        Alexander Tyurin, Peter Richtarik. Optimal Time Complexities of Parallel Stochastic Optimization Methods Under a
        Fixed Computation Model. NeurIPS 2023, arXiv:2305.12387.

    Example:
        >>> Rennala().resolved(4)
        Rennala(server='beside', gradients=4)
    """

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        return summed(worker, gradient, weight, known_count(self, self.gradients))
