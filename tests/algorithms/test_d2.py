"""Proved here: D2 is its stacked reference step by step under jitter and a changing learning rate; it reaches the
optimum on every worker, also after the learning rate drops, where D-PSGD does not; it refuses graphs on which it would
diverge.
"""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, gradient_of, settled, simulate, stacked, states

from lightning_decentral.algorithms import D2, DPSGD
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.flat import Vector
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import (
    AbstractTopology,
    Complete,
    Exponential,
    FromMatrix,
    HypercubeMatching,
    OnePeerExponential,
    RandomMatching,
    Ring,
    Star,
    Torus,
)

GRAPHS = [Ring(8, lazy=True), Ring(5), Complete(8), Star(8), Torus(2, 4, lazy=True)]
# Float64, values around 1, 40 steps. The reference subtracts gradients, D2 the local updates: each step rounds anew,
# and D2 is an integrator, which remembers rounding errors.
ROUNDING = {"rtol": 0.0, "atol": 1e-12}


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
def test_it_is_the_reference_step_by_step_under_jitter(topology: AbstractTopology) -> None:
    problem = Quadratic(topology.size)
    reference = methods.d2(problem.start, problem.gradient, rate, topology.mixing_matrix)
    for state in states(simulate(D2(topology), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
def test_the_mean_moves_by_the_mean_gradient_exactly(topology: AbstractTopology) -> None:
    problem = Quadratic(topology.size)
    before = problem.start
    for step, state in enumerate(states(simulate(D2(topology), problem, JITTERED), problem, rate, 30)):
        expected = before.mean(0) - rate(step) * problem.gradient(before).mean(0)
        torch.testing.assert_close(state.mean(0), expected, **ROUNDING)
        before = state


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
def test_every_worker_reaches_the_optimum_also_after_the_learning_rate_drops(topology: AbstractTopology) -> None:
    problem = Quadratic(topology.size)
    simulator = simulate(D2(topology), problem)
    for learning_rate in (0.3, 0.15):
        expected = problem.optimum.expand_as(problem.start)
        torch.testing.assert_close(settled(simulator, problem, learning_rate, 800), expected, rtol=0.0, atol=1e-10)


def test_where_dpsgd_does_not() -> None:
    problem = Quadratic(8)
    simulator = simulate(DPSGD(Ring(8, lazy=True)), problem)
    simulator.run(gradient_of(problem), 0.15, 150)
    assert float((stacked(simulator) - problem.optimum).abs().max()) > 0.1


def test_the_correction_of_half_precision_parameters_is_kept_in_float32() -> None:
    simulator = Simulator(D2(), [Vector([torch.zeros(3, dtype=torch.bfloat16)]) for _ in range(4)])
    assert [worker.state["correction"].buffers[0].dtype for worker in simulator.workers] == [torch.float32] * 4


def test_it_refuses_a_smallest_eigenvalue_of_minus_one_third() -> None:
    for workers in (4, 8, 16):
        with pytest.raises(TopologyError, match=r"above -1/3, got .*-0.333333: it would diverge. Use a lazy graph"):
            D2(Ring(workers))
    assert D2(Ring(5)).topology == Ring(5)  # -0.206
    almost = 0.66  # of two workers' weights on each other: eigenvalue 1 - 2 * 0.66 = -0.32
    matrix = torch.tensor([[1 - almost, almost], [almost, 1 - almost]], dtype=torch.float64)
    assert D2(FromMatrix(matrix)).resolved(2)


def test_what_it_refuses_would_diverge() -> None:
    problem = Quadratic(2)
    matrix = torch.tensor([[0.3, 0.7], [0.7, 0.3]], dtype=torch.float64)  # eigenvalue -0.4
    reference = methods.d2(problem.start, problem.gradient, lambda step: 0.1, lambda step: matrix)
    for _ in range(300):
        state = next(reference)
    assert not float(state.abs().max()) < 1e3


@pytest.mark.parametrize(
    ("topology", "kind"),
    [
        (Exponential(8), "directed"),
        (OnePeerExponential(8), "changing"),
        (HypercubeMatching(8), "changing"),
        (RandomMatching(8), "changing"),
    ],
    ids=repr,
)
def test_it_refuses_directed_and_changing_graphs(topology: AbstractTopology, kind: str) -> None:
    with pytest.raises(TopologyError, match=f"{kind}.*Use a lazy graph"):
        D2(topology)


def test_its_default_graph_fits_the_number_of_workers() -> None:
    assert D2().resolved(1) == D2(Complete(1))
    assert D2().resolved(2) == D2(Complete(2))
    assert D2().resolved(8) == D2(Ring(8, lazy=True))
    with pytest.raises(ConfigurationError, match="for 5 workers, but 6 take part"):
        D2(Ring(5)).resolved(6)
