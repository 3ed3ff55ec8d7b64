"""The task of simulated claims about linear models: rows that virtual workers train by dual coordinates, or by SGD.

The simulator tells how long it would have taken. Steps are real; how long a pass over a worker's rows takes is given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lightning_decentral.algorithms.primal_dual import AbstractPrimalDual
from lightning_decentral.flat import Vector
from lightning_decentral.lab.claims.claim import Curve
from lightning_decentral.primal_dual import Coordinates, Loss, Rows
from lightning_decentral.primal_dual.coordinates import divided
from lightning_decentral.primal_dual.rows import Numbers
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.worker import Worker

LOSS = Loss("logistic")
_LATENCY_SECONDS = 1e-3


@functools.cache
def rows_of(data: str) -> Rows:
    """Return rows by name.

    Args:
        data: ``"text"``, long speeches of Shakespeare in TF-IDF; ``"pairs"``, with pairs of neighbouring words; or
            ``"sparse"``, 100,000 features.
    """
    if data in ("text", "pairs"):
        from lightning_decentral.recipes.speeches import speeches

        return Rows.of(*speeches(pairs=data == "pairs", fewest_words=60), empty=True)
    rng, size, features, values = np.random.default_rng(0), 4000, 100_000, 50
    often = 1.0 / np.arange(1, features + 1) ** 0.7  # as words are: few of them are frequent
    columns = np.sort(rng.choice(features, (size, values), p=often / often.sum()), axis=1)
    numbers = torch.from_numpy(rng.standard_normal((size, values)) / values**0.5).ravel()
    places = torch.stack([torch.arange(size).repeat_interleave(values), torch.from_numpy(columns.ravel())])
    rows = Rows.of(torch.sparse_coo_tensor(places, numbers, (size, features)).coalesce(), np.ones(size))
    scores = rows.scores(rng.standard_normal(features)) + 0.1 * rng.standard_normal(size)
    rows.targets[:] = np.where(scores > 0.0, 1.0, -1.0)
    return rows


def cluster(workers: int, seconds: float, slowdown: float, mbit: float) -> Cluster:
    """Make a cluster whose last worker is slower.

    Args:
        workers: how many.
        seconds: of a step of the others.
        slowdown: of the last one.
        mbit: Mbit/s of every link.
    """
    return Cluster(
        compute_seconds=seconds,
        jitter="lognormal",
        jitter_scale=0.1,
        bandwidth_bytes_per_second=mbit * 125e3,
        latency_seconds=_LATENCY_SECONDS,
        slowdown={workers - 1: slowdown},
    )


class Fleet:
    """Virtual workers with the rows of each.

    Args:
        method: by which they train.
        rows: of all.
        regularization: ``lambda``.
        where: how fast they are.
        workers: how many.
        seed: of the division of the rows, their order, and the times.
        shares: how many rows each has; ``None``: equally many.
    """

    def __init__(
        self,
        method: AbstractAlgorithm,
        rows: Rows,
        regularization: float,
        where: Cluster,
        workers: int,
        seed: int,
        shares: tuple[float, ...] | None = None,
    ) -> None:
        start = [Vector([torch.zeros(rows.features, dtype=torch.float64)]) for _ in range(workers)]
        self.simulator = Simulator(method, start, where, seed)
        self.method, self.rows, self.regularization = method, rows, regularization
        self.own = [
            Coordinates(rows.some(part), LOSS, regularization, len(rows), (seed, rank))
            for rank, part in enumerate(divided(len(rows), workers, seed, shares))
        ]
        self._random = np.random.default_rng(seed)

    def ascend(self, worker: Worker, share: float) -> Numbers:
        """Take steps in a share of a worker's coordinates; returns what they take away from its model."""
        assert isinstance(self.method, AbstractPrimalDual)
        before, own, workers = _numbers(worker.snapshot), self.own[worker.rank], len(self.own)
        after, damping = before.copy(), self.method.damping(len(self.own))
        own.ascend(after, max(1, round(share * len(own.rows))), damping * workers, damping)
        return before - after

    def gradient(self, worker: Worker, share: float) -> Numbers:
        """Return the gradient of the objective on a share of a worker's rows."""
        model, own = _numbers(worker.snapshot), self.own[worker.rank]
        chosen = self._random.choice(len(own.rows), max(1, round(share * len(own.rows))), replace=False)
        some = own.rows.some(chosen)
        slopes = -some.targets / (1.0 + np.exp(some.targets * some.scores(model)))
        return some.combined(slopes / len(some)) + self.regularization * model

    def gap(self) -> float:
        """Return the duality gap of the server's model."""
        model = _numbers(self.simulator.workers[0].x)
        whole = np.sum([own.model() for own in self.own], axis=0)
        parts = sum(float(LOSS.gaps(own.rows.scores(model), own.duals, own.rows.targets).sum()) for own in self.own)
        return parts / len(self.rows) + self.regularization / 2 * float(np.square(model - whole).sum())

    def primal(self) -> float:
        """Return the objective of the server's model."""
        model = _numbers(self.simulator.workers[0].x)
        losses = float(LOSS.values(self.rows.scores(model), self.rows.targets).sum()) / len(self.rows)
        return losses + self.regularization / 2 * float(np.square(model).sum())

    def run(
        self, gradient: Callable[[Worker], Numbers], rate: float, distance: Callable[[], float]
    ) -> Iterator[dict[str, float]]:
        """Train; measure after as many steps as there are workers, and ever less often.

        Args:
            gradient: of a worker's step.
            rate: by which it is multiplied.
            distance: what is measured.
        """
        found: dict[int, Vector] = {}
        for worker in self.simulator.workers:
            worker.read_gradient = functools.partial(found.__getitem__, worker.rank)
        count, due = 0, len(self.own)
        for request, worker in self.simulator.demands():
            if isinstance(request, Gradient):
                if count >= due:
                    due = count + max(len(self.own), count // 30)
                    sent = sum(each.bytes_sent for each in self.simulator.traffic)
                    left = distance()
                    yield {
                        "gradients": float(count),
                        "seconds": self.simulator.seconds,
                        "megabytes": sent / len(self.own) / 1e6,
                        "gap": left,
                        "digits": -math.log10(max(left, 1e-16)),
                    }
                count += 1
                found[worker.rank] = Vector([torch.from_numpy(gradient(worker))])
            else:
                direction = worker.gradient if request.gradient is None else request.gradient
                request.target(worker).add_(direction, alpha=-rate)


def _numbers(vector: object) -> Numbers:
    assert isinstance(vector, Vector)
    numbers: Numbers = vector.buffers[0].numpy()
    return numbers


@dataclass(frozen=True)
class Linear:
    """A run of a primal-dual method to a small duality gap.

    Args:
        method: makes it.
        slowdown: of the last worker.
        by_speed: whether the slow worker has fewer rows by as much; otherwise all have equally many.
        data: see `rows_of`.
        workers: how many.
        pass_seconds: that a worker which is not slow needs for a pass over its rows, where all have equally many.
        mbit: Mbit/s of every link.
        gap: at which it ends.
        steps: of all workers, at which it ends in any case.

    A call takes the share of its rows in whose coordinates a worker takes a step between two exchanges (it is tuned, as
    a learning rate is elsewhere), and a seed. It returns what was measured: ``gradients``, which are exchanges of all
    workers, ``seconds`` of the virtual clock, ``megabytes`` that one worker has sent on average, the ``gap``, and its
    ``digits``, -log10 of it.
    """

    method: Callable[[], AbstractPrimalDual]
    slowdown: float = 1.0
    by_speed: bool = False
    data: str = "text"
    workers: int = 4
    pass_seconds: float = 0.5
    mbit: float = 20.0
    gap: float = 1e-4
    steps: int = 4000

    def __call__(self, share: float, seed: int) -> Curve:
        return list(self.points(share, seed))

    def points(self, share: float, seed: int) -> Iterator[dict[str, float]]:
        """Measure, until the gap is small."""
        rows = rows_of(self.data)
        seconds, slowdown, shares = share * self.pass_seconds, self.slowdown, None
        if self.by_speed:  # all need as long for a pass over their rows: the faster ones have more of them
            shares = (slowdown,) * (self.workers - 1) + (1.0,)
            seconds, slowdown = seconds * self.workers * slowdown / sum(shares), 1.0
        where = cluster(self.workers, seconds, slowdown, self.mbit)
        fleet = Fleet(self.method(), rows, 1.0 / len(rows), where, self.workers, seed, shares)
        for point in fleet.run(lambda worker: fleet.ascend(worker, share), 1.0, fleet.gap):
            yield point
            if point["gap"] <= self.gap or point["gradients"] >= self.steps:
                return
