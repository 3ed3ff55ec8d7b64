"""Proved here: D-PSGD is its stacked reference step by step on every graph whatever the cluster does; its mean moves by
the mean gradient exactly; its fixed point, and with momentum, is the closed form, off the optimum by O(learning rate).
"""

from __future__ import annotations

import pytest
import torch
from reference import methods, runs
from reference.quadratic import Quadratic
from reference.runs import (
    JITTERED,
    assert_steps_equal,
    gradient_of,
    rests_at,
    simulate,
    stacked,
    states,
)
from torch import Tensor

from lightning_decentral.algorithms import DPSGD
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import Gradient
from lightning_decentral.topology import (
    AbstractTopology,
    AlternatingMatching,
    Complete,
    Exponential,
    FromMatrix,
    HypercubeMatching,
    OnePeerExponential,
    Placed,
    RandomMatching,
    Ring,
    Sites,
    Star,
    Torus,
)

GRAPHS = [
    Ring(8), Torus(2, 4), Star(8), Complete(8), Exponential(8), OnePeerExponential(8), HypercubeMatching(8),
    AlternatingMatching(8), RandomMatching(8, seed=3), RandomMatching(7), OnePeerExponential(6), Ring(5, lazy=True),
    Sites(8), Placed(OnePeerExponential(6), (3, 0, 4, 1, 5, 2)),
]  # fmt: skip
ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, 30 steps, up to 8 terms each


def rate(step: int) -> float:
    return 0.4 if step < 10 else 0.1


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
def test_it_is_the_reference_step_by_step_under_jitter(topology: AbstractTopology) -> None:
    problem = Quadratic(topology.size)
    reference = methods.dpsgd(problem.start, problem.gradient, rate, topology.mixing_matrix)
    for state in states(simulate(DPSGD(topology), problem, JITTERED), problem, rate, 30):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
def test_the_mean_moves_by_the_mean_gradient_exactly(topology: AbstractTopology) -> None:
    problem = Quadratic(topology.size)
    before = problem.start
    for step, state in enumerate(states(simulate(DPSGD(topology), problem, JITTERED), problem, rate, 20)):
        expected = before.mean(0) - rate(step) * problem.gradient(before).mean(0)
        torch.testing.assert_close(state.mean(0), expected, **ROUNDING)
        before = state


def fixed_point(problem: Quadratic, mixing: Tensor, learning_rate: float) -> Tensor:
    """(I - W + gamma A) X = gamma A b, for each parameter: the curvatures differ."""
    n = len(mixing)
    columns = [
        torch.linalg.solve(torch.eye(n) - mixing + learning_rate * torch.diag(a), learning_rate * a * b)
        for a, b in zip(problem.a.T, problem.b.T, strict=True)
    ]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("topology", [Ring(8), Complete(8), Exponential(8), Star(8)], ids=repr)
def test_the_fixed_point_is_the_closed_form(topology: AbstractTopology) -> None:
    problem = Quadratic(8)
    expected = fixed_point(problem, topology.mixing_matrix().double(), 0.1)
    torch.testing.assert_close(rests_at(DPSGD(topology), problem, 0.1), expected, rtol=0.0, atol=1e-12)


def test_the_bias_of_the_mean_shrinks_with_the_learning_rate() -> None:
    problem = Quadratic(8)
    biases = []
    for learning_rate in (0.1, 0.05, 0.025):
        rests = fixed_point(problem, Ring(8).mixing_matrix(), learning_rate)  # the test above
        biases.append(float((rests.mean(0) - problem.optimum).norm()))
    assert biases[2] > 5e-3  # curvatures differ between workers, so even the mean is off
    assert 1.3 < biases[0] / biases[1] < 2.1
    assert 1.3 < biases[1] / biases[2] < 2.1


def test_with_equal_curvature_the_mean_is_exact_and_only_workers_disagree() -> None:
    problem = Quadratic(8)
    problem.a = torch.ones_like(problem.a)
    simulator = simulate(DPSGD(Ring(8)), problem)
    simulator.run(gradient_of(problem), 0.1, 400)
    torch.testing.assert_close(stacked(simulator).mean(0), problem.optimum, rtol=0.0, atol=1e-12)
    assert simulator.consensus_distance() > 1e-2


def test_local_momentum_has_the_fixed_point_of_a_larger_learning_rate() -> None:
    """m <- beta m + g; x <- W x - gamma m: at rest m = g / (1 - beta), so gamma acts as gamma / (1 - beta)."""
    problem, topology, momentum, learning_rate = Quadratic(8), Ring(8), 0.7, 0.03
    simulator = simulate(DPSGD(topology), problem)
    gradient = gradient_of(problem)
    buffers = [Vector([torch.zeros(5, dtype=torch.float64)]) for _ in range(8)]
    for request, worker in simulator.demands(600):
        if type(request) is Gradient:
            buffers[worker.rank].mul_(momentum).add_(gradient(worker))
        else:
            worker.x.add_(buffers[worker.rank], alpha=-learning_rate)
    expected = fixed_point(problem, topology.mixing_matrix(), learning_rate / (1 - momentum))
    torch.testing.assert_close(stacked(simulator), expected, rtol=0.0, atol=1e-12)


def test_on_the_complete_graph_it_is_not_synchronous_sgd() -> None:
    problem = Quadratic(8)
    problem.start = problem.start[:1].expand(8, -1).clone()
    simulator = simulate(DPSGD(Complete(8)), problem)
    synchronous = methods.sync_sgd(problem.start, problem.gradient, lambda step: 0.3, lambda step: torch.eye(8))
    for _ in states(simulator, problem, 0.3, 50):
        expected = next(synchronous)
    assert float((stacked(simulator).mean(0) - expected[0]).norm()) > 1e-3


def test_its_default_graph_fits_the_number_of_workers() -> None:
    assert DPSGD().resolved(1) == DPSGD(Complete(1))
    assert DPSGD().resolved(2) == DPSGD(Complete(2))
    assert DPSGD().resolved(6) == DPSGD(OnePeerExponential(6))


def test_it_refuses_graphs_that_do_not_fit() -> None:
    with pytest.raises(ConfigurationError, match=r"for 8 workers, but 6 take part. Make the topology for 6 workers"):
        DPSGD(Ring(8)).resolved(6)
    with pytest.raises((ConfigurationError, TopologyError), match="connected"):
        DPSGD(FromMatrix(torch.eye(4, dtype=torch.float64))).resolved(4)


def test_adapt_then_combine_is_synchronous_sgd_on_the_complete_graph_and_rests_at_its_closed_form() -> None:
    assert_steps_equal(DPSGD(Complete(4), order="atc"), methods.sync_sgd, equal=True)
    problem = Quadratic(5)
    x = rests_at(DPSGD(Ring(5), order="atc"), problem, 0.1, 500)
    torch.testing.assert_close(x, runs.fixed_point(problem, Ring(5), 0.1, "atc"), rtol=0.0, atol=1e-10)
    with pytest.raises(ConfigurationError, match="DPSGD got order='later', needs one of 'awc', 'atc'"):
        DPSGD(order="later")  # type: ignore[arg-type]
