"""Linear models on unequal workers: seconds and bytes to a duality gap of 1e-4, by ACPD, CoCoA+ and SGD.

    python -m lightning_decentral.lab.benchmarks.primal_dual [--seeds 5] [--data text|sparse] [--pass-seconds 0.5]
    python -m lightning_decentral.lab.benchmarks.primal_dual --sgd
    python -m lightning_decentral.lab.benchmarks.primal_dual --emulated equal|slow|by_speed
    python -m lightning_decentral.lab.benchmarks.primal_dual --speed
    python -m lightning_decentral.lab.benchmarks.primal_dual --memory

The data are long speeches of Shakespeare in TF-IDF, or rows with 50 of 100,000 features; logistic loss, lambda = 1 /
rows; in the simulator. The last worker is slower; each has as many rows as the others, or rows by its speed. How long a
pass over the rows of a worker takes is given: these sets are small, and stand for larger ones. The gap is that of the
model of worker 0.

ACPD and CoCoA+ are tuned with the seed 0 for equal workers: steps between two exchanges and, of ACPD, how much
travels and how many workers are a group. With ``--sgd`` SGD runs: its batches and learning rates are tuned likewise,
and it has to come within 1e-4 of the optimum.

``--emulated`` runs ``recipes/linear``, from a clone, as root: real processes on four emulated hosts with links of
20 Mbit/s, where a step in a tenth of the rows is a sleep of half a second, ten times as long as the recipe has it: so
that evaluations are a small part. They are equal; or one is 10 times slower, with equal rows or rows by speed.

``--speed`` compares the coordinate steps with scikit-learn's liblinear: sparse rows, 100,000 x 100,000 with 50 values
each, in turn. ``--memory`` counts vectors and bytes.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback

from lightning_decentral.algorithms import ACPD, APSGD, CoCoAPlus, SyncSGD
from lightning_decentral.flat import Vector
from lightning_decentral.lab.benchmarks.report import spread
from lightning_decentral.lab.claims.linear import LOSS, Fleet, Linear, cluster, rows_of
from lightning_decentral.primal_dual import Coordinates, Loss, Rows
from lightning_decentral.simulation.cluster import Cluster

GAP = 1e-4
SHARES = (0.1, 0.3)  # of a worker's rows, between two exchanges
ACPD_GRID = list(itertools.product((1, 3), (0.1, 0.01)))  # group, ratio
PLACES = ((1.0, False), (10.0, True), (4.0, True), (10.0, False), (4.0, False))  # slowdown; rows by speed
SGD_GRID = list(itertools.product((1.0, 0.3, 0.1), (256.0, 128.0, 64.0, 512.0)))  # of a worker's rows; rate
SGD_STEPS = 800  # of all workers


def ended(points, most=float("inf")):
    """Return the last point of a run that reaches the gap; nothing, if it does not, or takes longer."""
    for point in points:
        if point["gap"] <= GAP:
            return point
        if point["seconds"] > most:
            break
    return None


def quickest(tries):
    """Return the options with the fewest seconds, of pairs of options and a function that runs with them."""
    best, seconds = None, float("inf")
    for options, attempt in tries:
        found = ended(attempt(), seconds)
        if found is not None and found["seconds"] < seconds:
            best, seconds = options, found["seconds"]
    return best


def row(name, slowdown, by_speed, options, results, seeds):
    slowest = "as the others" if slowdown == 1.0 else f"{slowdown:g} times slower"
    rows = "by speed" if by_speed else "equal"
    reached = [result for result in results if result]
    cells = ["-"] * 3
    if reached:
        cells = [
            spread([result["seconds"] for result in reached], ".2f"),
            spread([result["megabytes"] for result in reached], ".2f"),
            spread([result["gradients"] for result in reached], ".0f"),
        ]
    print(f"| {name} | {slowest} | {rows} | {options} | {' | '.join(cells)} | {len(reached)} of {seeds} |", flush=True)


def race(options):
    rows, workers = rows_of(options.data), options.workers
    model = np.zeros(rows.features)
    alone = Coordinates(rows, LOSS, 1.0 / len(rows), len(rows))
    passes = []
    while (gap := alone.gap(model)) > 1e-8:
        began = time.process_time()
        alone.ascend(model, len(rows))
        passes.append((time.process_time() - began, gap))
    optimum, needed = alone.primal(model), sum(gap > GAP for _, gap in passes)
    print(
        f"{len(rows)} rows, {rows.features} features, {len(rows.values)} values, lambda = 1 / rows. One worker alone "
        f"needs {needed} passes to a gap of 1e-4, of {statistics.median(one for one, _ in passes) * 1e3:.1f} ms here. "
        f"{workers} workers, {options.mbit:g} Mbit/s, 1 ms; a pass over a worker's rows takes "
        f"{options.pass_seconds:g} s."
        "\n"
    )
    print("| contender | slowest worker | rows | tuned | seconds to 1e-4 | MB of a worker | steps of all | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    (sgd if options.sgd else dual)(options, rows, optimum)


def dual(options, rows, optimum):
    grids = {
        "ACPD": [
            (f"steps {share:g}, group {group}, ratio {ratio:g}", functools.partial(ACPD, group, 20, ratio), share)
            for (group, ratio), share in itertools.product(ACPD_GRID, SHARES)
        ],
        "CoCoA+": [(f"steps {share:g}", CoCoAPlus, share) for share in SHARES],
    }
    for name, grid in grids.items():
        best = None
        for slowdown, by_speed in PLACES:
            task = functools.partial(
                Linear,
                slowdown=slowdown,
                by_speed=by_speed,
                data=options.data,
                workers=options.workers,
                pass_seconds=options.pass_seconds,
                mbit=options.mbit,
            )
            if slowdown == 1.0:
                best = quickest((one, functools.partial(task(one[1]).points, one[2], 0)) for one in grid)
            if best is None:
                row(name, slowdown, by_speed, "-", [], options.seeds)
                continue
            words, method, share = best
            results = [ended(task(method).points(share, seed)) for seed in range(1, options.seeds + 1)]
            row(name, slowdown, by_speed, words, results, options.seeds)


def sgd(options, rows, optimum):
    workers = options.workers

    def points(method, slowdown, share, rate, seed):
        where = cluster(workers, share * options.pass_seconds, slowdown, options.mbit)
        fleet = Fleet(method, rows, 1.0 / len(rows), where, workers, seed)
        run = fleet.run(lambda worker: fleet.gradient(worker, share), rate, lambda: fleet.primal() - optimum)
        return itertools.takewhile(lambda point: point["gradients"] < SGD_STEPS and point["gap"] < 1.0, run)

    for name, method in {"synchronous SGD": SyncSGD(), "A-PSGD": APSGD()}.items():
        tries = ((choice, functools.partial(points, method, 1.0, *choice, 0)) for choice in SGD_GRID)
        best = quickest(tries)
        words = "-" if best is None else f"batch {best[0]:g}, rate {best[1]:g}"
        for slowdown in (1.0, 10.0, 4.0):
            seeds = range(1, options.seeds + 1) if best else ()
            results = [ended(points(method, slowdown, *best, seed)) for seed in seeds]
            row(name, slowdown, False, words, results, options.seeds)
    print(f"\n`-`: not within {SGD_STEPS} steps of all workers.")


class Clock(Callback):
    """Logs the seconds since training began at each evaluation."""

    def on_train_start(self, trainer, pl_module):
        self._began = time.monotonic()

    def on_validation_epoch_end(self, trainer, pl_module):
        seconds = torch.tensor(time.monotonic() - self._began, dtype=torch.float64)
        pl_module.log("seconds", seconds, batch_size=1, sync_dist=True)


def longer_steps(folder):
    """Write the recipe's callbacks with longer steps, and a clock, into a file of settings; return its path."""
    callbacks = yaml.safe_load(Path("recipes/linear/base.yaml").read_text())["trainer"]["callbacks"]
    (slowed,) = (each for each in callbacks if each["class_path"].endswith(".RowSeconds"))
    slowed["init_args"]["seconds"] *= 10.0
    callbacks.append({"class_path": "lightning_decentral.lab.benchmarks.primal_dual.Clock"})  # not of __main__
    (folder / "longer_steps.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return folder / "longer_steps.yaml"


def emulated(options):
    """Run the recipe; seconds and bytes are those of the first evaluation at which the gap is small enough."""
    slow = () if options.emulated == "equal" else ("--host", "3:slowdown=10")
    by_speed = ("-c", "recipes/linear/by_speed.yaml") if options.emulated == "by_speed" else ()
    print("| contender | seconds to 1e-4 | MB of a worker | passes over all rows | runs |")
    print("| --- | --- | --- | --- | --- |")
    for name, method in (("ACPD", "acpd"), ("CoCoA+", "cocoa_plus")):
        results = []
        for _ in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                own = [sys.executable, "-m", "lightning_decentral"]
                hosts = ["emulate", "--hosts", "4", "--rate", f"{options.mbit:g}mbit", *slow]
                hosts += ["--timeout", "10min", "--"]
                fit = ["fit", "-c", "recipes/linear/base.yaml", *by_speed, "-c", f"recipes/linear/method/{method}.yaml"]
                fit += ["--trainer.num_nodes", "4", "--trainer.devices", "1", "--data.init_args.rounds", "5"]
                fit += ["--trainer.enable_progress_bar", "false", f"--trainer.default_root_dir={folder}"]
                fit += [f"--trainer.logger.init_args.save_dir={folder}"]
                fit += ["-c", str(longer_steps(Path(folder)))]
                subprocess.run([*own, *hosts, *own, *fit], check=True, stdout=sys.stderr)
                (file,) = Path(folder).rglob("metrics.csv")
                with file.open() as lines:
                    points = [line for line in csv.DictReader(lines) if line["gap"]]
            results.extend(point for point in points[-1:] if float(point["gap"]) <= GAP)
        cells = ["-"] * 3
        if results:
            kinds = (("seconds", 1), ("bytes", 4e6), ("passes", 1))
            cells = [spread([float(point[kind]) / by for point in results], ".2f") for kind, by in kinds]
        print(f"| {name} | {' | '.join(cells)} | {len(results)} of {options.seeds} |", flush=True)


def memory(options):
    """Count the vectors of the model's size that each worker keeps between steps, and what a round sends."""
    print("| workers | features | ratio | vectors at a worker | at the server | bytes of a round | dense / it |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    features = 100_000
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((64, 200))
    wide = np.zeros((64, features))
    wide[:, rng.choice(features, 200, replace=False)] = matrix
    rows = Rows.of(wide, np.where(matrix[:, 0] > 0, 1.0, -1.0))
    for workers, ratio in itertools.product((2, 4, 8), (0.01, 0.1)):
        fleet = Fleet(ACPD(1, 20, ratio), rows, 1.0 / len(rows), Cluster(1.0), workers, 0)
        for point in fleet.run(lambda worker, fleet=fleet: fleet.ascend(worker, 0.3), 1.0, fleet.gap):
            if point["gradients"] >= 10 * workers:
                break
        count = functools.partial(vectors, features=features)
        server, *others = [1 + sum(map(count, worker.state.values())) for worker in fleet.simulator.workers]
        traffic = fleet.simulator.traffic[-1]
        sent = traffic.bytes_sent / traffic.messages
        print(
            f"| {workers} | {features} | {ratio:g} | {max(others)} | {server} = {server - workers} + {workers} | "
            f"{sent:.0f} | {8 * features / sent:.1f} |"
        )


def vectors(value, features):
    """Count the vectors of the size of the model in a value."""
    if isinstance(value, Vector):
        return sum(buffer.numel() == features for buffer in value.buffers)
    return sum(vectors(each, features) for each in value) if isinstance(value, list) else 0


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
    parser.add_argument("--data", choices=("text", "sparse"), default="text", help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--mbit", type=float, default=20.0, help="of each link (default %(default)s)")
    parser.add_argument("--pass-seconds", type=float, default=0.5, help="of a worker's rows (default %(default)s)")
    parser.add_argument("--sgd", action="store_true", help="race SGD, not the methods of dual coordinates")
    parser.add_argument("--emulated", choices=("equal", "slow", "by_speed"), help="run the recipe on emulated hosts")
    parser.add_argument("--speed", action="store_true", help="compare the steps with liblinear")
    parser.add_argument("--memory", action="store_true", help="count vectors and bytes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # liblinear has not converged, as it was told
    torch.set_num_threads(1)
    asked = {speed: options.speed, memory: options.memory, emulated: options.emulated}
    next((what for what, wanted in asked.items() if wanted), race)(options)


if __name__ == "__main__":
    main()
