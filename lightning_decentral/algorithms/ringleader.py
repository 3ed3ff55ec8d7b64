"""Ringleader ASGD (Maranjyan and Richtarik, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_decentral.algorithms.server import AbstractServer, Table
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class Ringleader(AbstractServer):
    r"""Ringleader ASGD: asynchronous SGD for workers with data of their own, of which each counts the same.

    The server keeps ``G_i``, a sum of ``b_i`` gradients of each worker, and goes on in rounds. It collects until every
    ``b_i`` is at least 1; then it makes ``n`` updates, one for each worker whose gradient comes, which is added first::

        x <- x - learning_rate * (1/n) sum_i G_i / b_i

    The gradient that completes the table makes the first of them. A further gradient of a worker that has had its
    update goes into the table of the next round. So a fast worker's gradients are averaged more, and do not count
    more: the method rests at the optimum of the mean of all losses, where A-PSGD weights them with speeds.

    Args:
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        As `APSGD`: a gradient and a model per step of a worker. Memory at the server: two sums of gradients for each
        worker, which is the method, and one buffer for what is applied; an update is a pass over one of these tables.
        Updates are made in turn by all workers, so that there are as many as ``n`` for each gradient of the slowest. A
        lost worker ends the run with `PeerLost`; so does the server. With `OpenStrategy` only the server does: a lost
        worker's gradients leave the mean, and until the first one of a worker that joins is there no update is made.

    Differences with the paper:
        None in the rule. A gradient is at most ``2 n - 2`` updates old, as there.

    References:
        Artavazd Maranjyan, Peter Richtarik. Ringleader ASGD: The First Asynchronous SGD with Optimal Time Complexity
        under Data Heterogeneity. ICLR 2026, arXiv:2509.22860.

    Example:
        >>> Ringleader().resolved(4)
        Ringleader(server='beside')
    """

    by_worker = True

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        return 1.0

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        state, (now, later) = worker.state, self._tables(worker)
        if source in state["served"]:
            later.add(source, gradient)
            return None
        now.add(source, gradient)
        if not all(now.counts.values()):
            return None
        mean = now.mean()
        state["served"].append(source)
        self._end_round(worker, now)
        return mean

    def regroup(self, worker: Worker) -> None:
        state, (now, later) = worker.state, self._tables(worker)
        now.regroup(used=bool(state["served"]))
        later.regroup()
        state["served"] = [rank for rank in state["served"] if rank in now.counts]
        self._end_round(worker, now)

    def _tables(self, worker: Worker) -> tuple[Table, Table]:
        """Return the table of this round, and that of the next one."""
        worker.state.setdefault("served", [])
        side = worker.state.setdefault("side", 0)
        return Table(worker, f"table {side}"), Table(worker, f"table {1 - side}")

    def _end_round(self, worker: Worker, now: Table) -> None:
        """Go over to the next table, if all have had their update."""
        state = worker.state
        if len(state["served"]) == len(now.counts):
            now.clear()
            state.update(served=[], side=1 - state["side"])
