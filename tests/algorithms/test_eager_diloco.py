"""Proved here: DiLoCo with eager updates is its stacked reference step by step under jitter; one worker alone is
DiLoCo; differences under way are in checkpoints; an average that takes less than a round costs no time; and what cannot
work is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, equal_start, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import DiLoCo, EagerDiLoCo
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.planner import plan
from lightning_decentral.simulation.cluster import Cluster

ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = methods.eager_diloco(problem.start, problem.gradient, rate, torch.eye, 4, 0.6, 0.8)
    for state in states(simulate(EagerDiLoCo(4, 0.6, 0.8), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_one_worker_alone_is_diloco() -> None:
    problem = equal_start(1)
    eager = states(simulate(EagerDiLoCo(4), problem), problem, rate, 30)
    for one, other in zip(eager, states(simulate(DiLoCo(4), problem), problem, rate, 30), strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


def test_what_is_under_way_is_in_the_checkpoint() -> None:
    problem, algorithm = equal_start(4), EagerDiLoCo(4)
    uninterrupted, paused, resumed = (simulate(algorithm, problem, JITTERED, seed) for seed in (0, 0, 9))
    uninterrupted.run(gradient_of(problem), 0.1, 25)
    paused.run(gradient_of(problem), 0.1, 6)
    resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
    resumed.run(gradient_of(problem), 0.1, 19)
    assert torch.equal(stacked(resumed), stacked(uninterrupted))


def test_an_average_within_a_round_costs_no_time() -> None:
    """It takes 7 s on this link, a round 8 s."""
    cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=25e6)
    hidden = plan(EagerDiLoCo(32), workers=8, model_bytes=100_000_000, cluster=cluster)
    assert hidden.seconds_per_step == pytest.approx(0.25, rel=1e-3)


def test_what_cannot_work_is_refused() -> None:
    for options in ({"outer_learning_rate": 0.0}, {"outer_momentum": 1.0}, {"every": 0}):
        with pytest.raises(ConfigurationError, match="needs"):
            EagerDiLoCo(**options)  # type: ignore[arg-type]
