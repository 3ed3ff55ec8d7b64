"""Proved here: Rennala is its event-ordered reference update by update; no gradient of another model is used; of
workers with the same loss it is SGD with mini-batches, whatever their speeds; several gradients of a fast worker
count."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import methods, servers
from reference.runs import equal_start, gradient_of, simulate
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import Rennala
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.simulation.cluster import Cluster


@pytest.mark.parametrize("number", [1, 6, 20])
def test_it_is_the_reference_update_by_update(number: int) -> None:
    problem = equal_start(6)
    reference = servers.rennala(problem.start[0], problem.gradient, 0.1, SECONDS, number)
    simulator = served(Rennala(number), problem)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 60):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 60 updates of values around 1
    state = simulator.workers[0].state
    assert sum(state["accepted"].values()) - state["heard"] == 60 * number
    assert (state["accepted"][4] > 0) == (number == 20)  # the slowest finishes none at the newest model otherwise
    assert state["accepted"][3] > state["accepted"][5]


def test_equal_workers_with_one_loss_are_synchronous_sgd_with_mini_batches() -> None:
    problem = equal_start(4)
    problem.a, problem.b = problem.a[:1].expand(4, -1), problem.b[:1].expand(4, -1)
    reference = methods.sync_sgd(problem.start, problem.gradient, lambda step: 0.1, None)
    for mine, theirs in islice(
        zip(updates(served(Rennala(), problem, [1.0] * 4), problem, 0.1), reference, strict=False), 40
    ):
        torch.testing.assert_close(mine, theirs[0], rtol=0.0, atol=1e-13)


def test_nobody_waits_for_a_slow_worker() -> None:
    problem = equal_start(4)
    simulator = simulate(Rennala(12), problem, Cluster(compute_seconds=1.0, slowdown={3: 1000.0}))
    simulator.run(gradient_of(problem), 0.05, 1)  # of each, so of the slow one
    assert simulator.workers[0].state["version"] == 0
    assert simulator.seconds == pytest.approx(1000.0)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Rennala\(gradients=0\): needs a whole number of at least 1"):
        Rennala(0)
