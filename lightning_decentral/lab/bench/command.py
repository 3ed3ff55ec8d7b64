"""``lightning-decentral bench``: a race of the methods against each other and against what other packages offer."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench import figures, report, runner
from lightning_decentral.lab.bench.contenders import CONTENDERS, contender
from lightning_decentral.lab.bench.environments import folder_of
from lightning_decentral.lab.bench.task import Task, cache_folder
from lightning_decentral.lab.emulation.network import check_machine
from lightning_decentral.lab.results import new
from lightning_decentral.simulation.cluster_file import ClusterFile
from lightning_decentral.units import MOST_WORKERS, parse_seconds, whole_number

_START_SECONDS = 5.0  # of one contender, at the least: processes, connections, data
_EPILOG = """\
examples:
  lightning-decentral bench --contenders none,ddp,dpsgd,adpsgd --workers 4 --compute real
  lightning-decentral bench --contenders none,ddp,dpsgd,adpsgd --cluster clusters/homogeneous.yaml

With --cluster the hosts are emulated, which needs Linux and root; without, workers are plain processes over loopback.
The packages of other projects are installed into environments of their own (in ~/.cache/lightning_decentral) when they
take part for the first time. Every contender is measured against the rows "none" and "ddp": keep these two.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: its arguments, without its name.

    Returns:
        The exit status: 0 if at least one contender has run, else 1.

    Raises:
        ConfigurationError: if an option cannot be understood, or hosts cannot be emulated here.
        SystemExit: after ``--help`` (0), and for unknown options (2).
    """
    options = parser().parse_args(argv)
    cluster = None if options.cluster is None else ClusterFile.read(options.cluster)
    given = None if options.workers is None else whole_number("--workers", options.workers, MOST_WORKERS)
    if cluster is not None and given is not None and given != len(cluster.hosts):
        raise ConfigurationError(
            f"bench got --workers {given} and a cluster of {len(cluster.hosts)} hosts, needs as many. Leave "
            "out --workers."
        )
    workers = len(cluster.hosts) if cluster is not None else 4 if given is None else given
    if options.contenders is None and cluster is None:
        raise ConfigurationError(
            f"bench got neither --contenders nor --cluster, needs to know who races: all {len(CONTENDERS)} would take "
            "hours. Write --contenders none,ddp,dpsgd,adpsgd, which takes minutes, or --contenders all."
        )
    names = list(CONTENDERS) if options.contenders in (None, "all") else options.contenders.split(",")
    race = runner.Race(
        task=_task(options, cluster),
        contenders=[contender(name.strip()) for name in names],
        workers=workers,
        rounds=whole_number("--rounds", options.rounds),
        cluster=cluster,
        timeout_seconds=_positive("--timeout", options.timeout),
        install=not options.no_install,
    )
    if cluster is not None:
        check_machine()
    print(_announced(race), flush=True)
    results = runner.run(race, lambda line: print(line, flush=True))
    if not results.runs:
        print("No contender has run: the reasons are above.")
        return 1
    rows = figures.rows(results)
    name = options.name or (f"loopback{workers}" if cluster is None else cluster.name)
    command = shlex.join(["lightning-decentral", "bench", *argv])
    measurement = new(Path(options.output), name, options.title or f"Race: {name}", command)
    report.write(results, rows, measurement)
    folder = measurement.folder
    print(f"\n{report.table(rows)}\n\nReport, plot and figures: {folder}/report.md, plot.png and figures.csv.")
    if not options.no_wandb:
        print(report.log_to_wandb(results, rows, f"{name}-{folder.name}", Path("runs") / "bench"))
    return 0


def _announced(race: runner.Race) -> str:
    """Say how many take part, how long they take at least, what is installed for them, and how to ask for less."""
    task, runs = race.task, len(race.contenders) * race.rounds
    slept = 0.0 if task.compute == "real" else task.compute_seconds * max([1.0, *task.slowdown.values()])
    trained = (task.warm_up_steps + task.steps) * slept if task.seconds is None else task.seconds
    others = [each for each in race.contenders if each.environment and not folder_of(each).exists()]
    missing = sorted({str(each.environment) for each in others})
    minutes = runs * (trained + _START_SECONDS) / 60
    lines = [
        f"{len(race.contenders)} contenders on {race.workers} workers, {race.rounds} rounds: {runs} runs, at least "
        f"{minutes:.0f} minutes. For less: --contenders NAME,..., --rounds 1, --steps 16."
    ]
    if missing and race.install:
        lines.append(
            f"First pip installs {', '.join(missing)}, each into an environment of its own in {cache_folder()}; "
            "--no-install leaves them out."
        )
    return "\n".join(lines)


def _task(options: argparse.Namespace, cluster: ClusterFile | None) -> Task:
    slowdown = {} if cluster is None else {rank: host.slowdown for rank, host in enumerate(cluster.hosts)}
    given = options.compute
    seconds = 0.1 if cluster is None or cluster.compute_seconds is None else cluster.compute_seconds
    if given not in (None, "real"):
        seconds = parse_seconds("--compute", given)
    return Task(
        steps=whole_number("--steps", options.steps),
        warm_up_steps=0 if options.warm_up == "0" else whole_number("--warm-up", options.warm_up),
        model_bytes=whole_number("--model-bytes", options.model_bytes),
        batch_size=whole_number("--batch-size", options.batch_size),
        compute="real" if given == "real" else "sleep",
        compute_seconds=seconds,
        slowdown={rank: factor for rank, factor in slowdown.items() if factor != 1.0},
        seconds=None if options.seconds is None else _positive("--seconds", options.seconds),
        seed=0 if options.seed == "0" else whole_number("--seed", options.seed, 2**32 - 1),
    )


def _positive(option: str, text: str) -> float:
    seconds = parse_seconds(option, text)
    if seconds == 0:
        raise ConfigurationError(f"{option} got {text!r}, needs more than 0 seconds. Write for example {option} 5min.")
    return seconds


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command's options."""
    command = argparse.ArgumentParser(
        prog="lightning-decentral bench",
        description="Race the methods against each other and against other packages; leaves a report.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--cluster", metavar="FILE", help="emulate these hosts, as in clusters/*.yaml")
    command.add_argument("--workers", help="without --cluster: processes on this machine (4)")
    command.add_argument(
        "--contenders",
        metavar="NAME,...",
        help=f"all, or some of: {', '.join(CONTENDERS)}; needed without --cluster, with it the default is all",
    )
    command.add_argument("--rounds", default="3", help="how often everybody runs (3)")
    command.add_argument("--steps", default="32", help="counted, of each worker (32)")
    command.add_argument("--warm-up", default="16", help="steps before; a multiple of 8 (16)")
    command.add_argument("--seconds", metavar="TIME", help="train for so long instead of a number of steps")
    command.add_argument("--model-bytes", default="5e6", help="of the float32 parameters (5e6)")
    command.add_argument("--batch-size", default="32", help="images per worker and step (32)")
    command.add_argument(
        "--compute", help="time of one gradient, or real: no sleep; default: the cluster file's, 100ms"
    )
    command.add_argument("--seed", default="0", help="of the model and the order of the data (0)")
    command.add_argument("--timeout", default="5min", help="for one contender in one round (5min)")
    command.add_argument(
        "--output", default="runs/bench", help="the report goes into a folder of it, NAME/DATE-COMMIT (runs/bench)"
    )
    command.add_argument("--name", help="what is measured; default: the name of the cluster")
    command.add_argument("--title", help="of the report")
    command.add_argument("--no-install", action="store_true", help="leave out what is not installed yet")
    command.add_argument("--no-wandb", action="store_true", help="do not log to W&B")
    return command
