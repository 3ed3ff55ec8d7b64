"""Staleness-aware asynchronous SGD (Zhang et al., 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_decentral.algorithms.server import AbstractServer, require_count, summed
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class StalenessAware(AbstractServer):
    r"""Staleness-aware asynchronous SGD (n-softsync): each gradient has a learning rate divided by its staleness.

    The server collects ``c = workers / softness`` gradients, from whichever workers; ``tau`` is how many updates it has
    made since a gradient's worker got the model::

        x <- x - (1/c) sum_l learning_rate / max(tau_l, 1) * g_l

    Each gradient is scaled before the sum, and your optimizer gets the sum: its momentum comes after it.

    Args:
        softness: the paper's ``n``, from 1 (``c`` is the number of workers: as many gradients as in synchronous SGD,
            and nobody waits) to the number of workers, the default: every gradient is an update of its own. The
            staleness is about as large.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        As `APSGD`: a gradient and a model per step of a worker. Memory at the server: one buffer for the sum, if ``c``
        is more than 1. A lost worker ends the run with `PeerLost`; so does the server. With `OpenStrategy` only the
        server does: the others may be lost, come back and join.

    Differences with the paper:
        None in the rule. The paper's blocking sends bound the staleness; here nothing does.

    References:
        Wei Zhang, Suyog Gupta, Xiangru Lian, Ji Liu. Staleness-aware Async-SGD for Distributed Deep Learning. IJCAI
        2016, arXiv:1511.05950.

    Example:
        >>> StalenessAware().resolved(4), StalenessAware(softness=2).gradients(5)
        (StalenessAware(server='beside', softness=4), 2)
    """

    softness: int | None = None

    def check(self, trainers: int | None) -> None:
        if self.softness is not None:
            require_count("StalenessAware", "softness", self.softness, trainers, ", the number of workers that train")

    def chosen(self, trainers: int) -> dict[str, Any]:
        return {"softness": trainers} if self.softness is None else {}

    def gradients(self, trainers: int) -> int:
        """Tell ``c``, how many gradients an update is made of."""
        if self.softness is None:
            raise ConfigurationError(
                f"{self!r} was asked for its number of gradients, needs the number of workers first. Call "
                "`resolved(workers)`, and use what it returns."
            )
        return max(1, trainers // self.softness)

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        return 1.0 / max(staleness, 1)

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        return summed(worker, gradient, weight, self.gradients(len(worker.state["given"])))
