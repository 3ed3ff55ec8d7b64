"""Proved here: RelaySGD is its stacked reference step by step, by the age of each model; every
worker reaches the optimum; its stated rate is that of the relayed averages; it refuses what is no tree."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import assert_steps_equal, gradient_of, rests_at, simulate

from lightning_decentral.algorithms import RelaySGD
from lightning_decentral.errors import TopologyError
from lightning_decentral.topology import AbstractTopology, FromGraph, HypercubeMatching, Ring, Star

CHAIN = FromGraph([(0, 1), (1, 2), (2, 3)])
TREE = FromGraph([(0, 1), (0, 2), (1, 3), (1, 4)])


@pytest.mark.parametrize("topology", [CHAIN, TREE, Star(5)], ids=["chain", "tree", "star"])
def test_it_is_the_reference_step_by_step_under_jitter(topology: AbstractTopology) -> None:
    assert_steps_equal(RelaySGD(topology), methods.relaysgd, topology.size)


def test_every_worker_reaches_the_optimum() -> None:
    problem = Quadratic(5)
    expected = problem.optimum.expand_as(problem.start)
    torch.testing.assert_close(rests_at(RelaySGD(TREE), problem, 0.1, 900), expected, rtol=0.0, atol=1e-10)


def test_without_learning_workers_agree_at_the_rate_that_is_stated() -> None:
    problem = Quadratic(4, 50)
    algorithm = RelaySGD(CHAIN)
    simulator = simulate(algorithm, problem)
    distances = []
    for _ in range(3):
        simulator.run(gradient_of(problem), 0.0, 30)
        distances.append(simulator.consensus_distance() ** 0.5)
    factor = 1 - algorithm.mixing(4).spectral_gap
    assert 0.2 < factor < 1
    assert distances[1] / distances[0] == pytest.approx(factor**30, rel=9.0)  # roots may be complex: it swings


def test_it_refuses_what_is_no_tree() -> None:
    for topology in (Ring(4), HypercubeMatching(4)):
        with pytest.raises(TopologyError, match="RelaySGD needs a tree: 6 messages along 3 edges"):
            RelaySGD(topology)
