"""Proved here: EASGD is its stacked reference step by step under jitter; an exchange conserves the sum of the workers
and the centre; its mean is computed beside the gradient; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, buffer_of, equal_start, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import EASGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.planner import plan
from lightning_decentral.simulation.cluster import Cluster

ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize("every", [1, 4])
def test_it_is_the_reference_step_by_step_under_jitter(every: int) -> None:
    problem = equal_start(4)
    reference = methods.easgd(problem.start, problem.gradient, rate, torch.eye, every, 0.8)
    for state in states(simulate(EASGD(every, 0.8), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_an_exchange_conserves_the_sum_of_workers_and_centre() -> None:
    problem = equal_start(4)
    simulator = simulate(EASGD(2), problem)
    simulator.run(gradient_of(problem), 0.2, 6)

    def total() -> torch.Tensor:
        return stacked(simulator).sum(0) + buffer_of(simulator.workers[0].state["centre"])

    before = total()
    simulator.run(gradient_of(problem), 0.0, 1)
    torch.testing.assert_close(total(), before, **ROUNDING)


def test_the_mean_is_computed_beside_the_gradient() -> None:
    cluster = Cluster(compute_seconds=1.0, bandwidth_bytes_per_second=200e6)  # it takes 0.875 s
    assert plan(EASGD(1), 8, 100_000_000, cluster).seconds_per_step == pytest.approx(1.0, rel=1e-3)


def test_what_cannot_work_is_refused() -> None:
    for options in ({"moving_rate": 1.0}, {"moving_rate": 0.0}, {"every": 0}):
        with pytest.raises(ConfigurationError, match="needs"):
            EASGD(**options)  # type: ignore[arg-type]
