"""Proved here: SPARTA is its stacked reference step by step under jitter, where exactly the drawn positions are equal
after a step; with all positions it is local SGD with rounds of one step; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import SPARTA, LocalSGD
from lightning_decentral.compression import RandomK
from lightning_decentral.errors import ConfigurationError

ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def drawn(step: int) -> torch.Tensor:
    """Of 50 positions, by a seed that is the step's number."""
    ones, seed = torch.ones(50, dtype=torch.float64), torch.Generator().manual_seed(step)
    return RandomK(0.1).decompress(RandomK(0.1).compress(ones, seed)).nonzero().view(-1)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4, parameters=50)
    reference = methods.sparta(problem.start, problem.gradient, rate, torch.eye, drawn)
    for step, state in enumerate(states(simulate(SPARTA(0.1), problem, JITTERED), problem, rate, 30)):
        torch.testing.assert_close(state, next(reference), **ROUNDING)
        equal = (state == state[:1]).all(0).nonzero().view(-1)
        assert equal.tolist() == drawn(step).tolist()
        assert len(equal) == 5


def test_with_all_positions_it_is_local_sgd_with_rounds_of_one_step() -> None:
    problem = equal_start(4)
    all_of_them = states(simulate(SPARTA(1.0), problem), problem, rate, 20)
    for one, other in zip(all_of_them, states(simulate(LocalSGD(1), problem), problem, rate, 20), strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


def test_what_cannot_work_is_refused() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(ConfigurationError, match="needs"):
            SPARTA(share)
