"""Proved here: Malenia is its event-ordered reference update by update, and each update the exact mean over the
workers, however many gradients each has sent; it makes one as soon as the harmonic mean of these numbers is large
enough."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import methods, servers
from reference.runs import equal_start
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import Malenia
from lightning_decentral.errors import ConfigurationError


@pytest.mark.parametrize("number", [1, 6, 20])
def test_it_is_the_reference_and_so_synchronous_sgd(number: int) -> None:
    """The gradients of a worker at one model are the same here: their mean is one of them."""
    problem = equal_start(6)
    reference = servers.malenia(problem.start[0], problem.gradient, 0.1, SECONDS, number)
    synchronous = methods.sync_sgd(problem.start, problem.gradient, lambda step: 0.1, None)
    simulator = served(Malenia(number), problem)
    state, before, made = simulator.workers[0].state, 0, 0
    for mine, theirs, same in islice(zip(updates(simulator, problem, 0.1), reference, synchronous, strict=False), 40):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 40 updates of values around 1
        torch.testing.assert_close(mine, same[0], rtol=0.0, atol=1e-12)  # sums of up to 12 gradients
        made, before = made + 1, sum(state["accepted"].values())
    assert before >= made * max(6, number)  # a harmonic mean is at most the mean
    assert state["accepted"][3] > state["accepted"][4] >= made


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Malenia\(gradients=0\): needs a whole number of at least 1"):
        Malenia(0)
