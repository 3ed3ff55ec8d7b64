"""Stale-synchronous parallel SGD (Ho et al., 2013)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_decentral.algorithms.server import AbstractServer
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class StaleSynchronous(AbstractServer):
    r"""Stale-synchronous SGD: as A-PSGD, but nobody gets more than a bound ahead of the slowest worker.

    ``c_i`` counts the gradients of worker ``i``::

        x <- x - learning_rate * g                     # as each one comes
        answer worker i once c_i <= bound + min_j c_j

    Args:
        bound: gradients by which a worker may be ahead, at least 0. 0: all wait for the slowest in each step, and every
            gradient is an update of its own.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        As `APSGD`: a gradient and a model per step of a worker; nothing is kept at the server. In the long run all are
        as fast as the slowest worker: the bound absorbs delays that come and go. A lost worker ends the run with
        `PeerLost`; so does the server. With `OpenStrategy` only the server does: the bound is over those that are
        there, and who joins begins level with the slowest.

    Differences with the paper:
        A worker whose bound is reached waits for the model. In the paper it may go on with the part that it has cached.

    References:
        Qirong Ho, James Cipar, Henggang Cui, Jin Kyu Kim, Seunghak Lee, Phillip B. Gibbons, Garth A. Gibson, Gregory R.
        Ganger, Eric P. Xing. More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server.
        NeurIPS 2013.

    Example:
        >>> StaleSynchronous(bound=4).resolved(4)
        StaleSynchronous(server='beside', bound=4)
    """

    bound: int = 2

    def check(self, trainers: int | None) -> None:
        if not isinstance(self.bound, int) or isinstance(self.bound, bool) or self.bound < 0:
            raise ConfigurationError(
                f"StaleSynchronous(bound={self.bound!r}): needs a whole number of at least 0. Leave it out for the "
                "default."
            )

    def init(self, worker: Worker) -> None:
        super().init(worker)
        if "given" in worker.state:
            self.regroup(worker)

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        return 1.0

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        clocks = worker.state["clocks"]
        clocks.setdefault(source, min(clocks.values(), default=0))
        clocks[source] += 1
        return gradient

    def answers(self, state: Mapping[str, Any], source: int) -> bool:
        if state["busy"]:
            return False  # the gradient that has moved the slowest clock is not in the model yet
        clocks: dict[int, int] = state["clocks"]
        return source not in clocks or clocks[source] <= self.bound + min(clocks.values())

    def regroup(self, worker: Worker) -> None:
        """Let the clock of a lost worker hold up nobody; one that has joined begins with the slowest."""
        state = worker.state
        there = {rank: clock for rank, clock in state.get("clocks", {}).items() if rank in state["given"]}
        least = min(there.values(), default=0)
        state["clocks"] = {rank: there.get(rank, least) for rank in state["given"]}
