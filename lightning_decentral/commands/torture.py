"""The command ``torture``: simulated runs in which workers fail, join and stand still, from seeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.methods import METHODS
from lightning_decentral.protocol import AbstractOpenRounds
from lightning_decentral.simulation.torture import Schedule, Torture, TortureFailed, shrink, torture

_MOST_SHOWN = 20


@dataclass
class _Tally:
    """What came of the schedules so far."""

    method: str
    workers: int
    seeds: int = 0
    ended_well: int = 0
    crashes: int = 0
    joins: int = 0
    exchanges_cut_in_two: int = 0
    batches_trained_again: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, algorithm: Any, seeds: int, schedule: Schedule) -> None:
        """Run as many more; and those again that did not end well, of which the fault may be mended."""
        began = time.perf_counter()
        failed = [int(each.split()[1].rstrip(":")) for each in self.failures]
        outcomes, failures = torture(algorithm, [*failed, *range(self.seeds, self.seeds + seeds)], schedule)
        self.seeds += seeds
        self.seconds += time.perf_counter() - began
        self.failures = [str(each) for each in failures]
        self.ended_well += len(outcomes)
        for each in outcomes:
            self.crashes += each.crashes
            self.joins += each.joins
            self.exchanges_cut_in_two += each.interrupted
            self.batches_trained_again += each.repeated

    @property
    def row(self) -> dict[str, str]:
        """The row of a table."""
        columns = {name.replace("_", " "): f"{value}" for name, value in dataclasses.asdict(self).items()}
        del columns["failures"]
        return columns | {"seconds": f"{self.seconds:.0f}"}


def _show(tallies: list[_Tally]) -> None:
    """Print the seeds that did not end well, and a table."""
    for tally in tallies:
        for failure in tally.failures[:_MOST_SHOWN]:
            print(f"{tally.method}: {failure}")
    columns = tallies[0].row
    for row in (columns, ["---"] * len(columns), *(tally.row.values() for tally in tallies)):
        print(f"| {' | '.join(row)} |")


def _opened(name: str) -> tuple[Any, bool]:
    """Return a method for workers that come and go, with short rounds, and whether it has any."""
    if name not in METHODS:
        raise ConfigurationError(f"torture got --method {name}, needs one of {', '.join(METHODS)}. Use adpsgd.")
    method = METHODS[name].load()
    opened = method().opened()
    if isinstance(opened, AbstractOpenRounds) and opened.may_end_early:
        return method(every=2).opened(), True  # type: ignore[call-arg]
    if opened.needs and not opened.updates_in_answers:  # local steps; the books are of sums, without a momentum
        plain = {"outer_momentum": 0.0} if hasattr(method, "outer_momentum") else {}
        return method(every=2, **plain).opened(), False  # type: ignore[call-arg]
    return opened, False


def main(argv: list[str]) -> int:
    """Run schedules; return 0 if all ended well, and 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="lightning-decentral torture",
        description="Simulate runs in which workers crash at any moment, come back, stand still and lose their "
        "connections, and tell the seeds of those that hang, lose an update, count one twice, or disagree.",
    )
    parser.add_argument(
        "--method", default="adpsgd", help="that OpenStrategy takes, or several with commas (default: adpsgd)"
    )
    parser.add_argument("--seeds", type=int, default=300, help="run so many seeds, from 0 on (default: 300)")
    parser.add_argument(
        "--tally",
        type=Path,
        metavar="FILE",
        help="go on after the seeds whose counts are in this file, by method; those that failed are run again",
    )
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happens when")
    parser.add_argument(
        "--shrink",
        action="store_true",
        help="with --seed: leave out what disturbs the run as long as it does not end well, and tell what is left",
    )
    parser.add_argument("--workers", type=int, default=4, help="at the start, 2 or more (default: 4)")
    options = parser.parse_args(argv)
    names = options.method.split(",")
    if options.workers < 2 or options.seeds < 1:
        raise ConfigurationError(
            f"torture got --workers {options.workers} and --seeds {options.seeds}, needs 2 workers and a seed at "
            "least. Raise them."
        )
    if options.seed is not None and len(names) > 1:
        raise ConfigurationError(
            f"torture got --seed and {len(names)} methods, needs one. Name the method of that seed."
        )
    opened = {name: _opened(name) for name in names}

    def schedule(has_rounds: bool) -> Schedule:
        return Schedule(options.workers, batches=4 * options.workers, grace=3.0 if has_rounds else None)

    if options.shrink and options.seed is None:
        raise ConfigurationError(
            "torture got --shrink without a seed, needs one that does not end well. Add --seed, with one that it told."
        )
    if options.seed is not None:
        algorithm, has_rounds = opened[names[0]]
        plan, trace = schedule(has_rounds), print if options.trace else None
        without: frozenset[int] = frozenset()
        if options.shrink:
            without, left, _ = shrink(algorithm, options.seed, plan)
            print(f"seed {options.seed} needs of what disturbs it: {'; '.join(left) or 'nothing'}")
        try:
            print(Torture(algorithm, options.seed, plan, trace, without).run())
        except TortureFailed as failed:
            print(failed)
            return 1
        return 0
    tallies = {name: _Tally(name, options.workers) for name in names}
    if options.tally is not None and options.tally.exists():
        tallies |= {name: _Tally(**tally) for name, tally in json.loads(options.tally.read_text()).items()}
    for name, (algorithm, has_rounds) in opened.items():
        tally = tallies[name]
        if tally.workers != options.workers:
            raise ConfigurationError(
                f"torture got --tally {options.tally}, of {tally.workers} workers of {name}, and --workers "
                f"{options.workers}; it needs as many. Use another file."
            )
        tally.add(algorithm, options.seeds, schedule(has_rounds))
        if options.tally is not None:
            options.tally.write_text(json.dumps({each: dataclasses.asdict(one) for each, one in tallies.items()}))
    _show([tallies[name] for name in names])
    return int(any(tallies[name].failures for name in names))
