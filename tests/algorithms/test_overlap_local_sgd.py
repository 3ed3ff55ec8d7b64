"""Proved here: Overlap-Local-SGD is its stacked reference step by step under jitter, with and without a momentum of its
anchor; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import OverlapLocalSGD
from lightning_decentral.errors import ConfigurationError

ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_it_is_the_reference_step_by_step_under_jitter(momentum: float) -> None:
    problem = equal_start(4)
    reference = methods.overlap_local_sgd(problem.start, problem.gradient, rate, torch.eye, 4, 0.4, momentum)
    for state in states(simulate(OverlapLocalSGD(4, 0.4, momentum), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_what_cannot_work_is_refused() -> None:
    for options in ({"pull": 0.0}, {"anchor_momentum": 1.0}, {"every": 0}):
        with pytest.raises(ConfigurationError, match="needs"):
            OverlapLocalSGD(**options)  # type: ignore[arg-type]
