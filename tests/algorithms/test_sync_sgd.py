"""Proved here: synchronous SGD is its stacked reference step by step whatever the cluster does, and a single SGD on the
mean of all workers' losses."""

from __future__ import annotations

import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import SyncSGD

# Float64, values around 1, at most 40 steps that contract: rounding stays within a few units of 2e-16.
ROUNDING = {"rtol": 0.0, "atol": 1e-14}


def rate(step: int) -> float:
    return 0.3 / (1 + step)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = Quadratic(5)
    reference = methods.sync_sgd(problem.start, problem.gradient, rate, lambda step: torch.eye(5))
    for state in states(simulate(SyncSGD(), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_workers_that_start_equal_stay_equal_bit_for_bit_and_are_sgd_on_the_mean_loss() -> None:
    problem = Quadratic(5)
    problem.start = problem.start[:1].expand(5, -1).clone()
    simulator = simulate(SyncSGD(), problem, JITTERED)
    x = problem.start[0].clone()
    for state in states(simulator, problem, rate, 40):
        x -= 0.3 / simulator.workers[0].step * (problem.a.mean(0) * x - (problem.a * problem.b).mean(0))
        assert bool((state == state[0]).all())
        torch.testing.assert_close(state[0], x, **ROUNDING)


def test_it_reaches_the_optimum() -> None:
    problem = Quadratic(5)
    problem.start = problem.start[:1].expand(5, -1).clone()
    simulator = simulate(SyncSGD(), problem)
    simulator.run(gradient_of(problem), 0.5, 200)
    torch.testing.assert_close(stacked(simulator), problem.optimum.expand(5, -1), rtol=0.0, atol=1e-12)
