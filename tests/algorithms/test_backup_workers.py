"""Proved here: backup workers are their event-ordered reference update by update; no gradient of another step is used;
without backups they are synchronous SGD; a step takes as long as its slowest gradient that is needed."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import methods, servers
from reference.runs import equal_start, gradient_of, simulate
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import BackupWorkers
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.simulation.cluster import Cluster


@pytest.mark.parametrize("needed", [1, 4, 5])
def test_it_is_the_reference_update_by_update(needed: int) -> None:
    problem = equal_start(6)
    reference = servers.backup_workers(problem.start[0], problem.gradient, 0.1, SECONDS, needed)
    simulator = served(BackupWorkers(needed), problem)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
    state = simulator.workers[0].state
    assert state["dropped"][4] > 0  # the slowest
    assert sum(state["accepted"].values()) in (120 * needed - 1, 120 * needed)


def test_without_backups_it_is_synchronous_sgd() -> None:
    problem = equal_start(6)
    reference = methods.sync_sgd(problem.start, problem.gradient, lambda step: 0.1, None)
    for mine, theirs in islice(
        zip(updates(served(BackupWorkers(6), problem), problem, 0.1), reference, strict=False), 60
    ):
        torch.testing.assert_close(mine, theirs[0], rtol=0.0, atol=1e-13)


def test_a_step_takes_as_long_as_the_slowest_that_is_needed() -> None:
    problem = equal_start(6)
    simulator = simulate(BackupWorkers(4), problem, Cluster(compute_seconds=1.0, slowdown={4: 10.0, 5: 10.0}))
    simulator.run(gradient_of(problem), 0.05, 40)
    version = simulator.workers[0].state["version"]
    assert version >= 40
    assert simulator.workers[0].step == 40
    assert 0.0 < float((simulator.consensus().buffers[0] - problem.optimum).abs().max()) < 1.0


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"BackupWorkers\(needed=5\): needs at most 4, the number of workers"):
        BackupWorkers(5).resolved(4)
    with pytest.raises(ConfigurationError, match=r"BackupWorkers\(needed=4\): needs at most 3"):
        BackupWorkers(4, server="dedicated").resolved(4)
    assert BackupWorkers().resolved(100) == BackupWorkers(96)
