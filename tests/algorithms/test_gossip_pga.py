"""Proved here: Gossip-PGA is its stacked reference step by step, in both orders; with an exact average in each step it
is synchronous SGD; it rests nearer to the optimum than D-PSGD on the same graph."""

from __future__ import annotations

from typing import Any

import pytest
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import assert_steps_equal, rests_at

from lightning_decentral.algorithms import DPSGD, GossipPGA
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.topology import OnePeerExponential, Ring


@pytest.mark.parametrize("order", ["awc", "atc"])
@pytest.mark.parametrize("topology", [Ring, OnePeerExponential])
def test_it_is_the_reference_step_by_step_under_jitter(topology: Any, order: Any) -> None:
    assert_steps_equal(GossipPGA(topology, every=4, order=order), methods.gossip_pga, 5, every=4, order=order)


def test_with_an_average_in_each_step_it_is_synchronous_sgd() -> None:
    assert_steps_equal(GossipPGA(every=1), methods.sync_sgd, equal=True)


def test_it_rests_nearer_to_the_optimum_than_dpsgd() -> None:
    problem = Quadratic(8)
    ours, theirs = (
        float((rests_at(algorithm, problem, 0.05, 600) - problem.optimum).abs().max())
        for algorithm in (GossipPGA(every=4), DPSGD(Ring(8), order="atc"))
    )
    assert 0.0 < ours < theirs / 5


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigurationError, match="GossipPGA got every=0, needs a number of steps, at least 1"):
        GossipPGA(every=0)
