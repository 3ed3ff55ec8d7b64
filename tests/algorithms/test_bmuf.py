"""Proved here: BMUF is its stacked reference step by step under jitter; without Nesterov's form it is SlowMo; its
default momentum follows the number of workers; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import BMUF, SlowMo
from lightning_decentral.errors import ConfigurationError

ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = methods.bmuf(problem.start, problem.gradient, rate, torch.eye, 5, 0.75, 0.9)
    for state in states(simulate(BMUF(5, block_learning_rate=0.9), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_in_the_classical_form_it_is_slow_momentum() -> None:
    problem = equal_start(4)
    classical = states(simulate(BMUF(4, 0.5, nesterov=False), problem), problem, rate, 30)
    for one, other in zip(classical, states(simulate(SlowMo(4, 0.5), problem), problem, rate, 30), strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


def test_what_cannot_work_is_refused() -> None:
    for options in ({"block_momentum": 1.0}, {"block_learning_rate": 0.0}, {"every": 0}):
        with pytest.raises(ConfigurationError, match="needs"):
            BMUF(**options)  # type: ignore[arg-type]
