"""``lightning-decentral plan``: what each method would cost on a given cluster, and which one to use.

Nothing is trained and no tensor is made: the methods run in the planner (`lightning_decentral.transport.planner`).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.topology import TOPOLOGY_NAMES
from lightning_decentral.transport.network import Cluster
from lightning_decentral.transport.planner import METHODS, TOPOLOGIES, Plan, compare_plans, recommend

_BANDWIDTHS = {
    "bit": 1 / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "tbit": 1e12 / 8,
    "B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12,
}  # fmt: skip
_DURATIONS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_HEADINGS = ("method", "topology", "s/step", "waiting", "sent/step", "steps/s, all", "speed", "gap", "rounds")
_EXPLANATION = """\
s/step: of one worker. waiting: share of it in which a worker only waits, for others or for the network. sent/step: by
one worker. steps/s, all: of all workers together. speed: relative to the first row. gap, rounds: how well a step's
averaging mixes (gap 1: exact, within a period; rounds: steps until 0.1 % of a disagreement is left)."""


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
    options = _parser().parse_args(argv)
    workers = whole_number("--workers", options.workers)
    model_bytes = whole_number("--parameters", options.parameters) * whole_number("--dtype-bytes", options.dtype_bytes)
    cluster = Cluster(
        compute_seconds=parse_seconds("--compute", options.compute),
        slowdown=parse_factors("--slow", options.slow),
        bandwidth_bytes_per_second=parse_bandwidth("--bandwidth", options.bandwidth),
        latency_seconds=parse_seconds("--latency", options.latency),
        slow_links=parse_factors("--slow-link", options.slow_link),
    )
    plans = compare_plans(workers, model_bytes, cluster, tuple(options.methods), tuple(options.topologies))
    if options.csv is not None:
        _write_csv(Path(options.csv), plans)
    _print_table(_HEADINGS, [_cells(plan, plans[0]) for plan in plans])
    print(_EXPLANATION)
    print()
    print(recommend(plans).reason)
    return 0


def whole_number(option: str, text: str) -> int:
    """A positive whole number, also as ``25.6e6``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 1 and math.isfinite(value) and value == int(value)):
        raise ConfigurationError(
            f"{option} got {text!r}, needs a whole number of at least 1. Write for example {option} 16, or 25.6e6."
        )
    return int(value)


def parse_seconds(option: str, text: str) -> float:
    """Seconds of a duration such as ``250ms``.

    Example:
        >>> parse_seconds("--latency", "250us")
        0.00025
    """
    return _with_unit(option, text, _DURATIONS, "a duration", "250ms")


def parse_bandwidth(option: str, text: str) -> float:
    """Bytes per second of ``1gbit`` (bits per second) or ``125MB/s`` (bytes per second); ``inf`` is no limit.

    Example:
        >>> parse_bandwidth("--bandwidth", "1gbit"), parse_bandwidth("--bandwidth", "125MB/s")
        (125000000.0, 125000000.0)
    """
    return math.inf if text == "inf" else _with_unit(option, text, _BANDWIDTHS, "a bandwidth", "1gbit or 125MB/s")


def parse_factors(option: str, texts: Sequence[str]) -> dict[int, float]:
    """Rank -> factor, of texts such as ``3:10``."""
    factors: dict[int, float] = {}
    for text in texts:
        match = re.fullmatch(r"(\d+):(\d+(?:\.\d+)?)", text)
        if match is None:
            raise ConfigurationError(
                f"{option} got {text!r}, needs RANK:FACTOR. "
                f"Write for example {option} 3:10 for worker 3, ten times slower."
            )
        factors[int(match[1])] = float(match[2])
    return factors


def _with_unit(option: str, text: str, units: Mapping[str, float], what: str, example: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z/]*)", text.strip())
    # Bits are written in any case (Gbit, gbit); in bytes per second the case tells B from bit, so it matters.
    written = "" if match is None else match[2]
    unit = written if written in units else written.lower()
    try:
        number = float(match[1]) if match is not None else math.nan
    except ValueError:
        number = math.nan
    if unit not in units or not number >= 0:
        raise ConfigurationError(
            f"{option} got {text!r}, needs {what}: a number and one of {', '.join(units)}. "
            f"Write for example {option} {example}."
        )
    return number * units[unit]


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


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """With rich if it is installed; else plain columns. Numbers are aligned to the right."""
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


def _write_csv(path: Path, plans: Sequence[Plan]) -> None:
    names = [field.name for field in dataclasses.fields(Plan)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(plan) for plan in plans)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-decentral plan",
        description="What each method would cost on a given cluster: bytes and seconds per step, without training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--parameters", required=True, help="trainable parameters of the model, e.g. 25.6e6")
    parser.add_argument("--workers", required=True, help="number of workers")
    parser.add_argument("--bandwidth", required=True, help="of each worker's link: 1gbit (bits) or 125MB/s (bytes)")
    parser.add_argument("--compute", required=True, help="duration of one gradient and update, e.g. 250ms")
    parser.add_argument("--latency", default="0s", help="of each message, e.g. 1ms")
    parser.add_argument("--slow", nargs="+", default=[], metavar="RANK:FACTOR", help="workers that compute slower")
    parser.add_argument("--slow-link", nargs="+", default=[], metavar="RANK:FACTOR", help="workers with a slower link")
    parser.add_argument("--dtype-bytes", default="4", help="bytes per parameter, as it is sent")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="some of " + ", ".join(METHODS))
    parser.add_argument(
        "--topologies",
        nargs="+",
        default=TOPOLOGIES,
        metavar="TOPOLOGY",
        help="for D-PSGD, some of " + ", ".join(TOPOLOGY_NAMES),
    )
    parser.add_argument("--csv", metavar="FILE", help="also write the plans here")
    return parser
