"""Proved here: DecentLaM is its stacked reference step by step; its momentum moves no fixed point; on the
complete graph it is synchronous SGD with momentum; what it refuses would diverge."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import assert_steps_equal, equal_start, fixed_point, rests_at, simulate, states

from lightning_decentral.algorithms import DecentLaM
from lightning_decentral.errors import TopologyError
from lightning_decentral.topology import AbstractTopology, Complete, Exponential, OnePeerExponential, Ring, Star


@pytest.mark.parametrize("topology", [Ring(4), Star(5)], ids=repr)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_the_reference_step_by_step_under_jitter(topology: AbstractTopology, momentum: float) -> None:
    assert_steps_equal(DecentLaM(topology, momentum=momentum), methods.decentlam, topology.size, momentum=momentum)


def test_it_rests_where_dpsgd_without_momentum_does() -> None:
    problem = Quadratic(5)
    x = rests_at(DecentLaM(Ring(5), momentum=0.8), problem, 0.05)
    torch.testing.assert_close(x, fixed_point(problem, Ring(5), 0.05, "atc"), rtol=0.0, atol=1e-10)


def test_on_the_complete_graph_it_is_synchronous_sgd_with_momentum() -> None:
    problem = equal_start(4)
    x, momentum = problem.start, torch.zeros_like(problem.start)
    for state in states(simulate(DecentLaM(Complete(4)), problem), problem, 0.05, 30):
        momentum = 0.9 * momentum + problem.gradient(x).mean(0)
        x = x - 0.05 * momentum
        torch.testing.assert_close(state, x, rtol=0.0, atol=1e-12)  # float64, values around 1


def test_what_it_refuses_would_diverge() -> None:
    for topology, kind in ((OnePeerExponential(8), "changing"), (Exponential(8), "directed")):
        with pytest.raises(TopologyError, match=f"{kind}.*Use Ring, or QGDSGDm on this graph"):
            DecentLaM(topology)
    problem = Quadratic(8)
    rate, graph = (lambda step: 0.02), OnePeerExponential(8)
    reference = methods.decentlam(problem.start, problem.gradient, rate, graph.mixing_matrix)
    for _ in range(200):
        state = next(reference)
    assert not float(state.abs().max()) < 1e3
