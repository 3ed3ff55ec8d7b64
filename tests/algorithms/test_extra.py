"""Proved here: EXTRA is its stacked reference, as published, step by step; every worker reaches the optimum, also after
the learning rate changes and with compressed messages; its messages are hidden; it refuses what would not converge."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import assert_steps_equal, gradient_of, simulate, stacked

from lightning_decentral.algorithms import D2, Extra
from lightning_decentral.averaging import Choco
from lightning_decentral.compression import TopK
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.planning.planner import plan
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import (
    AbstractTopology,
    BipartiteRing,
    Complete,
    Exponential,
    FromMatrix,
    OnePeerExponential,
    Ring,
    Star,
)


@pytest.mark.parametrize("topology", [Ring(4), Star(5), Complete(3), Ring(8, lazy=True)], ids=repr)
def test_it_is_the_reference_step_by_step_under_jitter(topology: AbstractTopology) -> None:
    assert_steps_equal(Extra(topology), methods.extra, topology.size)


@pytest.mark.parametrize("algorithm", [Extra(Ring(4)), Extra(Ring(5), Choco())], ids=repr)
def test_every_worker_reaches_the_optimum_also_after_the_learning_rate_drops(algorithm: Extra) -> None:
    problem = Quadratic(algorithm.graph.size)
    simulator = simulate(algorithm, problem)
    for learning_rate in (0.3, 0.2):
        simulator.run(gradient_of(problem), learning_rate, 200)
        expected = problem.optimum.expand_as(problem.start)
        torch.testing.assert_close(stacked(simulator), expected, rtol=0.0, atol=1e-10)


def test_its_messages_are_hidden_and_those_of_d2_are_not() -> None:
    cluster = Cluster(compute_seconds=1.0, bandwidth_bytes_per_second=4e6)
    hidden, exposed = (
        plan(algorithm, 4, 1_000_000, cluster).seconds_per_step for algorithm in (Extra(), D2(Ring(4, lazy=True)))
    )
    assert hidden == pytest.approx(1.0)
    assert exposed == pytest.approx(1.5)


def test_what_it_refuses() -> None:
    for topology, kind in ((OnePeerExponential(4), "changing"), (Exponential(8), "directed")):
        with pytest.raises(TopologyError, match=f"{kind}.*GradientTracking, which takes such graphs"):
            Extra(topology)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(TopologyError, match=r"above -1, got .*-1.000000: it would swing for ever"):
        Extra(FromMatrix(swap))
    with pytest.raises(ConfigurationError, match="steps late, needs less than 1"):
        Extra(averager=Choco(TopK(0.1), 0.1))
    assert Extra(BipartiteRing(4)).graph
