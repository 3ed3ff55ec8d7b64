"""Linear models on unequal workers: seconds and bytes to a duality gap of 1e-4, by ACPD, CoCoA+ and SGD.

    python -m lightning_decentral.lab.benchmarks.primal_dual [--seeds 5] [--data text|pairs|sparse] [--pass-seconds 0.5]
    python -m lightning_decentral.lab.benchmarks.primal_dual --sgd
    python -m lightning_decentral.lab.benchmarks.primal_dual --emulated grid|PLACE [--sgd]
    python -m lightning_decentral.lab.benchmarks.primal_dual --speed
    python -m lightning_decentral.lab.benchmarks.primal_dual --memory

The data are long speeches of Shakespeare in TF-IDF, these with pairs of words, or rows with 50 of 100,000 features;
logistic loss, lambda = 1 / rows; in the simulator. The last worker is slower; each has as many rows as the others, or
rows by its speed. How long a pass over the rows of a worker takes is given: these sets are small, and stand for larger
ones. The gap is that of the model of worker 0.

ACPD and CoCoA+ are tuned with the seed 0 for equal workers: steps between two exchanges and, of ACPD, how much
travels and how many workers are a group. With ``--sgd`` SGD runs: its batches and learning rates are tuned likewise,
and it has to come within 1e-4 of the optimum.

``--emulated`` runs ``recipes/linear``, from a clone, as root: real processes on four emulated hosts with links of 20
Mbit/s, where a pass over a worker's rows takes ``--pass-seconds``, asleep. The hosts are ``equal``; or the last one is
10 times slower (4 times: ``_4``), with as many rows as the others, ``slow``, rows ``by_speed``, or by the speed that
they have ``measured``. ``grid``: ACPD and CoCoA+ on equal hosts with the seed 0, over steps between two exchanges, how
often they look at the gap, and, of ACPD, how much travels; the quickest of each is what the other places have. A seed
is that of the division of the rows and of their order; for each one all contenders run in turn. Seconds end when all
have evaluated a model whose gap is small enough. MB are what the kernel has counted on the link of a host until then,
on average: models, evaluations, looks, headers, all. Nobody sleeps for evaluations and looks. With ``--sgd`` SGD runs,
with the batches and rates that the simulator has found for it; it has to come within 1e-4 of the optimum, and is
evaluated after every second step.

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
SHARES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of a worker's rows, between two exchanges
ACPD_GRID = list(itertools.product((1, 3), (0.3, 0.1, 0.03)))  # group, ratio
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


def row(name, slowdown, by_speed, options, results, seeds, columns=("seconds", "megabytes", "gradients")):
    slowest = "as the others" if slowdown == 1.0 else f"{slowdown:g} times slower"
    rows = {True: "by speed", False: "equal", "measured": "by measured speed"}[by_speed]
    reached = [result for result in results if result]
    cells = ["-"] * len(columns)
    if reached:
        formats = (".0f" if column == "gradients" else ".2f" for column in columns)
        cells = [
            spread([result[column] for result in reached], form) for column, form in zip(columns, formats, strict=True)
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
    """Notes seconds and bytes since training began at each evaluation, each worker in a file of the run's folder.

    Args:
        metric: whose value is noted, too.
        less: what is taken from it.
    """

    def __init__(self, metric="gap", less=0.0):
        self.metric, self.less = metric, less

    def on_train_start(self, trainer, pl_module):
        self._began, self._sent = time.monotonic(), sent_by_host()

    def on_validation_end(self, trainer, pl_module):
        seen = trainer.callback_metrics
        passed, sent = time.monotonic() - self._began, sent_by_host() - self._sent
        numbers = [seen[self.metric] - self.less, passed, sent, seen.get("passes", 0)]
        with (Path(trainer.default_root_dir) / f"clock{trainer.global_rank}.csv").open("a") as file:
            csv.writer(file).writerow(map(float, numbers))


def sent_by_host():
    """Return the bytes that have left this host, by the kernel."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    names_and_counts = (line.split(":") for line in lines)
    return sum(int(counts.split()[8]) for name, counts in names_and_counts if name.strip() != "lo")


EMULATED_PLACES = {
    "equal": (1.0, False),  # slowdown; rows by speed
    "by_speed": (10.0, True),
    "slow": (10.0, False),
    "measured": (10.0, "measured"),
    "by_speed_4": (4.0, True),
    "slow_4": (4.0, False),
}
EMULATED_SHARES = (0.1, 0.3, 1.0)
LOOKS = (0.3, 1.0)  # passes to a look, as nearly as whole steps allow
CONTENDERS = {"ACPD": "acpd", "CoCoA+": "cocoa_plus"}
RATIOS = {"acpd": (0.1, 0.03), "cocoa_plus": (1.0,)}
TUNED = {  # by the grid: the share, steps to a look, the ratio
    "text": {"acpd": (0.1, 3, 0.1), "cocoa_plus": (0.3, 3, 1.0)},
    "pairs": {"acpd": (1.0, 1, 0.1), "cocoa_plus": (1.0, 1, 1.0)},
}
SGD_CONTENDERS = {"synchronous SGD": "ddp", "A-PSGD": "apsgd"}
SGD_TUNED = {"ddp": (1.0, 256.0), "apsgd": (1.0, 64.0)}  # of a worker's rows; rate


@functools.cache
def optimum_of(data):
    """Return the smallest value of the objective."""
    rows = rows_of(data)
    model, alone = np.zeros(rows.features), Coordinates(rows, LOSS, 1.0 / len(rows), len(rows))
    while alone.gap(model) > 1e-8:
        alone.ascend(model, len(rows))
    return float(alone.primal(model))


def settings(options, folder, method, tuned, by_speed, seed):
    """Return the settings of a run, beside those of the recipe."""
    share, steps, ratio = tuned
    evaluates = 10000
    rows, clock = rows_of(options.data), {}
    model = {"seed": seed, "features": rows.features, "regularization": 1.0 / len(rows)}
    if method == "acpd":
        model["look_every"] = steps
    elif method == "cocoa_plus":
        evaluates = steps
    callbacks = yaml.safe_load(Path("recipes/linear/base.yaml").read_text())["trainer"]["callbacks"]
    callbacks = [each for each in callbacks if not each["class_path"].endswith(".ModelCheckpoint")]
    (slowed,) = (each for each in callbacks if each["class_path"].endswith(".RowSeconds"))
    slowed["init_args"]["seconds"] = options.pass_seconds / (len(rows) / options.workers)
    if options.sgd:
        clock = {"metric": "primal", "less": optimum_of(options.data)}
        (stops,) = (each for each in callbacks if each["class_path"].endswith(".EarlyStopping"))
        stops["init_args"] |= {"monitor": "primal", "stopping_threshold": clock["less"] + GAP}
    # not of __main__
    callbacks.append({"class_path": "lightning_decentral.lab.benchmarks.primal_dual.Clock", "init_args": clock})
    trainer = {
        "callbacks": callbacks,
        "num_nodes": options.workers,
        "devices": 1,
        "max_epochs": 1000,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "logger": False,
        "default_root_dir": str(folder),
    }
    data = {"rounds": evaluates, "pairs": options.data == "pairs"}
    if by_speed:
        data["shares"] = by_speed
    if not options.sgd:
        sends = {"ratio": ratio} if method == "acpd" else {}
        trainer["strategy"] = {"init_args": {"algorithm": {"init_args": {"local_steps": share, **sends}}}}
    else:
        batch, rate = SGD_TUNED[method]
        model |= {"batch_size": round(batch * len(rows) / options.workers), "learning_rate": rate}
        data["rounds"] = 2
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}))
    return path


def emulated_run(options, method, tuned, slowdown, by_speed, seed):
    """Run the recipe on emulated hosts; returns what was measured when the gap was small enough, if it was."""
    slow = () if slowdown == 1.0 else ("--host", f"{options.workers - 1}:slowdown={slowdown:g}")
    shares = {True: [slowdown] * (options.workers - 1) + [1.0], False: None}.get(by_speed, by_speed)
    own = [sys.executable, "-m", "lightning_decentral"]
    hosts = ["emulate", "--hosts", str(options.workers), "--rate", f"{options.mbit:g}mbit", *slow]
    hosts += ["--timeout", "5min", "--"]
    fit = ["fit", "-c", "recipes/linear/base.yaml"]
    fit += ["-c", "recipes/linear/sgd.yaml"] if options.sgd else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit += ["-c", f"recipes/linear/method/{method}.yaml"]
        fit += ["-c", str(settings(options, folder, method, tuned, shares, seed))]
        subprocess.run([*own, *hosts, *own, *fit], check=False, stdout=sys.stderr)
        found = []
        for file in sorted(folder.glob("clock*.csv")):
            with file.open() as lines:
                found.append([[float(cell) for cell in line] for line in csv.reader(lines)])
    if len(found) < options.workers:
        return None
    for points in zip(*found, strict=False):
        if points[0][0] <= GAP:
            gaps, seconds, sent, passes = zip(*points, strict=True)
            return {
                "gap": gaps[0],
                "seconds": max(seconds),
                "megabytes": statistics.mean(sent) / 1e6,
                "passes": passes[0],
            }
    return None


def grid(options):
    print("| contender | steps between exchanges / rows | passes to a look | share of values sent | seconds to 1e-4 |")
    print("| --- | --- | --- | --- | --- |")
    for name, method in CONTENDERS.items():
        for share, ratio in itertools.product(EMULATED_SHARES, RATIOS[method]):
            for steps in sorted({max(1, round(look / share)) for look in LOOKS}):
                result = emulated_run(options, method, (share, steps, ratio), 1.0, False, 0)
                seconds = f"{result['seconds']:.2f}" if result else "-"
                print(f"| {name} | {share:g} | {share * steps:g} | {ratio:g} | {seconds} |", flush=True)


def emulated(options):
    if options.emulated == "grid":
        grid(options)
        return
    slowdown, by_speed = EMULATED_PLACES[options.emulated]
    contenders = SGD_CONTENDERS if options.sgd else CONTENDERS
    results = {name: [] for name in contenders}
    for seed, (name, method) in itertools.product(range(1, options.seeds + 1), contenders.items()):
        tuned = (1.0, 1, 1.0) if options.sgd else TUNED[options.data][method]
        result = emulated_run(options, method, tuned, slowdown, by_speed, seed)
        print(f"{name}, seed {seed}: {result}", file=sys.stderr, flush=True)
        results[name].append(result)
    columns = ("seconds", "megabytes") if options.sgd else ("seconds", "megabytes", "passes")
    passes = ("", "") if options.sgd else (" passes over all rows |", " --- |")
    print(f"| contender | slowest host | rows | tuned | seconds to 1e-4 | MB of a host |{passes[0]} seeds |")
    print(f"| --- | --- | --- | --- | --- | --- |{passes[1]} --- |")
    for name, method in contenders.items():
        if options.sgd:
            words = f"batch {SGD_TUNED[method][0]:g}, rate {SGD_TUNED[method][1]:g}"
        else:
            share, steps, ratio = TUNED[options.data][method]
            words = f"steps {share:g}, look after {share * steps:g} passes"
            words += f", ratio {ratio:g}" if method == "acpd" else ""
        row(name, slowdown, by_speed, words, results[name], options.seeds, columns)


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
    parser.add_argument("--data", choices=("text", "pairs", "sparse"), default="text", help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--mbit", type=float, default=20.0, help="of each link (default %(default)s)")
    parser.add_argument("--pass-seconds", type=float, default=0.5, help="of a worker's rows (default %(default)s)")
    parser.add_argument("--sgd", action="store_true", help="race SGD, not the methods of dual coordinates")
    parser.add_argument("--emulated", choices=("grid", *EMULATED_PLACES), help="run the recipe on emulated hosts")
    parser.add_argument("--speed", action="store_true", help="compare the steps with liblinear")
    parser.add_argument("--memory", action="store_true", help="count vectors and bytes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # liblinear has not converged, as it was told
    torch.set_num_threads(1)
    asked = {speed: options.speed, memory: options.memory, emulated: options.emulated}
    next((what for what, wanted in asked.items() if wanted), race)(options)


if __name__ == "__main__":
    main()
