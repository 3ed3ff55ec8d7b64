"""Linear models on unequal workers: seconds and bytes to a duality gap of 1e-4, by ACPD, CoCoA+ and SGD.

    python -m lightning_decentral.lab.benchmarks.primal_dual [--seeds 5] [--workers 4] [--mbit 20]
    python -m lightning_decentral.lab.benchmarks.primal_dual --speed

The data are speeches of Shakespeare (`recipes.speeches`), logistic loss, in the simulator. How long a pass over a
worker's rows takes is measured on this machine at the beginning; each link has ``--mbit``. One worker is slower. The
gap is that of worker 0's model, looked at after as many steps as there are workers. SGD has batches of a hundredth of a
worker's rows and the best of three learning rates, and has to come within 1e-4 of the optimum.

``--speed`` compares the coordinate steps with scikit-learn's liblinear: sparse rows, 100,000 x 100,000 with 50 values
each, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from lightning_decentral.algorithms import ACPD, APSGD, CoCoAPlus, SyncSGD
from lightning_decentral.flat import Vector
from lightning_decentral.lab.benchmarks.report import spread
from lightning_decentral.primal_dual import Coordinates, Loss, Rows
from lightning_decentral.primal_dual.coordinates import divided
from lightning_decentral.protocol import Gradient
from lightning_decentral.recipes.speeches import speeches
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator

GAP, LOSS = 1e-4, Loss("logistic")


def rows_of_speeches() -> Rows:
    return Rows.of(*speeches(), empty=True)


class Fleet:
    """Virtual workers with the rows of each."""

    def __init__(self, method, rows, regularization, workers, cluster, seed):
        start = [Vector([torch.zeros(rows.features, dtype=torch.float64)]) for _ in range(workers)]
        self.simulator = Simulator(method, start, cluster, seed)
        self.regularization, self.rows, self.method = regularization, rows, method
        parts = divided(len(rows), workers, seed)
        self.own = [
            Coordinates(rows.some(part), LOSS, regularization, len(rows), (seed, k)) for k, part in enumerate(parts)
        ]
        self.random = np.random.default_rng(seed)

    def primal_dual(self, worker):
        before, own = worker.snapshot.buffers[0].numpy(), self.own[worker.rank]
        after, workers = before.copy(), len(self.own)
        damping = self.method.damping(workers)
        own.ascend(after, len(own.rows), damping * workers, damping)
        return Vector([torch.from_numpy(before - after)])

    def sgd(self, worker):
        model, own = worker.snapshot.buffers[0].numpy(), self.own[worker.rank]
        size = len(own.rows)
        some = own.rows.some(self.random.choice(size, max(1, size // 100), replace=False))
        slopes = -some.targets / (1.0 + np.exp(some.targets * some.scores(model)))
        return Vector([torch.from_numpy(some.combined(slopes / len(some)) + self.regularization * model)])

    def gap(self):
        model = self.simulator.workers[0].x.buffers[0].numpy()
        whole = sum(own.model() for own in self.own)
        gaps = sum(LOSS.gaps(own.rows.scores(model), own.duals, own.rows.targets).sum() for own in self.own)
        return gaps / len(self.rows) + self.regularization / 2 * np.square(model - whole).sum()

    def above(self, optimum):
        model = self.simulator.workers[0].x.buffers[0].numpy()
        losses = sum(LOSS.values(own.rows.scores(model), own.rows.targets).sum() for own in self.own)
        return losses / len(self.rows) + self.regularization / 2 * np.square(model).sum() - optimum

    def run(self, gradient, rate, distance, every, most):
        """Seconds and bytes until the distance is small; nothing if it is not after ``most`` steps of all."""
        found, count = {}, 0
        for worker in self.simulator.workers:
            worker.read_gradient = lambda rank=worker.rank: found[rank]
        for request, worker in self.simulator.demands():
            if isinstance(request, Gradient):
                if count and count % every == 0 and distance() <= GAP:
                    sent = sum(traffic.bytes_sent for traffic in self.simulator.traffic)
                    return self.simulator.seconds, sent, count
                if count >= most:
                    return None
                count += 1
                found[worker.rank] = gradient(worker)
            else:
                target = worker.x if request.at is None else request.at
                target.add_(worker.gradient if request.gradient is None else request.gradient, alpha=-rate)
        return None


def race(options):
    rows = rows_of_speeches()
    regularization = 1.0 / len(rows)
    workers = options.workers
    own = Coordinates(rows.some(divided(len(rows), workers)[0]), LOSS, regularization, len(rows))
    model, passes = np.zeros(rows.features), []
    for _ in range(6):
        began = time.process_time()
        own.ascend(model, len(own.rows))
        passes.append(time.process_time() - began)
    seconds = statistics.median(passes[1:])
    alone, model = Coordinates(rows, LOSS, regularization, len(rows)), np.zeros(rows.features)
    while alone.gap(model) > 1e-8:
        alone.ascend(model, 5 * len(rows))
    optimum = alone.primal(model)
    print(
        f"{len(rows)} speeches, {rows.features} features, {len(rows.values)} values, lambda = 1 / speeches; "
        f"a pass over a worker's rows takes {seconds * 1e3:.1f} ms; {workers} workers, {options.mbit} Mbit/s.\n"
    )
    methods = {
        "ACPD": ACPD(group=workers - 1, max_delay=20, ratio=0.01),
        "CoCoA+": CoCoAPlus(),
        "synchronous SGD": SyncSGD(),
        "A-PSGD": APSGD(),
    }
    rates = {}
    print("| contender | slowest worker | seconds to 1e-4 | MB to 1e-4 | steps of all | seeds that reach it |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, method in methods.items():
        dual = name in ("ACPD", "CoCoA+")
        for slowdown in (1.0, 4.0, 10.0):
            results = []
            for seed in range(options.seeds):
                compute = seconds if dual else seconds / 100
                cluster = Cluster(
                    compute_seconds=compute,
                    jitter="lognormal",
                    jitter_scale=0.1,
                    bandwidth_bytes_per_second=options.mbit * 125e3,
                    latency_seconds=1e-3,
                    slowdown={workers - 1: slowdown},
                )

                def attempt(rate, method=method, cluster=cluster, seed=seed, dual=dual):
                    fleet = Fleet(method, rows, regularization, workers, cluster, seed)
                    if dual:
                        return fleet.run(fleet.primal_dual, 1.0, fleet.gap, workers, 4000)
                    return fleet.run(fleet.sgd, rate, lambda: fleet.above(optimum), 50 * workers, 6000)

                if not dual and name not in rates:  # chosen once, without a straggler
                    tried = {rate: attempt(rate) for rate in (4.0, 16.0, 64.0)}
                    rates[name] = min(tried, key=lambda rate: tried[rate][2] if tried[rate] else 10**9)
                results.append(attempt(rates.get(name, 1.0)))
            reached = [result for result in results if result]
            cells = ["-", "-", "-"]
            if reached:
                cells = [
                    spread([result[0] for result in reached], ".2f"),
                    spread([result[1] / 1e6 for result in reached], ".1f"),
                    spread([result[2] for result in reached], ".0f"),
                ]
            slowest = "as the others" if slowdown == 1.0 else f"{slowdown:g} times slower"
            print(f"| {name} | {slowest} | {' | '.join(cells)} | {len(reached)} of {options.seeds} |", flush=True)


def speed(options):
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    random, size, values = np.random.default_rng(0), 100_000, 50
    columns = np.sort(random.integers(0, size, (size, values)), axis=1)
    numbers = torch.from_numpy(random.standard_normal((size, values)) / values**0.5)
    rows_at = torch.arange(size).repeat_interleave(values)
    matrix = torch.sparse_coo_tensor(
        torch.stack([rows_at, torch.from_numpy(columns.ravel())]), numbers.ravel(), (size, size)
    ).coalesce()
    rows = Rows.of(matrix, np.ones(size))
    rows.targets[:] = np.sign(rows.scores(random.standard_normal(size)))
    from scipy.sparse import csr_matrix

    theirs = csr_matrix((rows.values, rows.columns, rows.starts), shape=(size, size))
    print("| loss | passes per second, ours | liblinear | ratio |\n| --- | --- | --- | --- |")
    for name in ("logistic", "hinge"):
        mine, others = [], []
        Coordinates(rows, Loss(name), 1 / size, size).ascend(np.zeros(size), 10)
        for _ in range(options.seeds):
            own, model = Coordinates(rows, Loss(name), 1 / size, size), np.zeros(size)
            began = time.process_time()
            own.ascend(model, 5 * size)
            mine.append(5 / (time.process_time() - began))
            taken = []
            for passes in (6, 1):
                kind = {"fit_intercept": False, "tol": 1e-12, "max_iter": passes}
                solver = (
                    LogisticRegression(solver="liblinear", dual=True, **kind)
                    if name == "logistic"
                    else LinearSVC(loss="hinge", **kind)
                )
                began = time.process_time()
                solver.fit(theirs, rows.targets)
                taken.append(time.process_time() - began)
            others.append(5 / (taken[0] - taken[1]))
        ratios = [one / other for one, other in zip(mine, others, strict=True)]
        print(f"| {name} | {spread(mine, '.2f')} | {spread(others, '.2f')} | {spread(ratios, '.2f')} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="repetitions (default %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--mbit", type=float, default=20.0, help="of each link (default %(default)s)")
    parser.add_argument("--speed", action="store_true", help="compare the steps with liblinear")
    options = parser.parse_args()
    import warnings

    warnings.filterwarnings("ignore")  # liblinear has not converged, as it was told
    speed(options) if options.speed else race(options)


if __name__ == "__main__":
    main()
