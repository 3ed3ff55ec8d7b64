"""Proved here: local SGD is its stacked reference step by step under jitter, post-local and with delayed means too;
with an average after each step it is synchronous SGD, and so is DiLoCo with an outer rate of 1 and no momentum; its
fixed point on quadratics of unequal curvature is the closed formula's; it sends nothing within a round; what is under
way survives a checkpoint; and what cannot work is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, equal_start, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import DiLoCo, LocalSGD, SyncSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.simulation.simulator import Simulator

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize(
    "options",
    [
        {"every": 1},
        {"every": 4},
        {"every": 3, "warm_up_steps": 7},
        {"every": 5, "delay": 2},
        {"every": 5, "delay": 4, "local_share": 0.25},
    ],
    ids=str,
)
def test_it_is_the_reference_step_by_step_under_jitter(options: dict[str, Any]) -> None:
    problem = Quadratic(4)
    reference = methods.local_sgd(problem.start, problem.gradient, rate, torch.eye, **options)
    for state in states(simulate(LocalSGD(**options), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_rounds_by_a_schedule_end_where_it_says() -> None:
    """A schedule of one change is post-local SGD, which is its reference; with more, the steps of averages are told."""
    problem = Quadratic(4)
    scheduled = LocalSGD(every={0: 1, 7: 3})
    assert hash(scheduled) == hash(LocalSGD(every={7: 3, 0: 1}))
    both = [simulate(each, problem, JITTERED) for each in (scheduled, LocalSGD(every=3, warm_up_steps=7))]
    for one, other in zip(*(states(each, problem, rate, 24) for each in both), strict=True):
        assert torch.equal(one, other)
    made = states(simulate(LocalSGD(every={0: 2, 5: 4, 14: 1}), problem), problem, rate, 17)
    equal = [step for step, x in enumerate(made, 1) if bool((x == x[:1]).all())]
    assert equal == [2, 4, 9, 13, 15, 16, 17]  # the third round of two steps was cut short


def test_fragments_are_averaged_at_their_own_steps() -> None:
    """With rates of 0 a fragment differs between workers until its first round ends."""
    problem = Quadratic(4, parameters=7)
    equal = []
    for state in states(simulate(LocalSGD(every=6, fragments=3), problem), problem, 0.0, 6):
        equal.append([bool((part == part[:1]).all()) for part in (state[:, :2], state[:, 2:4], state[:, 4:])])
    assert equal == [[False] * 3, [True, False, False], [True, False, False], [True, True, False]] * 1 + [
        [True, True, False],
        [True, True, True],
    ]


def test_its_fixed_point_is_the_closed_formula() -> None:
    """Of full gradients: sum (1 - c_i) b_i / sum (1 - c_i), with c_i = (1 - rate a_i)^every; not the optimum."""
    problem, every, step_size = equal_start(4), 8, 0.1
    simulator = simulate(LocalSGD(every=every), problem)
    simulator.run(gradient_of(problem), step_size, 400 * every)
    moved = 1 - (1 - step_size * problem.a) ** every
    expected = (moved * problem.b).sum(0) / moved.sum(0)
    torch.testing.assert_close(stacked(simulator)[0], expected, rtol=0.0, atol=1e-12)  # the last rounding of a mean
    assert float((expected - problem.optimum).abs().max()) > 1e-3


@pytest.mark.parametrize("algorithm", [LocalSGD(every=1), DiLoCo(1, 1.0, 0.0)], ids=repr)
def test_an_average_after_each_step_is_synchronous_sgd(algorithm: AbstractAlgorithm) -> None:
    """From equal models, under jitter: the mean of models that have made a step is a step with the mean gradient."""
    problem = equal_start(4)
    local, synchronous = (simulate(each, problem, JITTERED) for each in (algorithm, SyncSGD()))
    pairs = zip(states(local, problem, rate, 30), states(synchronous, problem, rate, 30), strict=True)
    for step, (one, other) in enumerate(pairs):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-12, msg=lambda text, step=step: f"{step}: {text}")
        assert float((one - problem.start).abs().max()) > 1e-3


def test_nothing_is_sent_within_a_round() -> None:
    problem = Quadratic(4)
    simulator = simulate(LocalSGD(every=5), problem)
    sent = []
    for _ in range(10):
        simulator.run(gradient_of(problem), 0.1, 1)
        sent.append(simulator.traffic[0].exchanges)
    assert sent == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]


def test_what_is_under_way_survives_a_checkpoint() -> None:
    problem, algorithm = Quadratic(4), LocalSGD(every=6, delay=4, local_share=0.5)
    uninterrupted, paused, resumed = (simulate(algorithm, problem, JITTERED, seed) for seed in (0, 0, 9))
    uninterrupted.run(gradient_of(problem), 0.1, 20)
    paused.run(gradient_of(problem), 0.1, 8)  # a mean was begun after step 6, and is due after step 10
    resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
    resumed.run(gradient_of(problem), 0.1, 12)
    assert torch.equal(stacked(resumed), stacked(uninterrupted))


def test_half_precision() -> None:
    start = [Vector([torch.full((50,), float(rank)).bfloat16()]) for rank in range(4)]
    simulator = Simulator(LocalSGD(every=2, delay=1, local_share=0.5), start)
    simulator.run(lambda worker: Vector([torch.zeros(50, dtype=torch.bfloat16)]), 0.1, 3)
    assert stacked(simulator).dtype == torch.bfloat16
    torch.testing.assert_close(stacked(simulator)[:, 0].float(), torch.tensor([0.75, 1.25, 1.75, 2.25]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": {5: 3}}, "a number of steps from step 0 on"),
        ({"every": 0}, "needs at least 1 step"),
        ({"fragments": 9}, "needs 1 to every=8"),
        ({"every": 8, "fragments": 4, "delay": 2}, "less than every / fragments = 2 steps"),
        ({"delay": -1}, "needs 0 or more"),
        ({"delay": 2, "local_share": 1.0}, r"needs a share in \[0, 1\)"),
        ({"warm_up_steps": -3}, "needs 0 or more"),
        ({"warm_up_steps": 3, "delay": 2}, "needs delay=0"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LocalSGD(**options)


def test_more_fragments_than_parameters_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="5 elements was to be cut into 6 pieces"):
        simulate(LocalSGD(every=8, fragments=6), Quadratic(2))
