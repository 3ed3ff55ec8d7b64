"""Proved here: stale-synchronous SGD is its event-ordered reference update by update; nobody gets more than the bound
ahead of the slowest; a large bound is A-PSGD."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import servers
from reference.runs import equal_start
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import APSGD, StaleSynchronous
from lightning_decentral.errors import ConfigurationError


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_it_is_the_reference_update_by_update(bound: int) -> None:
    problem = equal_start(6)
    reference = servers.stale_synchronous(problem.start[0], problem.gradient, 0.1, SECONDS, bound)
    simulator = served(StaleSynchronous(bound), problem)
    clocks = simulator.workers[0].state["accepted"]
    ahead = 0
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
        ahead = max(ahead, max(clocks.values()) - min(clocks.values()))
    assert ahead == bound + 1  # with the gradient that waits


def test_a_large_bound_is_apsgd() -> None:
    problem = equal_start(6)
    bounded, plain = (updates(served(each, problem), problem, 0.1) for each in (StaleSynchronous(1000), APSGD()))
    for mine, theirs in islice(zip(bounded, plain, strict=False), 80):
        assert torch.equal(mine, theirs)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"StaleSynchronous\(bound=-1\): needs a whole number of at least 0"):
        StaleSynchronous(-1)
