"""A small sparse problem, and virtual workers that train it by dual coordinates below Lightning."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_decentral.algorithms import ACPD
from lightning_decentral.algorithms.primal_dual import AbstractPrimalDual
from lightning_decentral.flat import AbstractVector, Vector
from lightning_decentral.primal_dual.coordinates import Coordinates, divided
from lightning_decentral.primal_dual.losses import Loss
from lightning_decentral.primal_dual.rows import Rows
from lightning_decentral.protocol import Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.worker import Worker

LAMBDA = 1e-2


def problem(rows: int = 60, features: int = 40, seed: int = 0) -> Rows:
    """Rows of length about 1, of which one in four values is not zero, and two classes with some noise."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((rows, features)) * (rng.random((rows, features)) < 0.25) / np.sqrt(features / 4)
    dense[:, 0] += 0.1
    labels = np.where(dense @ rng.standard_normal(features) + 0.3 * rng.standard_normal(rows) > 0.0, 1.0, -1.0)
    return Rows.of(dense, labels)


NOTES: list[tuple[int, NDArray[np.float64]]] = []


class NotedACPD(ACPD):
    """Notes what a worker is to know at each answer, and what it knows after each of its own steps."""

    def init(self, worker: Worker) -> None:
        super().init(worker)
        worker.state["w"] = worker.x.clone()  # the server's x has its own update for a moment, too

    async def _exchange(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        self._add(worker.state["w"], worker.state["pending"][0], theirs, 1.0 / self._trainers(worker))
        return await super()._exchange(worker, source, theirs)

    def _answer(self, worker: Worker, source: int) -> AbstractVector:
        message = super()._answer(worker, source)
        pending = worker.state["pending"][source - worker.world_size]
        NOTES.append((source, worker.state["w"].clone().add_(pending, alpha=-1.0).buffers[0].numpy()))
        return message

    async def step(self, worker: Worker) -> None:
        await super().step(worker)
        if worker.rank:
            NOTES.append((worker.rank, worker.state["known"].buffers[0].numpy().copy()))


class Fleet:
    """Virtual workers with the dual variables of their own rows.

    Args:
        algorithm: the method.
        rows: of all.
        loss: of a row.
        workers: how many.
        cluster: how fast they are.
        regularization: ``lambda``.
    """

    def __init__(
        self,
        algorithm: AbstractPrimalDual,
        rows: Rows,
        loss: Loss,
        workers: int,
        cluster: Cluster | None = None,
        regularization: float = LAMBDA,
    ) -> None:
        start = [Vector([torch.zeros(rows.features, dtype=torch.float64)]) for _ in range(workers)]
        self.simulator = Simulator(algorithm, start, cluster)
        self.rows, self.algorithm, self.workers, self.regularization = rows, algorithm, workers, regularization
        self.own = [
            Coordinates(rows.some(which), loss, regularization, len(rows), seed=(7, rank))
            for rank, which in enumerate(divided(len(rows), workers, seed=1))
        ]

    @property
    def whole(self) -> NDArray[np.float64]:
        """``w(alpha)``."""
        return np.sum([own.model() for own in self.own], axis=0)

    def gap(self) -> float:
        """The duality gap of the model that is kept."""
        model = self.simulator.consensus().buffers[0].numpy()
        gap = sum(own.gap(model, model) for own in self.own)  # without what w and w(alpha) differ by
        return gap + self.regularization / 2 * float(np.square(model - self.whole).sum())

    def gradient(self, worker: Worker) -> Vector:
        """What a round of dual coordinates takes away from a worker's model."""
        assert isinstance(worker.snapshot, Vector)
        before, own = worker.snapshot.buffers[0].numpy(), self.own[worker.rank]
        after, damping = before.copy(), self.algorithm.damping(self.workers)
        own.ascend(after, self.algorithm.steps(len(own.rows)), damping * self.workers, damping)
        return Vector([torch.from_numpy(before - after)])

    def run(self, steps: int) -> Iterator[Worker]:
        """Train; at each event that changes something beside the dual variables, whose it is."""
        gradients: dict[int, Vector] = {}
        for worker in self.simulator.workers:
            worker.read_gradient = lambda rank=worker.rank: gradients[rank]  # type: ignore[misc]
        for request, worker in self.simulator.demands(steps):
            if isinstance(request, Gradient):
                yield worker
                gradients[worker.rank] = self.gradient(worker)
            else:
                worker.x.add_(gradients[worker.rank], alpha=-1.0)


def cocoa_plus(rows: Rows, parts: list[NDArray[np.int64]], gamma: float) -> Iterator[NDArray[np.float64]]:
    """CoCoA+ for least squares as its paper writes it, on a dense matrix: the models after each round."""
    dense, count, sigma = rows.tensor().to_dense().numpy(), len(rows), gamma * len(parts)
    duals, model, scale, number = np.zeros(count), np.zeros(rows.features), 1.0 / (LAMBDA * count), 0
    while True:
        changes = np.zeros(count)
        for rank, part in enumerate(parts):
            own = model.copy()
            for i in part[np.random.default_rng([7, rank, number]).permutation(len(part))]:
                rest = rows.targets[i] - dense[i] @ own - duals[i] - changes[i]
                step = rest / (1.0 + sigma * scale * dense[i] @ dense[i])
                changes[i] += step
                own += sigma * scale * step * dense[i]
        duals += gamma * changes
        model = model + gamma * scale * changes @ dense
        number += 1
        yield model


def cocoa(rows: Rows, parts: list[NDArray[np.int64]]) -> Iterator[NDArray[np.float64]]:
    """CoCoA: the mean of what all have changed as if each were alone, which is CoCoA+ at 1/K."""
    yield from cocoa_plus(rows, parts, 1.0 / len(parts))
