"""Proved here: C-PSGD is synchronous SGD step by step, whoever the server is; all its bytes go through the server."""

from __future__ import annotations

import pytest
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import assert_steps_equal, gradient_of, simulate, stacked

from lightning_decentral.algorithms import CPSGD
from lightning_decentral.errors import ConfigurationError


@pytest.mark.parametrize("server", [0, 2])
def test_it_is_synchronous_sgd_step_by_step_under_jitter(server: int) -> None:
    assert_steps_equal(CPSGD(server), methods.c_psgd, equal=True)


def test_all_workers_are_equal_and_the_server_sends_to_all() -> None:
    problem = Quadratic(4)
    problem.start = problem.start[:1].expand(4, -1).clone()
    simulator = simulate(CPSGD(), problem)
    simulator.run(gradient_of(problem), 0.1, 10)
    assert len(stacked(simulator).unique(dim=0)) == 1
    assert [traffic.bytes_sent for traffic in simulator.traffic] == [10 * 3 * 5 * 8, *[10 * 5 * 8] * 3]


def test_it_refuses_a_server_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match="server=4 for 4 workers, needs one of the ranks 0 to 3"):
        CPSGD(4).resolved(4)
