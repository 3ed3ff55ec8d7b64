"""Proved here: gradient tracking is its stacked reference step by step, in both orders, on directed and changing
graphs; the mean of the trackers is the mean of the gradients; every worker reaches the optimum where D-PSGD rests at
its closed form, also with momentum, Adam and compressed messages; clipping leaves the trackers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, buffer_of, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import DPSGD, GradientTracking
from lightning_decentral.averaging import Choco
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.protocol import LocalStep
from lightning_decentral.topology import AbstractTopology, DirectedGraph, Exponential, OnePeerExponential, Ring

BOTH = pytest.mark.parametrize("order", ["awc", "atc"])
ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # float64, values around 1, 40 steps of an integrator


def rate(step: int) -> float:
    return 0.3 / (1 + step // 7)


@BOTH
@pytest.mark.parametrize("topology", [Ring(4), OnePeerExponential(5), Exponential(5)], ids=repr)
def test_it_is_the_reference_step_by_step_under_jitter(order: Any, topology: AbstractTopology) -> None:
    problem = Quadratic(topology.size)
    reference = methods.gradient_tracking(problem.start, problem.gradient, rate, topology.mixing_matrix, order)
    simulator = simulate(GradientTracking(topology, order=order), problem, JITTERED)
    for state in states(simulator, problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


@BOTH
def test_the_mean_of_the_trackers_is_the_mean_of_the_gradients(order: Any) -> None:
    problem = Quadratic(4)
    simulator = simulate(GradientTracking(order=order), problem, JITTERED)
    before = problem.start
    for state in states(simulator, problem, rate, 20):
        trackers = torch.stack([buffer_of(worker.state["tracker"]) for worker in simulator.workers])
        torch.testing.assert_close(trackers.mean(0), problem.gradient(before).mean(0), **ROUNDING)
        before = state


@pytest.mark.parametrize("options", [{"order": "awc"}, {"order": "atc"}, {"averager": Choco()}], ids=str)
def test_every_worker_reaches_the_optimum(options: Any) -> None:
    problem = Quadratic(5)
    simulator = simulate(GradientTracking(Ring, **options), problem)
    for learning_rate in (0.1, 0.08):  # also after it changes
        simulator.run(gradient_of(problem), learning_rate, 250)
        expected = problem.optimum.expand_as(problem.start)
        torch.testing.assert_close(stacked(simulator), expected, rtol=0.0, atol=1e-10)


def test_where_dpsgd_rests_at_its_closed_form() -> None:
    problem, graph = Quadratic(5), Ring(5)
    simulator = simulate(DPSGD(graph), problem)
    simulator.run(gradient_of(problem), 0.1, 300)
    w = graph.mixing_matrix()
    expected = torch.stack(
        [
            torch.linalg.solve(torch.eye(5) - w + 0.1 * a.diag(), 0.1 * a * b)
            for a, b in zip(problem.a.T, problem.b.T, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(stacked(simulator), expected, rtol=0.0, atol=1e-10)
    assert float((expected - problem.optimum).abs().max()) > 0.1


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_with_an_optimizer_that_remembers_it_reaches_the_optimum(optimizer: str) -> None:
    """Each worker has its own; clipping to a norm changes what is applied, and no tracker."""
    problem = Quadratic(4)
    simulator = simulate(GradientTracking(Ring), problem)
    gradient = gradient_of(problem)
    for worker in simulator.workers:
        worker.read_gradient = lambda worker=worker: gradient(worker)  # type: ignore[misc]
    parameters = [torch.nn.Parameter(buffer_of(worker.x)) for worker in simulator.workers]
    made = [
        torch.optim.SGD([each], 0.05, momentum=0.8) if optimizer == "momentum" else torch.optim.Adam([each], 0.01)
        for each in parameters
    ]
    for request, worker in simulator.demands(400 if optimizer == "momentum" else 1000):
        if type(request) is LocalStep:
            each = parameters[worker.rank]
            each.grad = buffer_of(worker.gradient)
            torch.nn.utils.clip_grad_norm_([each], 0.5)
            made[worker.rank].step()
    expected = problem.optimum.expand_as(problem.start)
    torch.testing.assert_close(stacked(simulator), expected, rtol=0.0, atol=1e-6 if optimizer == "adam" else 1e-10)


def test_what_it_refuses() -> None:
    with pytest.raises(TopologyError, match="needs a doubly stochastic topology"):
        GradientTracking(DirectedGraph([[1, 2], [2], [0]]))
    with pytest.raises(TopologyError, match="CHOCO needs a graph that stays the same"):
        GradientTracking(OnePeerExponential(4), Choco())
    with pytest.raises(ConfigurationError, match=r"needs one value that is averaged. Use order='awc'"):
        GradientTracking(averager=Choco(), order="atc")
    with pytest.raises(ConfigurationError, match="got order='cta', needs one of 'awc', 'atc'"):
        GradientTracking(order="cta")  # type: ignore[arg-type]
