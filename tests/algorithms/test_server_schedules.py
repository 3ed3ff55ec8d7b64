"""Proved here, for every method with a server: no gradient is applied twice, or lost without being counted, in any of a
thousand schedules of workers, speeds and lengths that are drawn from seeds. Each gradient is a direction of its own, so
that the model says which of them have been applied, and with which weight."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.runs import JITTERED, buffer_of

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
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.worker import Worker

METHODS = [
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
]
SCALED = (StalenessAware, DelayAdaptive)
SEEDS = 84  # times 12 methods: 1,008


def pending(state: dict[str, Any]) -> int:
    """Gradients that were accepted, and wait for an update."""
    if "served" not in state:
        return int(state["heard"])
    side = 1 - state["side"] if state["served"] else state["side"]
    return sum(state.get(f"table {side}: counts", {}).values())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_no_gradient_is_applied_twice_or_lost_without_being_counted(method: AbstractServer) -> None:
    for seed in range(SEEDS):
        draw = random.Random(seed)
        algorithm = replace(method, server=draw.choice(["beside", "dedicated"]))  # type: ignore[arg-type]
        workers, steps = draw.randint(2, 5), draw.randint(1, 7)
        cluster = replace(JITTERED, jitter_scale=draw.choice([0.8, 1.5]), latency_seconds=draw.choice([0.0, 0.3, 2.0]))
        start = [Vector([torch.zeros(workers * steps, dtype=torch.float64)]) for _ in range(workers)]
        simulator, made = Simulator(algorithm, start, cluster, seed), 0

        def one_hot(worker: Worker, size: int = workers * steps) -> Vector:
            nonlocal made
            vector = torch.zeros(size, dtype=torch.float64)
            vector[made], made = 1.0, made + 1
            return Vector([vector])

        simulator.run(one_hot, 1.0, steps)
        state, applied = simulator.workers[0].state, -buffer_of(simulator.workers[0].x)
        accepted, dropped = sum(state["accepted"].values()), sum(state["dropped"].values())
        assert accepted + dropped == made == steps * (workers - (algorithm.server == "dedicated"))
        assert sum(state["staleness"].values()) == made
        assert int((applied != 0).sum()) == accepted - pending(state)
        assert bool((applied >= 0).all())
        if isinstance(algorithm, SCALED):
            assert bool((applied <= 1.0).all())
        else:  # each update is a mean of gradients, or a mean of means
            assert float(applied.sum()) == pytest.approx(state["version"], abs=1e-12)
        if not isinstance(algorithm, (*SCALED, Malenia, Ringleader)):
            assert len({round(float(each), 12) for each in applied if each}) <= 1  # all count the same, each once
