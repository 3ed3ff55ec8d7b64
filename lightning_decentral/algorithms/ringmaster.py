"""Ringmaster ASGD (Maranjyan et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_decentral.algorithms.server import AbstractServer, known_count, require_count
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class Ringmaster(AbstractServer):
    r"""Ringmaster ASGD: as A-PSGD, but a gradient that is too stale is dropped.

    ``tau`` is how many updates the server has made since a gradient's worker got the model::

        x <- x - learning_rate * g   if tau < threshold, else x

    Args:
        threshold: ``R``, at least 1. The analysis has ``max(1, sigma^2 / epsilon)``, the variance of a gradient over
            the accuracy that is wanted, and the published experiments 4 to 6. By default the number of workers that
            train: of equal ones no gradient is dropped. 1 is the SGD of whoever is fastest.
        cancels: whether a gradient of several micro-batches that has become too stale is given up between two of them.
            Its worker asks the server, gets the newest model, and begins anew with the next micro-batch; the batches
            that it has used are used up. Not with several shards, and not with `OpenStrategy`.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        As `APSGD`: a gradient and a model per step of a worker; nothing is kept at the server. With ``k`` micro-batches
        a worker waits ``k - 1`` times in a step for the answer to a message of 16 bytes. A lost worker ends the
        run with `PeerLost`; so does the server. With `OpenStrategy` only the server does: the others may be lost, come
        back and join.

    Differences with the paper:
        The paper's second form stops a worker at once whose gradient will be dropped; here it is stopped between
        micro-batches. Without an accumulation it is the first form, in which such a gradient is finished.

    References:
        Artavazd Maranjyan, Alexander Tyurin, Peter Richtarik. Ringmaster ASGD: The First Asynchronous SGD with Optimal
        Time Complexity. ICML 2025, arXiv:2501.16168.

    Example:
        >>> Ringmaster().resolved(4)
        Ringmaster(server='beside', threshold=4)
    """

    threshold: int | None = None
    cancels: bool = field(default=True, kw_only=True, repr=False)

    @property
    def asks(self) -> bool:
        return self.cancels and self.shards == 1

    def check(self, trainers: int | None) -> None:
        if self.threshold is not None:
            require_count("Ringmaster", "threshold", self.threshold)

    def chosen(self, trainers: int) -> dict[str, Any]:
        return {"threshold": trainers} if self.threshold is None else {}

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        return 1.0 if staleness < known_count(self, self.threshold) else None

    def gives_up(self, state: Mapping[str, Any], staleness: int) -> bool:
        return staleness >= known_count(self, self.threshold)

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        return gradient
