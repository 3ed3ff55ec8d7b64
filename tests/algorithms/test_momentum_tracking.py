"""Proved here: momentum tracking is its stacked reference, as published, step by step, in both orders; every worker
reaches the optimum on a changing graph; on a constant one momentum in the optimizer comes to the same."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import assert_steps_equal, buffer_of, gradient_of, rests_at, simulate, stacked

from lightning_decentral.algorithms import GradientTracking, MomentumTracking
from lightning_decentral.algorithms.base import Order
from lightning_decentral.averaging import DCD, Choco
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import LocalStep
from lightning_decentral.topology import AbstractTopology, Exponential, OnePeerExponential, Ring


@pytest.mark.parametrize("topology", [Ring(4), OnePeerExponential(5), Exponential(5)], ids=repr)
@pytest.mark.parametrize("order", ["atc", "awc"])
def test_it_is_the_reference_step_by_step_under_jitter(topology: AbstractTopology, order: Order) -> None:
    own = MomentumTracking(topology, momentum=0.8, order=order)
    assert_steps_equal(own, methods.momentum_tracking, topology.size, momentum=0.8, order=order)


def test_without_momentum_it_is_gradient_tracking_while_combining() -> None:
    problem, graph = Quadratic(5), OnePeerExponential(5)
    one = rests_at(MomentumTracking(graph, momentum=0.0, order="awc"), problem, 0.05, 30)
    other = rests_at(GradientTracking(graph, order="awc"), problem, 0.05, 30)
    torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "algorithm",
    [
        MomentumTracking(OnePeerExponential(5)),
        MomentumTracking(Ring(5), Choco()),
        MomentumTracking(OnePeerExponential(5), order="awc"),
    ],
    ids=repr,
)
def test_every_worker_reaches_the_optimum(algorithm: MomentumTracking) -> None:
    problem = Quadratic(5)
    expected = problem.optimum.expand_as(problem.start)
    torch.testing.assert_close(rests_at(algorithm, problem, 0.05, 500), expected, rtol=0.0, atol=1e-10)


def test_on_a_constant_graph_momentum_in_the_optimizer_comes_to_the_same() -> None:
    problem = Quadratic(4)
    inside = rests_at(MomentumTracking(Ring(4), momentum=0.8), problem, 0.05, 20)
    simulator = simulate(MomentumTracking(Ring(4), momentum=0.0), problem)
    gradient = gradient_of(problem)
    parameters = [torch.nn.Parameter(buffer_of(worker.x)) for worker in simulator.workers]
    optimizers = [torch.optim.SGD([each], 0.05, momentum=0.8) for each in parameters]
    for worker in simulator.workers:
        worker.read_gradient = lambda worker=worker: gradient(worker)  # type: ignore[misc]
    for request, worker in simulator.demands(20):
        if type(request) is LocalStep:
            parameters[worker.rank].grad = buffer_of(worker.gradient)
            optimizers[worker.rank].step()
    torch.testing.assert_close(stacked(simulator), inside, rtol=0.0, atol=1e-12)  # float64, values around 1


def test_another_order_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="got order='cta', needs one of 'awc', 'atc'"):
        MomentumTracking(Ring(4), order="cta")  # type: ignore[arg-type]


def test_averages_that_do_not_keep_the_mean_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"adds up the moves of its averages.*Use Choco\(\)"):
        simulate(MomentumTracking(Ring(4), DCD()), Quadratic(4))
