"""Malenia SGD (Tyurin and Richtarik, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.algorithms.server import AbstractCollector, Table, known_count
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class Malenia(AbstractCollector):
    r"""Malenia SGD: Rennala SGD for workers with data of their own, of which each counts the same.

    All compute gradients at the same model, each as many as it can: ``B_i`` of worker ``i``, at least one. Once their
    harmonic mean is large enough the server makes an update::

        x(t+1) = x(t) - learning_rate * (1/n) sum_i (1/B_i) sum_j g_ij   when 1 / mean_i(1/B_i) >= S / n

    A gradient at an older model is dropped and counted.

    Args:
        gradients: ``S``, as for `Rennala`; by default the number of workers that train, ``n``: the update is made when
            everybody has sent a gradient.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        shards: over so many servers, the first workers, the model is divided; 1 by default. Each of them decides about
            its own shard of a gradient: see `AbstractServer`.
        compressor: of gradients, with error feedback: any contraction with messages of fixed size, as ``TopK(0.01)``.
            ``None``: they are sent as they are.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Cost:
        As `APSGD`: a gradient and a model per step of a worker. An update waits for the slowest worker. Memory at the
        server: a sum of gradients of each worker, and one buffer for what is applied. A lost worker ends the run with
        `PeerLost`; so does the server. With `OpenStrategy` only the server does: the mean is over those that are there,
        and the gradients of a lost one that no update had are dropped.

    Differences with the paper:
        The harmonic mean has to be as large as ``S / n``; in the paper it has to be larger. With ``S = n`` one gradient
        of each worker is enough then.

    References:
        Alexander Tyurin, Peter Richtarik. Optimal Time Complexities of Parallel Stochastic Optimization Methods Under a
        Fixed Computation Model. NeurIPS 2023, arXiv:2305.12387.

    Example:
        >>> Malenia().resolved(4)
        Malenia(server='beside', gradients=4)
    """

    by_worker = True

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        needed = known_count(self, self.gradients)
        table = Table(worker, "table")
        table.add(source, gradient)
        counts = table.counts.values()
        worker.state["heard"] = sum(counts)
        workers = len(counts)
        if not all(counts) or workers / sum(1 / count for count in counts) < needed / workers:
            return None
        mean = table.mean()
        table.clear()
        worker.state["heard"] = 0
        return mean

    def regroup(self, worker: Worker) -> None:
        Table(worker, "table").regroup()
