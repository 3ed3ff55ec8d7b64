"""Proved here: delay-adaptive SGD is its event-ordered reference update by update; of workers whose gradients are at
most as old as there are workers it is A-PSGD; a worker that comes back after a long time does no harm."""

from __future__ import annotations

from itertools import islice

import torch
from reference import servers
from reference.runs import equal_start
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import APSGD, DelayAdaptive


def test_it_is_the_reference_update_by_update() -> None:
    problem, seconds = equal_start(6), [*SECONDS[:4], 17.03, 1.71]
    reference = servers.delay_adaptive(problem.start[0], problem.gradient, 0.1, seconds)
    simulator = served(DelayAdaptive(), problem, seconds)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
    assert max(simulator.workers[0].state["staleness"]) > 50


def test_of_workers_of_about_one_speed_it_is_apsgd() -> None:
    problem, seconds = equal_start(4), [1.0, 1.01, 1.02, 1.03]
    adaptive, plain = (updates(served(each, problem, seconds), problem, 0.1) for each in (DelayAdaptive(), APSGD()))
    for mine, theirs in islice(zip(adaptive, plain, strict=False), 80):
        assert torch.equal(mine, theirs)


def test_a_gradient_from_long_ago_does_little() -> None:
    """One worker is 300 times slower: its only gradient comes when the others have come to rest."""
    problem, jumps = equal_start(4), []
    problem.a, problem.b = problem.a[:1].expand(4, -1), problem.b[:1].expand(4, -1)
    for algorithm in (DelayAdaptive(), APSGD()):
        models = list(islice(updates(served(algorithm, problem, [1.0, 1.01, 1.02, 300.5]), problem, 0.1), 910))
        moves = torch.stack(models).diff(dim=0).norm(dim=1)
        jumps.append(float(moves[800:].max()))
    assert 0.0 < jumps[0] < 0.01 * jumps[1]  # 4 workers, a delay of 900
