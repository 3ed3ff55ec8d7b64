"""Is a gradient ever applied twice, or lost without being counted? A thousand schedules of each method with a server.

    python -m lightning_decentral.lab.benchmarks.schedules [--seeds 1000]

A schedule is drawn from its seed: workers, their speeds (now and then one takes a hundred times as long), steps,
latency, whether the server trains; and from one to four micro-batches of a gradient, if the method gives gradients up
between them: those that are given up are cancelled, and counted as well. Each gradient is a direction of its own, so
that the model says which of them were applied, and with which weight; and that is compared with what the server has
counted.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_decentral.algorithms import (
    APSGD,
    BackupWorkers,
    DelayAdaptive,
    Malenia,
    Rennala,
    Ringleader,
    Ringmaster,
    StalenessAware,
    StaleSynchronous,
)
from lightning_decentral.algorithms.server import AbstractServer
from lightning_decentral.flat import Vector
from lightning_decentral.lab.results import environment
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.worker import Worker

METHODS: tuple[AbstractServer, ...] = (
    APSGD(),
    APSGD(3),
    StalenessAware(),
    StalenessAware(softness=1),
    BackupWorkers(),
    DelayAdaptive(),
    StaleSynchronous(1),
    Ringmaster(),
    Ringleader(),
    Rennala(),
    Rennala(7),
    Malenia(5),
)
_SCALED = (StalenessAware, DelayAdaptive)  # by staleness
_JITTERED = Cluster(jitter="pareto", bandwidth_bytes_per_second=100.0, slowdown={1: 4.0})


@dataclass(frozen=True)
class Counts:
    """Gradients of a schedule: computed, in the model, dropped, waiting for an update at the end, and cancelled."""

    made: int = 0
    applied: int = 0
    dropped: int = 0
    waiting: int = 0
    cancelled: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Add those of another schedule."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(mine + theirs for mine, theirs in pairs))


def check(method: AbstractServer, seed: int) -> Counts:
    """Run one schedule.

    Raises:
        AssertionError: if a gradient was applied twice, or is missing in the server's counts.
    """
    draw = random.Random(seed)
    algorithm = replace(method, server=draw.choice(["beside", "dedicated"]))  # type: ignore[arg-type]
    workers, steps = draw.randint(2, 5), draw.randint(1, 7)
    cluster = replace(_JITTERED, jitter_scale=draw.choice([0.8, 1.5]), latency_seconds=draw.choice([0.0, 0.3, 2.0]))
    start = [Vector([torch.zeros(workers * steps, dtype=torch.float64)]) for _ in range(workers)]
    micro_batches = 1 + seed % 4 if algorithm.asks else 1
    simulator, made = Simulator(algorithm, start, cluster, seed, micro_batches=micro_batches), 0

    def one_hot(worker: Worker, size: int = workers * steps) -> Vector:
        nonlocal made
        vector = torch.zeros(size, dtype=torch.float64)
        vector[made], made = 1.0, made + 1
        return Vector([vector])

    simulator.run(one_hot, 1.0, steps)
    server = simulator.workers[0]
    assert isinstance(server.x, Vector)
    state, applied = server.state, -server.x.buffers[0]
    accepted, dropped, waiting = sum(state["accepted"].values()), sum(state["dropped"].values()), _waiting(state)
    where = f"{algorithm}, seed {seed}"
    assert accepted + dropped == made == steps * (workers - (algorithm.server == "dedicated")), where
    cancelled = sum(state.get("cancelled", {}).values())
    assert sum(state["staleness"].values()) == made + cancelled, where
    assert int((applied != 0).sum()) == accepted - waiting, where
    assert bool((applied >= 0).all()), where
    if isinstance(algorithm, _SCALED):
        assert bool((applied <= 1.0).all()), where
    else:  # each update is a mean of gradients, or a mean of means
        assert abs(float(applied.sum()) - state["version"]) < 1e-12 * (1 + made), where
    if not isinstance(algorithm, (*_SCALED, Malenia, Ringleader)):
        assert len({round(float(each), 12) for each in applied if each}) <= 1, where  # all count the same, each once
    return Counts(made, accepted - waiting, dropped, waiting, cancelled)


def _waiting(state: dict[str, Any]) -> int:
    """Count the gradients that were accepted, and wait for an update."""
    if "served" not in state:
        return int(state["heard"])
    side = 1 - state["side"] if state["served"] else state["side"]
    return sum(state.get(f"table {side}: counts", {}).values())


def main() -> None:
    """Check all methods, and print what became of their gradients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    seeds = parser.parse_args().seeds
    began = time.process_time()
    print(f"# Gradients at a server under {seeds:,} schedules of each method\n\n{environment()}\n")
    print("| method | schedules | gradients | applied once | dropped | waiting at the end | cancelled |")
    print("|---|---|---|---|---|---|---|")
    for method in METHODS:
        total = sum((check(method, seed) for seed in range(seeds)), Counts())
        cells = (seeds, total.made, total.applied, total.dropped, total.waiting, total.cancelled)
        print(f"| {method} | {' | '.join(f'{each:,}' for each in cells)} |", flush=True)
    print(
        f"\nNone was applied twice, or lost without being counted. {time.process_time() - began:.0f} processor seconds."
    )


if __name__ == "__main__":
    main()
