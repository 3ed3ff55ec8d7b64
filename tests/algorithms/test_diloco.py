"""Proved here: DiLoCo is its stacked reference step by step under jitter; with outer rate 1 and no momentum it is local
SGD; any optimizer of torch may be the outer one, and its state is in checkpoints, with what it counts in its groups;
all workers have equal models after a round; an outer step that is made in pieces is that of torch; and what cannot work
is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, equal_start, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import DiLoCo, LocalSGD, local_updates
from lightning_decentral.algorithms.local_updates import outer_step
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.simulation.simulator import Simulator

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize("every", [1, 5])
def test_it_is_the_reference_step_by_step_under_jitter(every: int) -> None:
    problem = equal_start(4)
    reference = methods.diloco(problem.start, problem.gradient, rate, torch.eye, every, 0.6, 0.8)
    simulator = simulate(DiLoCo(every, outer_learning_rate=0.6, outer_momentum=0.8), problem, JITTERED)
    for step, state in enumerate(states(simulator, problem, rate, 40), 1):
        torch.testing.assert_close(state, next(reference), **ROUNDING)
        if step % every == 0:
            assert torch.equal(state, state[:1].expand_as(state))


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True), torch.optim.Adam])
def test_an_outer_step_in_pieces_is_that_of_torch(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_updates, "_PIECE", 4)
    start, states = torch.linspace(-1.0, 1.0, 10), [[]]
    whole = torch.nn.Parameter(start.clone())
    merged, optimizer = Vector([start.clone()]), make([whole])
    for step in range(3):
        whole.grad = start * (step + 1)
        optimizer.step()
        outer_step(make, states, 0, merged, Vector([whole.grad]))
    torch.testing.assert_close(merged.buffers[0], whole.detach(), rtol=0.0, atol=0.0)
    for name, value in optimizer.state[whole].items():
        torch.testing.assert_close(states[0][0][name], value, rtol=0.0, atol=0.0)


def test_models_of_half_precision_are_equal_after_a_round_too() -> None:
    """Whose global model is of float32."""
    start = [Vector([torch.ones(4, dtype=torch.bfloat16)]) for _ in range(3)]
    simulator = Simulator(DiLoCo(2), start)
    simulator.run(lambda worker: Vector([torch.full((4,), worker.rank, dtype=torch.bfloat16)]), 0.25, 2)
    assert torch.equal(stacked(simulator), stacked(simulator)[:1].expand(3, -1))


def test_with_outer_rate_1_and_no_momentum_it_is_local_sgd() -> None:
    problem = equal_start(4)
    diloco = states(simulate(DiLoCo(4, 1.0, 0.0), problem), problem, rate, 30)
    local = states(simulate(LocalSGD(4), problem), problem, rate, 30)
    for one, other in zip(diloco, local, strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


def test_any_optimizer_may_be_the_outer_one() -> None:
    class Replaces(torch.optim.Adam):
        """Puts new tensors in the place of the parameters."""

        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.data = parameter.data.clone()
            super().step()

    problem, every = equal_start(4), 3
    simulator = simulate(DiLoCo(every, outer=partial(Replaces, lr=0.05)), problem)
    common = torch.nn.Parameter(problem.start[0].clone())
    adam = torch.optim.Adam([common], lr=0.05)
    x = problem.start.clone()
    for step, state in enumerate(states(simulator, problem, 0.1, 12), 1):
        x = x - 0.1 * problem.gradient(x)
        if step % every == 0:
            common.grad = common.detach() - x.mean(0)
            adam.step()
            x = common.detach().expand_as(x)
        torch.testing.assert_close(state, x, **ROUNDING)


class ScheduleFree(torch.optim.Optimizer):
    """SGD that needs no schedule (Defazio et al., arXiv:2405.15682), with its counts in the group, as published."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "beta": 0.9, "k": 0, "weight_sum": 0.0})

    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        rate, beta = group["lr"] * min(1.0, (group["k"] + 1) / 3), group["beta"]
        group["weight_sum"] += rate**2
        weight = rate**2 / group["weight_sum"]
        for y in group["params"]:
            z = self.state[y].setdefault("z", y.detach().clone())
            y.lerp_(z, weight).add_(y.grad, alpha=rate * (beta * (1 - weight) - 1))
            z.sub_(y.grad, alpha=rate)
        group["k"] += 1


def test_an_outer_optimizer_counts_in_its_groups_from_round_to_round() -> None:
    simulator = simulate(DiLoCo(2, outer=partial(ScheduleFree, lr=0.5)), problem := equal_start(4))
    common = torch.nn.Parameter(problem.start[0].clone())
    optimizer, x = ScheduleFree([common], lr=0.5), problem.start.clone()
    for step, state in enumerate(states(simulator, problem, 0.1, 14), 1):
        x = x - 0.1 * problem.gradient(x)
        if step % 2 == 0:
            common.grad = common.detach() - x.mean(0)
            with torch.no_grad():
                optimizer.step()
            x = common.detach().expand_as(x)
        torch.testing.assert_close(state, x, **ROUNDING)
    (_, counts) = simulator.workers[0].state["outer"][0]
    assert counts == {name: optimizer.param_groups[0][name] for name in ("k", "weight_sum")}
    assert counts["k"] == 7


@pytest.mark.parametrize("make", [torch.optim.Adam, ScheduleFree])
def test_the_state_of_the_outer_optimizer_is_in_the_checkpoint(make: Any) -> None:
    problem, algorithm = equal_start(4), DiLoCo(3, outer=partial(make, lr=0.05))
    uninterrupted, paused, resumed = (simulate(algorithm, problem, JITTERED, seed) for seed in (0, 0, 9))
    uninterrupted.run(gradient_of(problem), 0.1, 20)
    paused.run(gradient_of(problem), 0.1, 8)
    resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
    resumed.run(gradient_of(problem), 0.1, 12)
    assert torch.equal(stacked(resumed), stacked(uninterrupted))


def test_what_cannot_work_is_refused() -> None:
    for options in ({"outer_learning_rate": 0.0}, {"outer_momentum": 1.0}, {"every": 0}):
        with pytest.raises(ConfigurationError, match="needs"):
            DiLoCo(**options)  # type: ignore[arg-type]
