"""The command ``torture``: simulated runs in which workers fail, join and stand still, from seeds."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.methods import METHODS
from lightning_decentral.simulation.torture import Schedule, Torture, TortureFailed, torture

_MOST_SHOWN = 20


def main(argv: list[str]) -> int:
    """Run schedules; return 0 if all ended well, and 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="lightning-decentral torture",
        description="Simulate runs in which workers crash at any moment, come back, stand still and lose their "
        "connections, and tell the seeds of those that hang, lose an update, count one twice, or disagree.",
    )
    parser.add_argument("--method", default="adpsgd", help="one that OpenStrategy takes (default: adpsgd)")
    parser.add_argument("--seeds", type=int, default=300, help="run the seeds from 0 to this (default: 300)")
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
    algorithm: Any = METHODS[options.method].load()()
    if not algorithm.tolerates_loss or not hasattr(algorithm, "among"):
        raise ConfigurationError(
            f"torture got --method {options.method}, whose workers cannot go on without one; it needs a method that "
            "tolerates a loss. Use adpsgd."
        )
    schedule = Schedule(workers=options.workers, batches=4 * options.workers)
    began = time.perf_counter()
    if options.seed is not None:
        try:
            print(Torture(algorithm, options.seed, schedule, print if options.trace else None).run())
        except TortureFailed as failed:
            print(failed)
            return 1
        return 0
    outcomes, failures = torture(algorithm, range(options.seeds), schedule)
    for failure in failures[:_MOST_SHOWN]:
        print(failure)
    print(
        f"{options.method}: {len(outcomes)} of {options.seeds} schedules ended well in "
        f"{time.perf_counter() - began:.1f} s; {sum(each.crashes for each in outcomes)} crashes, "
        f"{sum(each.joins for each in outcomes)} joins, {sum(each.interrupted for each in outcomes)} exchanges cut in "
        f"two, {sum(each.repeated for each in outcomes)} batches trained again"
    )
    return int(bool(failures))
