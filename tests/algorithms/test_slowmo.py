"""Proved here: SlowMo is its stacked reference step by step under jitter; without slow momentum it is local SGD; its
momentum is in checkpoints; and what cannot work is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, equal_start, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import LocalSGD, SlowMo
from lightning_decentral.errors import ConfigurationError

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = methods.slowmo(problem.start, problem.gradient, rate, torch.eye, 5, 0.6, 0.9)
    for state in states(simulate(SlowMo(5, 0.6, 0.9), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_without_slow_momentum_it_is_local_sgd() -> None:
    problem = equal_start(4)
    slow = states(simulate(SlowMo(4, 0.0), problem), problem, rate, 30)
    for one, other in zip(slow, states(simulate(LocalSGD(4), problem), problem, rate, 30), strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


def test_its_momentum_is_in_the_checkpoint() -> None:
    problem = equal_start(4)
    uninterrupted, paused, resumed = (simulate(SlowMo(3), problem, JITTERED, seed) for seed in (0, 0, 9))
    uninterrupted.run(gradient_of(problem), 0.1, 20)
    paused.run(gradient_of(problem), 0.1, 8)
    resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
    resumed.run(gradient_of(problem), 0.1, 12)
    assert torch.equal(stacked(resumed), stacked(uninterrupted))


def test_what_cannot_work_is_refused() -> None:
    for options in ({"slow_momentum": 1.0}, {"slow_learning_rate": 0.0}, {"every": 0}):
        with pytest.raises(ConfigurationError, match="needs"):
            SlowMo(**options)  # type: ignore[arg-type]
