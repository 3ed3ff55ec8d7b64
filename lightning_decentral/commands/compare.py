"""``lightning-decentral compare``: the same recipe under several strategies, ending in a table and a plot.

Each run is a process of its own (``lightning-decentral fit``), or one in each host of an emulated cluster, one run
after the other, so that none disturbs another. What a run has reached is said at each of its validations.
Every run logs to CSV, and to one W&B group where wandb is installed. The folder then holds ``table.md``, ``table.csv``
(a row per run), ``curves.csv`` (a row per validation) and ``plot.png``; ``workers.png`` shows how far apart the models
of the workers were and how stale their gradients, where there is something to see. In the folder of each run lies its
``timeline/timeline.html``: who computed and who waited for whom.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning_decentral.commands.telling import SECONDS as _SECONDS
from lightning_decentral.commands.telling import STALENESS, Curve, falls, meaning, metrics_of, read_curve, run_and_tell
from lightning_decentral.errors import ConfigurationError, did_you_mean
from lightning_decentral.methods import METHODS
from lightning_decentral.plots.canvas import require_matplotlib
from lightning_decentral.plots.curves import plot_curves
from lightning_decentral.simulation.cluster_file import ClusterFile
from lightning_decentral.units import MOST_WORKERS, parse_factors, parse_seconds, whole_number

EMULATION = "lightning_decentral.lab.emulation"  # by name, and only where hosts are emulated: nothing imports the lab
_EPOCH, _MEGABYTES = "epoch", "progress/megabytes"
_BATCHES = "progress/batches"
_NEVER = 1_000_000  # validations without progress
_AXES = {_EPOCH: "epochs", _SECONDS: "seconds", _MEGABYTES: "megabytes sent, all workers"}
_APART = {
    "consensus_distance": "consensus distance\n" r"$\frac{1}{n}\sum_i \| x_i - \bar{x} \|^2$",
    STALENESS[0]: "staleness of gradients\nversions, mean of the epoch",
}


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        ConfigurationError: if a strategy is unknown, or a run fails.
    """
    options, overrides = _parser().parse_known_args(argv)
    options.overrides = overrides
    strategies = [name.strip() for name in options.strategies.split(",") if name.strip()]
    _read_numbers(options)
    _check(options, strategies)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[tuple[str, int], Curve] = {}
    with nullcontext() if options.cluster is None else _lab().EmulatedNetwork(options.cluster, "compare") as network:
        for seed in options.seeds:
            for name in strategies:  # interleaved: a machine that changes its speed changes it for all
                curves[_label(name), seed] = _run(name, seed, options, folder, network)
                write_report(curves, folder, options)  # each time: what is there stays if a later run fails
    print(f"\n{(folder / 'table.md').read_text()}")
    beside = [name for name in ("table.md", "table.csv", "curves.csv", "workers.png") if (folder / name).exists()]
    print(f"Plot: {folder}/plot.png; beside it: {', '.join(beside)}.")
    return 0


def write_report(curves: dict[tuple[str, int], Curve], folder: Path, options: argparse.Namespace) -> None:
    """Write the tables and the plot of finished runs."""
    rows = [_summary(name, seed, curve, options.target) for (name, seed), curve in curves.items()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    points = [{"strategy": name, "seed": seed, **point} for (name, seed), curve in curves.items() for point in curve]
    with open(folder / "curves.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for point in points for key in point)))
        writer.writeheader()
        writer.writerows(points)
    table = markdown_table(rows)
    slow = ", ".join(f"worker {rank} slowed {factor:g} times" for rank, factor in options.slow) or "no straggler"
    where = slow if options.cluster is None else f"emulated hosts: {options.cluster.name}"
    title = f"{options.workers} workers, {where}, {seeds_so_far(curves, options.seeds)}"
    said = meaning(curves)
    (folder / "table.md").write_text(f"{title}\n\n{table}" + (f"\n{said}\n" if said else ""))
    _plot(curves, folder, title)


def seeds_so_far(curves: Iterable[tuple[str, int]], seeds: Sequence[int]) -> str:
    """Say which seeds there are, and how many of a contender's runs are still to come."""
    done = Counter(name for name, _ in curves)
    missing = {name: len(seeds) - number for name, number in done.items() if number < len(seeds)}
    text = f"seeds {', '.join(map(str, seeds))}"
    if not missing:
        return text
    return f"{text}; still to come: " + ", ".join(f"{number} of {name}" for name, number in missing.items())


def markdown_table(rows: Sequence[dict[str, str | float]]) -> str:
    """Write one line per strategy: the mean over its seeds, with the smallest and largest where there are several."""
    groups: dict[str, list[dict[str, str | float]]] = defaultdict(list)
    for row in rows:
        groups[str(row["strategy"])].append(row)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("strategy", "seed")]
    lines = ["| strategy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, group in groups.items():
        cells = []
        for column in columns:
            values = [float(row[column]) for row in group if column in row]
            if not values:
                cells.append("-")
            elif min(values) == max(values):
                cells.append(_number(values[0]))
            else:
                cells.append(f"{_number(statistics.mean(values))} ({_number(min(values))} to {_number(max(values))})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _lab() -> Any:
    return importlib.import_module(EMULATION)


# -- one run -----------------------------------------------------------------------------------------------------------


def _run(name: str, seed: int, options: argparse.Namespace, folder: Path, network: Any) -> Curve:
    run = folder / f"{_label(name)}-seed{seed}"
    command = [sys.executable, "-m", "lightning_decentral", "fit"]
    for config in options.config:
        command += ["-c", config]
    if _is_file(name):
        command += ["-c", name]
    command += ["-c", str(_overlay(name, seed, options, run))]
    command += options.overrides
    print(f"\n== {name}, seed {seed}: {shlex.join(command)}", flush=True)
    metrics = run / "metrics.csv"
    metrics.unlink(missing_ok=True)  # of an earlier run in this folder
    began = time.monotonic()
    # Lightning hands ranks and ports to its processes in the environment: a run must not see those of another one.
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::UserWarning")  # keep the bars readable
    if network is None:
        exit_code = run_and_tell(command, environment, metrics, f"{_label(name)}, seed {seed}")
    else:
        settings = {key: environment[key] for key in ("OMP_NUM_THREADS", "PYTHONWARNINGS")}
        exit_code = _lab().exit_code(_lab().run_in_hosts(network, command, settings))
    if exit_code or not metrics.exists():
        raise ConfigurationError(
            f"The run of {name} ended with exit code {exit_code} after {time.monotonic() - began:.0f} s. Its "
            "error is above; repeat the command printed there to look into it."
        )
    curve = read_curve(metrics)
    if not curve:
        raise ConfigurationError(f"The run of {name} made no validation. Give it validation data and enough epochs.")
    return curve


def _overlay(name: str, seed: int, options: argparse.Namespace, run: Path) -> Path:
    """Write a configuration file with what compare adds to a recipe."""
    loggers: list[dict[str, Any]] = [
        {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {
                "save_dir": str(run.parent),
                "name": run.name,
                "version": "",
                "flush_logs_every_n_steps": 1,  # each validation is told at once
            },
        }
    ]
    if importlib.util.find_spec("wandb") is not None and not options.no_wandb:
        loggers.append(
            {
                "class_path": "lightning_decentral.loggers.OfflineFirstWandbLogger",
                "init_args": {
                    "name": run.name,
                    "save_dir": str(run),
                    "group": Path(options.output).name,
                    "job_type": _label(name),
                    "tags": [f"{options.workers} workers", f"seed {seed}"],
                },
            }
        )
    callbacks: list[dict[str, Any]] = [
        {"class_path": "lightning_decentral.callbacks.Progress"},
        {"class_path": "lightning_decentral.callbacks.Communication"},
        {"class_path": "lightning_decentral.callbacks.ConsensusDistance"},
        {"class_path": "lightning_decentral.callbacks.Staleness"},
    ]
    slowdown = None  # what the cluster file says, which the emulator puts into each host's environment
    if options.cluster is None:
        slowdown = {str(rank): factor for rank, factor in options.slow}
    if options.cluster is not None or options.slow or options.compute is not None:
        callbacks.append(
            {
                "class_path": "lightning_decentral.callbacks.Stragglers",
                "init_args": {"slowdown": slowdown, "compute_seconds": options.compute},
            }
        )
    callbacks.append({"class_path": "lightning_decentral.callbacks.Timeline", "init_args": {"steps": 50}})
    if options.target is not None:
        metric, value = options.target
        callbacks.append(
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {
                    "monitor": metric,
                    "mode": "min" if falls(metric) else "max",
                    "stopping_threshold": value,
                    "patience": _NEVER,
                },
            }
        )
    trainer = {
        **({} if _is_file(name) else {"strategy": name}),
        "devices": options.workers if options.cluster is None else 1,
        "num_nodes": 1 if options.cluster is None else options.workers,
        "accelerator": options.accelerator,
        "logger": loggers,
        "callbacks+": callbacks,
        "default_root_dir": str(run),
        **({} if sys.stdout.isatty() else {"enable_progress_bar": False}),  # a bar is for a terminal
    }
    if options.epochs is not None:
        trainer["max_epochs"] = options.epochs
    run.mkdir(parents=True, exist_ok=True)
    path = run / "compare.yaml"
    path.write_text(json.dumps({"seed_everything": seed, "trainer": trainer}, indent=1))  # JSON is YAML
    return path


# -- table and plot ----------------------------------------------------------------------------------------------------


def _summary(name: str, seed: int, curve: Curve, target: tuple[str, float] | None) -> dict[str, str | float]:
    last = curve[-1]
    row: dict[str, str | float] = {"strategy": name, "seed": seed}
    for metric in metrics_of([curve]):
        values = [point[metric] for point in curve if metric in point]
        row[metric] = values[-1]
        row[f"best {metric}"] = min(values) if falls(metric) else max(values)
    if target is not None:
        metric, value = target
        sign = -1 if falls(metric) else 1
        there = [point[_SECONDS] for point in curve if metric in point and sign * point[metric] >= sign * value]
        row[f"seconds to {metric} {value:g}"] = there[0] if there else math.inf
    row["epochs"] = len(curve)
    row["seconds"] = last[_SECONDS]
    row["batches per second"] = last[_BATCHES] / last[_SECONDS]
    row["megabytes sent"] = last[_MEGABYTES]
    return row


def _number(value: float) -> str:
    if math.isfinite(value) and value == int(value):
        return str(int(value))
    if value and (abs(value) < 0.001 or not math.isfinite(value)):
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _plot(curves: dict[tuple[str, int], Curve], folder: Path, title: str) -> None:
    """Draw what was reached, and, where it is known, how far apart and how late the workers were."""
    runs: dict[str, list[Curve]] = defaultdict(list)
    for (name, _), curve in curves.items():
        runs[name].append([{**point, _EPOCH: point[_EPOCH] + 1} for point in curve])  # how many are done
    metrics = metrics_of(list(curves.values())) or ["val_loss"]
    measures = {name: f"validation {name.removeprefix('val_').replace('_', ' ')}" for name in metrics}
    plot_curves(runs, _AXES, measures, folder / "plot.png", title)
    known = {name for curve in curves.values() for point in curve for name in point}
    apart = {name: label for name, label in _APART.items() if name in known}
    if apart:
        axes = {name: _AXES[name] for name in (_EPOCH, _SECONDS)}
        plot_curves(runs, axes, apart, folder / "workers.png", title, from_zero=True)


# -- arguments ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-decentral compare",
        description="Train one recipe under several strategies; leaves tables (Markdown, CSV) and plots (PNG).",
        epilog="Further options are passed on to every `fit`, as: --data.batch_size 32",
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", action="append", required=True, help="recipe files, merged left to right")
    parser.add_argument(
        "--strategies", default="ddp,dpsgd,d2,adpsgd", help="names, or files that set one, separated by commas"
    )
    parser.add_argument("--workers", help="workers on this machine (4)")
    parser.add_argument("--epochs", help="instead of the recipe's")
    parser.add_argument("--seeds", default="1", help="separated by commas: every strategy with each")
    parser.add_argument(
        "--slow", action="append", default=[], metavar="RANK:FACTOR", help="make a worker slower, as 3:4"
    )
    parser.add_argument("--compute", metavar="TIME", help="let a batch take at least so long, as 100ms")
    parser.add_argument(
        "--cluster", metavar="FILE", help="emulate these hosts (clusters/*.yaml; Linux, root), a worker on each"
    )
    parser.add_argument("--target", metavar="METRIC=VALUE", help="stop there, and tell the seconds to it")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--output", default="runs/compare", help="folder of the results")
    parser.add_argument("--no-wandb", action="store_true", help="do not log to W&B")
    return parser


def _check(options: argparse.Namespace, strategies: list[str]) -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    for name in strategies:
        if _is_file(name):
            if not Path(name).exists():
                raise ConfigurationError(f"There is no file {name!r} of a strategy. Some are in recipes/*/method/.")
        elif name not in StrategyRegistry:
            known = [n for n in ("ddp", *METHODS) if n in StrategyRegistry]
            raise ConfigurationError(
                f"Unknown strategy {name!r}; Lightning knows {', '.join(known)}, among others. "
                f"{did_you_mean(name, known)}"
            )
    require_matplotlib("The plot of `compare`")
    if not strategies:
        raise ConfigurationError("--strategies is empty: name at least one, such as ddp,adpsgd.")
    labels = [_label(name) for name in strategies]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ConfigurationError(f"--strategies got {twice[0]!r} twice, needs different names. Rename a file.")
    for config in options.config:
        if not Path(config).exists():
            raise ConfigurationError(f"There is no configuration file {config!r}. Recipes are in the folder recipes/.")
    if options.cluster is not None:
        if options.workers is not None or options.slow:
            raise ConfigurationError(
                "--cluster got --workers or --slow beside it: the file says how many hosts there are, and which are "
                "slow. Leave them out."
            )
        options.cluster = ClusterFile.read(options.cluster)
        options.workers = len(options.cluster.hosts)
        if options.compute is None:
            options.compute = options.cluster.compute_seconds
        _lab().check_machine()
    elif options.workers is None:
        options.workers = 4
    for rank, _ in options.slow:
        if rank >= options.workers:
            raise ConfigurationError(f"--slow names worker {rank}, but there are {options.workers}: count from 0.")


def _is_file(strategy: str) -> bool:
    """Tell whether a strategy is a configuration file and not a name."""
    return strategy.endswith((".yaml", ".yml", ".json"))


def _label(strategy: str) -> str:
    """Return what a strategy is called in the table."""
    return Path(strategy).stem if _is_file(strategy) else strategy


def _read_numbers(options: argparse.Namespace) -> None:
    """Put numbers in the place of texts.

    Raises:
        ConfigurationError: for anything that is no sensible number.
    """
    if options.workers is not None:
        options.workers = whole_number("--workers", options.workers, MOST_WORKERS)
    if options.epochs is not None:
        options.epochs = whole_number("--epochs", options.epochs)
    if options.compute is not None:
        options.compute = _seconds("--compute", options.compute)
    options.seeds = [_seed(part) for part in options.seeds.split(",")]
    options.slow = list(parse_factors("--slow", options.slow).items())
    if options.target is not None:
        options.target = _target(options.target)


def _seconds(option: str, text: str) -> float:
    return parse_seconds(option, f"{text}s" if text[-1:].isdigit() else text)


def _seed(text: str) -> int:
    if re.fullmatch(r"\s*[0-9]{1,10}\s*", text) is None or int(text) >= 2**32:
        raise ConfigurationError(
            f"--seeds got {text!r}, needs whole numbers from 0 to 2^32 - 1, separated by commas. Write for example "
            "--seeds 1,2,3."
        )
    return int(text)


def _target(text: str) -> tuple[str, float]:
    metric, _, value = text.partition("=")
    try:
        target = float(value)
    except ValueError:
        target = math.nan
    if not metric or not math.isfinite(target):
        raise ConfigurationError(
            f"--target got {text!r}, needs METRIC=VALUE. Write for example --target val_accuracy=0.97."
        )
    return metric, target
