"""Synchronous SGD with backup workers (Chen et al., 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_decentral.algorithms.server import AbstractServer, known_count, require_count, summed
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class BackupWorkers(AbstractServer):
    r"""Synchronous SGD with backup workers: each step takes the first ``N`` of ``N + b`` gradients, and drops the rest.

    ::

        x(t+1) = x(t) - learning_rate * (1/N) sum over the first N of g_i(x(t))

    All begin step ``t`` at ``x(t)``. Who is among the first waits for ``x(t+1)``; who comes later is dropped and
    counted, and gets the newest model at once. No gradient is stale.

    Args:
        needed: ``N``; by default all but a twenty-fifth of the workers, at least one, as in the paper (96 of 100).
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        As `APSGD`: a gradient and a model per step of a worker. A step takes as long as its ``N``-th fastest gradient.
        Memory at the server: one buffer for the sum. A lost worker ends the run with `PeerLost`; so does the server.
        With `OpenStrategy` only the server does: a step takes the first ``N`` of those that are there, or all of them
        while there are fewer.

    Differences with the paper:
        Gradients that have come for a step that is not complete when an epoch ends count in the next one.

    References:
        Jianmin Chen, Xinghao Pan, Rajat Monga, Samy Bengio, Rafal Jozefowicz. Revisiting Distributed Synchronous SGD.
        2016, arXiv:1604.00981.

    Example:
        >>> BackupWorkers().resolved(8)
        BackupWorkers(server='beside', needed=7)
    """

    needed: int | None = None

    def check(self, trainers: int | None) -> None:
        if self.needed is not None:
            require_count("BackupWorkers", "needed", self.needed, trainers, ", the number of workers that train")

    def chosen(self, trainers: int) -> dict[str, Any]:
        return {"needed": max(1, trainers - max(1, trainers // 25))} if self.needed is None else {}

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        return 1.0 if staleness == 0 else None

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        return summed(worker, gradient, weight, self._needed(worker.state))

    def answers(self, state: Mapping[str, Any], source: int) -> bool:
        version: int = state["version"]
        given: int = state["given"].get(source, -1)  # one that is lost waits no more
        return version > given

    def is_due(self, state: Mapping[str, Any]) -> bool:
        heard: int = state["heard"]
        return heard >= self._needed(state)

    def _needed(self, state: Mapping[str, Any]) -> int:
        """Return of how many gradients a step is: of all, where fewer workers are there than are needed."""
        return min(known_count(self, self.needed), len(state["given"]))
