"""Proved here: CoCoD-SGD is its stacked reference step by step under jitter, and its mean moves by the mean of all
steps: no step is lost."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import CoCoDSGD
from lightning_decentral.errors import ConfigurationError

ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = methods.cocod_sgd(problem.start, problem.gradient, rate, torch.eye, 4)
    before = problem.start
    for step, state in enumerate(states(simulate(CoCoDSGD(4), problem, JITTERED), problem, rate, 40)):
        torch.testing.assert_close(state, next(reference), **ROUNDING)
        moved = before.mean(0) - rate(step) * problem.gradient(before).mean(0)
        torch.testing.assert_close(state.mean(0), moved, **ROUNDING)
        before = state


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs at least 1 step"):
        CoCoDSGD(0)
