"""Proved here: Ringmaster is its event-ordered reference update by update, and drops exactly what is too stale; with a
threshold of 1 it is the serial SGD of gradients that are not stale; with a large one it is A-PSGD."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import servers
from reference.runs import equal_start
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import APSGD, Ringmaster
from lightning_decentral.errors import ConfigurationError


@pytest.mark.parametrize("threshold", [1, 3, 6])
def test_it_is_the_reference_update_by_update(threshold: int) -> None:
    problem = equal_start(6)
    reference = servers.ringmaster(problem.start[0], problem.gradient, 0.1, SECONDS, threshold)
    simulator = served(Ringmaster(threshold), problem)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
    state = simulator.workers[0].state
    stale = sum(count for staleness, count in state["staleness"].items() if staleness >= threshold)
    assert sum(state["dropped"].values()) == stale > 0


def test_a_threshold_of_one_is_serial_sgd() -> None:
    """Of workers with the same loss: every update is a gradient step from the model that it changes."""
    problem = equal_start(4)
    problem.a, problem.b = problem.a[:1].expand(4, -1), problem.b[:1].expand(4, -1)
    x = problem.start[0].clone()
    for mine in islice(updates(served(Ringmaster(1), problem, [1.0, 1.3, 0.7, 5.1]), problem, 0.1), 60):
        x = x - 0.1 * problem.gradient(x, 0)
        torch.testing.assert_close(mine, x, rtol=0.0, atol=1e-13)


def test_a_large_threshold_is_apsgd() -> None:
    problem = equal_start(6)
    mine, plain = (updates(served(each, problem), problem, 0.1) for each in (Ringmaster(1000), APSGD()))
    assert all(torch.equal(a, b) for a, b in islice(zip(mine, plain, strict=False), 80))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Ringmaster\(threshold=0\): needs a whole number of at least 1"):
        Ringmaster(0)
