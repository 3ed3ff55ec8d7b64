"""Proved here: NoLoCo is its stacked reference step by step under jitter, with random pairs and on a graph; the mean of
the slow weights follows heavy ball whatever the pull is; a worker sends to one partner in each round; its state is in
checkpoints; and what cannot work is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, buffer_of, equal_start, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import NoLoCo
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.topology import AbstractTopology, RandomMatching, Ring

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize("graph", [RandomMatching(5), RandomMatching(4), Ring(4)], ids=repr)
def test_it_is_the_reference_step_by_step_under_jitter(graph: AbstractTopology) -> None:
    problem = equal_start(graph.size)
    reference = methods.noloco(problem.start, problem.gradient, rate, graph.mixing_matrix, 3)
    for state in states(simulate(NoLoCo(graph, 3), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


@pytest.mark.parametrize("pull", [0.0, 0.7, 1.5])
def test_the_mean_of_the_slow_weights_follows_heavy_ball(pull: float) -> None:
    problem, every = equal_start(4), 3
    simulator = simulate(NoLoCo(every=every, pull=pull), problem)
    slow, momentum = problem.start.mean(0), torch.zeros(5, dtype=torch.float64)
    before = problem.start.clone()
    for _ in range(8):
        x = before.clone()
        for _ in range(every):
            x = x - 0.1 * problem.gradient(x)
        simulator.run(gradient_of(problem), 0.1, every)
        momentum = 0.5 * momentum + 0.7 * (x - before).mean(0)
        slow = slow + momentum
        before = stacked(simulator).clone()
        now = torch.stack([buffer_of(worker.state["slow"]) for worker in simulator.workers])
        torch.testing.assert_close(now.mean(0), slow, rtol=0.0, atol=1e-13)


def test_one_partner_in_each_round() -> None:
    problem = equal_start(6)
    simulator = simulate(NoLoCo(every=4), problem)
    simulator.run(gradient_of(problem), 0.1, 12)
    for traffic in simulator.traffic:
        assert (traffic.messages, traffic.bytes_sent) == (3, 3 * 2 * 5 * 8)


def test_its_state_is_in_the_checkpoint() -> None:
    problem = equal_start(4)
    uninterrupted, paused, resumed = (simulate(NoLoCo(every=3), problem, JITTERED, seed) for seed in (0, 0, 9))
    uninterrupted.run(gradient_of(problem), 0.1, 20)
    paused.run(gradient_of(problem), 0.1, 8)
    resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
    resumed.run(gradient_of(problem), 0.1, 12)
    assert torch.equal(stacked(resumed), stacked(uninterrupted))


def test_what_cannot_work_is_refused() -> None:
    for options in ({"every": 0}, {"outer_learning_rate": 0.0}, {"outer_momentum": 1.0}, {"pull": 2.0}):
        with pytest.raises(ConfigurationError, match="needs"):
            NoLoCo(**options)  # type: ignore[arg-type]
