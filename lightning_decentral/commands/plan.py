"""``lightning-decentral plan``: what each method would cost on a given cluster, and which one to use.

Nothing is trained and no tensor is made: the methods run in the planner (`lightning_decentral.planning.planner`).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.drawing import draw
from lightning_decentral.planning.choosing import choose
from lightning_decentral.planning.pipelines import PipelinePlan, plan_pipelines, planned_timeline
from lightning_decentral.planning.planner import EXACT, METHODS, TOPOLOGIES, Plan, compare_plans, recommend
from lightning_decentral.plots.canvas import require_matplotlib
from lightning_decentral.plots.steps import plot_steps
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.cluster_file import ClusterFile
from lightning_decentral.topology import TOPOLOGY_NAMES
from lightning_decentral.units import MOST_WORKERS, parse_bandwidth, parse_factors, parse_seconds, whole_number

_INSTEAD_OF_A_FILE = ("--workers", "--bandwidth", "--latency", "--slow", "--slow-link")
_REQUIRED_WITHOUT_A_FILE = ("--workers", "--bandwidth", "--compute")

_NETWORKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0)  # bandwidths of --plot, times the cluster's
_HEADINGS = ("method", "topology", "s/step", "waiting", "sent/step", "steps/s, all", "speed", "gap", "rounds")
_EXPLANATION = """\
s/step: of one worker. waiting: share of it in which a worker only waits, for others or for the network. sent/step: by
one worker. steps/s, all: of all workers together. speed: relative to the first row. gap, rounds: how well a step's
averaging mixes (gap 1: exact, within a period; rounds: steps until 0.1 % of a disagreement is left)."""

_OTHERS = len(METHODS) - len(EXACT)
_LEFT_OUT = f"""\
The table has methods that send what they have as it is, in every step. {_OTHERS} others, as local_sgd or moniqua_sgd,
compress, make local steps or wait for some workers only: what that costs in further steps is not known here. Plan them
with --methods. Whether the workers' data differ is not looked at either: --data does, and may name another method."""

_PIPELINE_HEADINGS = ("pipeline", "stages", "s/batch", "speed", "sent/batch", "staleness", "first keeps")
_PIPELINE_EXPLANATION = """\
The model cut into equal stages, one on each worker, that all take the same batch. speed: relative to one worker with
the whole model. sent/batch: by the worker that sends most. staleness: updates, of the first stage. first keeps: batches
or micro-batches under way in the first stage."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: its arguments, without its name.

    Returns:
        The exit status, 0.

    Raises:
        ConfigurationError: if a value cannot be understood, or does not fit the others.
        SystemExit: after ``--help`` (0), and for unknown or missing options (2).
    """
    parser = _parser()
    options = parser.parse_args(argv)
    element_bytes = whole_number("--dtype-bytes", options.dtype_bytes, most=16)
    model_bytes = whole_number("--parameters", options.parameters) * element_bytes
    if options.cluster is None:
        missing = [option for option in _REQUIRED_WITHOUT_A_FILE if _given(options, option) is None]
        if missing:
            parser.error(f"the following arguments are required, or --cluster FILE: {', '.join(missing)}")
        workers = whole_number("--workers", options.workers, MOST_WORKERS)
        cluster = Cluster(
            compute_seconds=parse_seconds("--compute", options.compute),
            slowdown=parse_factors("--slow", options.slow or ()),
            bandwidth_bytes_per_second=parse_bandwidth("--bandwidth", options.bandwidth),
            latency_seconds=parse_seconds("--latency", "0s" if options.latency is None else options.latency),
            slow_links=parse_factors("--slow-link", options.slow_link or ()),
        )
    else:
        both = [option for option in _INSTEAD_OF_A_FILE if _given(options, option) is not None]
        if both:
            raise ConfigurationError(
                f"Got --cluster {options.cluster} together with {', '.join(both)}, needs one description of the "
                "cluster. Leave them out, or write what they say into the file; only --compute overrides it."
            )
        file = ClusterFile.read(options.cluster)
        workers = len(file.hosts)
        cluster = file.model(None if options.compute is None else parse_seconds("--compute", options.compute))
    if options.timelines is not None and options.activations is None:
        raise ConfigurationError(
            f"plan got --timelines {options.timelines} without --activations, needs both: how long sending takes "
            "between two stages is in the pictures. Write for example --activations 4e6."
        )
    if options.plot is not None:
        require_matplotlib("--plot")
    methods, topologies = tuple(options.methods), tuple(options.topologies)
    plans = compare_plans(workers, model_bytes, cluster, methods, topologies, element_bytes=element_bytes)
    if options.csv is not None:
        _write_csv(Path(options.csv), plans)
    if options.plot is not None:
        _plot(Path(options.plot), plans, cluster, options, element_bytes)
    _print_table(_HEADINGS, [_cells(plan, plans[0]) for plan in plans])
    print(_EXPLANATION)
    _print_servers(plans)
    print()
    if options.activations is not None:
        stages = plan_pipelines(workers, cluster, whole_number("--activations", options.activations))
        _print_table(_PIPELINE_HEADINGS, [_pipeline_cells(plan) for plan in stages])
        print(_PIPELINE_EXPLANATION)
        print()
        if options.timelines is not None:
            _draw_timelines(Path(options.timelines), stages, workers, cluster, options.activations)
    if options.data is None:
        best = recommend(plans)
        print(_to_write(best.plan.method))
        print(best.reason)
        if methods == EXACT:
            print(_LEFT_OUT)
    else:
        choice = choose(workers, model_bytes, cluster, options.data, options.optimizer, element_bytes=element_bytes)
        print(_to_write(repr(choice.algorithm)))
        print(choice.text)
        print("This looks at the data and the optimizer, too: without --data the fastest of the table is taken.")
    return 0


def _to_write(method: str) -> str:
    """Give the strategy of a plan as it is written in a script, with what has to be imported."""
    if "(" not in method:
        return 'Take Trainer(strategy="ddp").'
    names = sorted({"Strategy", *re.findall(r"\b[A-Z]\w*(?=\()", method)})
    ours = [name for name in names if hasattr(import_module("lightning_decentral"), name)]
    return f"from lightning_decentral import {', '.join(ours)}\nTake Trainer(strategy=Strategy({method}))."


def _given(options: argparse.Namespace, option: str) -> object:
    return getattr(options, option.removeprefix("--").replace("-", "_"))


def _cells(plan: Plan, baseline: Plan) -> tuple[str, ...]:
    waiting = plan.exposed_seconds_per_step / plan.seconds_per_step if plan.seconds_per_step else 0.0
    return (
        plan.method.split("(")[0],
        plan.topology.replace(f"(size={plan.workers})", "").replace(f"size={plan.workers}, ", ""),
        f"{plan.seconds_per_step:.4g}",
        f"{min(waiting, 1.0):.0%}",
        _bytes(plan.bytes_per_step),
        f"{plan.steps_per_second:.4g}",
        f"{plan.speedup_over(baseline):.2f}x",
        f"{plan.spectral_gap:.3f}",
        f"{plan.rounds_to_consensus:g}",
    )


def _pipeline_cells(plan: PipelinePlan) -> tuple[str, ...]:
    return (
        plan.schedule,
        str(plan.stages),
        f"{plan.seconds_per_batch:.4g}",
        f"{plan.speedup:.2f}x",
        _bytes(plan.bytes_per_batch),
        str(plan.staleness),
        str(plan.kept),
    )


def _draw_timelines(
    folder: Path, plans: Sequence[PipelinePlan], workers: int, cluster: Cluster, activations: str
) -> None:
    """Draw when each stage does what, a picture for each schedule."""
    folder.mkdir(parents=True, exist_ok=True)
    for plan in plans:
        schedule, spans = planned_timeline(plan.schedule, workers, cluster, whole_number("--activations", activations))
        title = f"{plan.schedule}, {schedule.stages} stages: {max(span.end for span in spans):.3g} s, drain included"
        (folder / f"{plan.schedule}.svg").write_text(draw(schedule, spans, title), encoding="utf-8")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print it with rich if that is installed; else in plain columns. Numbers are aligned to the right."""
    if find_spec("rich") is not None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE)
        for column, heading in enumerate(headings):
            table.add_column(heading, justify="left" if column < 2 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        widest = sum(max(len(row[column]) for row in (headings, *rows)) + 3 for column in range(len(headings)))
        Console(width=widest + 3, highlight=False).print(table)
        return
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    for row in (headings, *rows):
        cells = [
            cell.ljust(w) if column < 2 else cell.rjust(w)
            for column, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _print_servers(plans: Sequence[Plan]) -> None:
    """Say from how many workers on a server's link is the limit."""
    methods: dict[int, list[str]] = {}
    for plan in plans:
        if plan.server_limits_from is not None:
            methods.setdefault(plan.server_limits_from, []).append(plan.method.partition("(")[0])
    for workers, names in sorted(methods.items()):
        print(f"{', '.join(names)}: the server's link is the limit from {workers} workers on.")


def _write_csv(path: Path, plans: Sequence[Plan]) -> None:
    names = [field.name for field in dataclasses.fields(Plan)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(plan) for plan in plans)


def _plot(path: Path, plans: Sequence[Plan], cluster: Cluster, options: argparse.Namespace, element_bytes: int) -> None:
    """Draw the plans: steps on this network, and on slower and faster ones."""
    workers = plans[0].workers
    model_bytes = whole_number("--parameters", options.parameters) * element_bytes
    names = [" ".join(filter(None, _cells(plan, plans[0])[:2])) for plan in plans]
    waiting = [min(plan.exposed_seconds_per_step, plan.seconds_per_step) for plan in plans]
    steps = [(plan.seconds_per_step - waits, waits) for plan, waits in zip(plans, waiting, strict=True)]
    networks: list[list[float]] = [[] for _ in plans]
    for factor in _NETWORKS:
        network = dataclasses.replace(
            cluster,
            bandwidth_bytes_per_second=cluster.bandwidth_bytes_per_second * factor,
            site_bandwidth_bytes_per_second=cluster.site_bandwidth_bytes_per_second * factor,
        )
        others = compare_plans(
            workers, model_bytes, network, options.methods, options.topologies, element_bytes=element_bytes
        )
        for seconds, plan in zip(networks, others, strict=True):
            seconds.append(plan.seconds_per_step)
    where = f"--cluster {options.cluster}" if options.cluster else f"{options.bandwidth}, {workers} workers"
    title = f"Plan: {int(float(options.parameters)):,} parameters, {where}; computed, not measured"
    plot_steps(names, steps, _NETWORKS, networks, path, title)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-decentral plan",
        description="What each method would cost on a given cluster: bytes and seconds per step, without training.",
    )
    parser.add_argument("--parameters", required=True, help="trainable parameters of the model, e.g. 25.6e6")
    parser.add_argument(
        "--cluster",
        metavar="FILE",
        help="a cluster file, as clusters/two_sites.yaml; in place of " + ", ".join(_INSTEAD_OF_A_FILE),
    )
    parser.add_argument("--compute", help="duration of one gradient and update, e.g. 250ms; overrides the file")
    parser.add_argument("--workers", help="number of workers")
    parser.add_argument("--bandwidth", help="of each worker's link: 1gbit (bits) or 125MB/s (bytes)")
    parser.add_argument("--latency", help="of each message, e.g. 1ms (default: 0s)")
    parser.add_argument("--slow", nargs="+", metavar="RANK:FACTOR", help="workers that compute slower")
    parser.add_argument("--slow-link", nargs="+", metavar="RANK:FACTOR", help="workers with a slower link")
    parser.add_argument("--dtype-bytes", default="4", help="bytes per parameter, as it is sent (default: 4)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=EXACT,
        metavar="METHOD",
        help="some of " + ", ".join(METHODS) + " (default: " + ", ".join(EXACT) + ")",
    )
    parser.add_argument(
        "--topologies",
        nargs="+",
        default=TOPOLOGIES,
        metavar="TOPOLOGY",
        help=f"for D-PSGD, some of {', '.join(TOPOLOGY_NAMES)} (default: {', '.join(TOPOLOGIES)})",
    )
    parser.add_argument(
        "--data",
        choices=("alike", "differ"),
        help="whether the data of all workers look alike or differ: then the last lines choose by that, too",
    )
    parser.add_argument(
        "--optimizer",
        choices=("sgd", "momentum", "adaptive"),
        default="sgd",
        help="with --data: yours; adaptive is Adam and its like (default: sgd)",
    )
    parser.add_argument(
        "--activations",
        metavar="BYTES",
        help="of a batch between two stages, e.g. 4e6: then also what pipelines cost, a stage on each worker",
    )
    parser.add_argument(
        "--timelines",
        metavar="FOLDER",
        help="with --activations: also draw when each stage takes which batch, a picture for each schedule",
    )
    parser.add_argument("--csv", metavar="FILE", help="also write the plans here")
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw them, as plan.png: steps by method, on this and on other networks"
    )
    return parser
