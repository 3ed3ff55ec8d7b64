"""The command ``torture``: simulated runs in which workers fail, join and stand still, from seeds."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.methods import METHODS
from lightning_decentral.protocol import AbstractOpenRounds
from lightning_decentral.simulation.torture import Schedule, Torture, TortureFailed, torture

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
        """Run as many more."""
        began = time.perf_counter()
        outcomes, failures = torture(algorithm, range(self.seeds, self.seeds + seeds), schedule)
        self.seeds += seeds
        self.seconds += time.perf_counter() - began
        self.failures += map(str, failures)
        self.ended_well += len(outcomes)
        for each in outcomes:
            self.crashes += each.crashes
            self.joins += each.joins
            self.exchanges_cut_in_two += each.interrupted
            self.batches_trained_again += each.repeated

    def show(self) -> None:
        """Print the seeds that did not end well, and a table."""
        for failure in self.failures[:_MOST_SHOWN]:
            print(failure)
        columns = {name.replace("_", " "): value for name, value in dataclasses.asdict(self).items()}
        del columns["failures"]
        columns["seconds"] = f"{self.seconds:.0f}"
        for row in (columns, ["---"] * len(columns), map(str, columns.values())):
            print(f"| {' | '.join(row)} |")


def main(argv: list[str]) -> int:
    """Run schedules; return 0 if all ended well, and 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="lightning-decentral torture",
        description="Simulate runs in which workers crash at any moment, come back, stand still and lose their "
        "connections, and tell the seeds of those that hang, lose an update, count one twice, or disagree.",
    )
    parser.add_argument("--method", default="adpsgd", help="one that OpenStrategy takes (default: adpsgd)")
    parser.add_argument("--seeds", type=int, default=300, help="run so many seeds, from 0 on (default: 300)")
    parser.add_argument(
        "--tally", type=Path, metavar="FILE", help="go on after the seeds whose counts are in this file"
    )
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print what happens when")
    parser.add_argument("--workers", type=int, default=4, help="at the start, 2 or more (default: 4)")
    options = parser.parse_args(argv)
    if options.method not in METHODS:
        raise ConfigurationError(
            f"torture got --method {options.method}, needs one of {', '.join(METHODS)}. Use adpsgd."
        )
    if options.workers < 2 or options.seeds < 1:
        raise ConfigurationError(
            f"torture got --workers {options.workers} and --seeds {options.seeds}, needs 2 workers and a seed at "
            "least. Raise them."
        )
    method = METHODS[options.method].load()
    has_rounds = "every" in inspect.signature(method).parameters and isinstance(method().opened(), AbstractOpenRounds)
    algorithm: Any = (method(every=2) if has_rounds else method()).opened()  # type: ignore[call-arg]
    grace = 3.0 if has_rounds else None
    schedule = Schedule(workers=options.workers, batches=4 * options.workers, grace=grace)
    if options.seed is not None:
        try:
            print(Torture(algorithm, options.seed, schedule, print if options.trace else None).run())
        except TortureFailed as failed:
            print(failed)
            return 1
        return 0
    tally = _Tally(options.method, options.workers)
    if options.tally is not None and options.tally.exists():
        tally = _Tally(**json.loads(options.tally.read_text()))
    if (tally.method, tally.workers) != (options.method, options.workers):
        raise ConfigurationError(
            f"torture got --tally {options.tally} of {tally.workers} workers of {tally.method}, needs one of "
            f"{options.workers} workers of {options.method}. Use another file."
        )
    tally.add(algorithm, options.seeds, schedule)
    if options.tally is not None:
        options.tally.write_text(json.dumps(dataclasses.asdict(tally)))
    tally.show()
    return int(bool(tally.failures))
