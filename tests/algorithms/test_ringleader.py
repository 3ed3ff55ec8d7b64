"""Proved here: Ringleader is its event-ordered reference update by update; it rests at the optimum, of workers of which
one is ten times slower than another, where A-PSGD does not; a gradient is at most ``2 n - 2`` updates old."""

from __future__ import annotations

from itertools import islice

import torch
from reference import servers
from reference.runs import equal_start
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import APSGD, Ringleader


def test_it_is_the_reference_update_by_update() -> None:
    problem = equal_start(6)
    reference = servers.ringleader(problem.start[0], problem.gradient, 0.1, SECONDS)
    simulator = served(Ringleader(), problem)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
    assert max(simulator.workers[0].state["staleness"]) <= 2 * 6 - 2
    assert sum(simulator.workers[0].state["dropped"].values()) == 0


def test_it_rests_at_the_optimum_whatever_the_speeds() -> None:
    problem, seconds = equal_start(6), [1.0, 1.37, 2.11, 0.83, 5.03, 9.71]
    distances = []
    for algorithm in (Ringleader(), APSGD()):
        last = list(islice(updates(served(algorithm, problem, seconds), problem, 0.05), 1500))[-1]
        distances.append(float((last - problem.optimum).abs().max()))
    assert distances[0] < 1e-6
    assert distances[1] > 0.2
