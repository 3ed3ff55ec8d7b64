"""Proved here: staleness-aware SGD is its event-ordered reference update by update, with each gradient scaled by
its own staleness before the sum; with one gradient per update by equal workers the staleness is what the paper says."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import servers
from reference.runs import equal_start, gradient_of, simulate
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import APSGD, StalenessAware
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.simulation.cluster import Cluster


@pytest.mark.parametrize(("softness", "number"), [(6, 1), (3, 2), (1, 6), (4, 1)])
def test_it_is_the_reference_update_by_update(softness: int, number: int) -> None:
    problem, algorithm = equal_start(6), StalenessAware(softness)
    assert algorithm.gradients(6) == number
    reference = servers.staleness_aware(problem.start[0], problem.gradient, 0.1, SECONDS, number)
    for mine, theirs in islice(zip(updates(served(algorithm, problem), problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1


def test_one_update_for_all_is_hardly_stale() -> None:
    """The paper's 1-softsync: of equal workers a gradient is 0, 1 or 2 updates old."""
    problem = equal_start(6)
    simulator = simulate(StalenessAware(1), problem, Cluster(compute_seconds=1.0, jitter="lognormal", jitter_scale=0.1))
    simulator.run(gradient_of(problem), 0.05, 60)
    assert set(simulator.workers[0].state["staleness"]) <= {0, 1, 2}


def test_it_is_stable_where_the_plain_one_is_not() -> None:
    """16 workers, at half the rate that is stable without a delay: the staleness is 15."""
    problem = equal_start(16)
    distances = []
    for algorithm in (APSGD(), StalenessAware()):
        simulator = simulate(algorithm, problem, Cluster(compute_seconds=1.0, jitter="lognormal", jitter_scale=0.05))
        simulator.run(gradient_of(problem), 0.5, 60)
        distances.append(float((simulator.consensus().buffers[0] - problem.optimum).abs().max()))
    plain, aware = distances
    assert aware < 1.0 < 1e3 < plain


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"StalenessAware\(softness=5\): needs at most 4, the number of"):
        StalenessAware(5).resolved(4)
    with pytest.raises(ConfigurationError, match="needs the number of workers first"):
        StalenessAware().gradients(4)
