"""Proved here: DCD-PSGD is its stacked reference step by step with a compressor that loses; without one it is D-PSGD;
what a worker knows of its neighbours is what they are; biased compressors and changing graphs are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from reference import methods
from reference.runs import Kept, assert_steps_equal, buffer_of, equal_start, gradient_of, simulate, stacked

from lightning_decentral.algorithms import DCDPSGD, DPSGD
from lightning_decentral.averaging import DCD
from lightning_decentral.compression import Identity, Int8, TopK
from lightning_decentral.compression.base import Traits
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.topology import OnePeerExponential, Ring


@dataclass(frozen=True)
class SaidToBeUnbiased(Kept):
    """Sends a share of each value, and says that this is right on average: then the reference can do the same."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, unbiased=True)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    algorithm = DCDPSGD(Ring(5), SaidToBeUnbiased(share=0.8))
    assert_steps_equal(algorithm, methods.dcd_psgd, 5, equal=True, compress=lambda x: 0.8 * x)


def test_without_compression_it_is_dpsgd() -> None:
    assert_steps_equal(DCDPSGD(compressor=Identity()), methods.dpsgd, equal=True)
    assert_steps_equal(DPSGD(Ring, DCD(Identity()), order="atc"), methods.dpsgd, equal=True)


def test_what_a_worker_knows_of_its_neighbours_is_what_they_are() -> None:
    problem, graph = equal_start(4), Ring(4)
    simulator = simulate(DCDPSGD(graph), problem)
    simulator.run(gradient_of(problem), 0.1, 25)
    x = stacked(simulator)
    pulls = torch.stack([buffer_of(worker.state["pull"]) for worker in simulator.workers])
    # Int8's scale is of float32.
    torch.testing.assert_close(pulls, graph.mixing_matrix() @ x - x, rtol=0.0, atol=1e-12)
    assert len(x.unique(dim=0)) == 4


def test_what_it_refuses() -> None:
    for compressor in (Int8(), TopK(0.1)):
        with pytest.raises(ConfigurationError, match=r"DCD got .* which is biased.*Use Int8\(stochastic=True\)"):
            DCDPSGD(compressor=compressor).resolved(4)
    with pytest.raises(TopologyError, match=r"DCD needs a symmetric graph that stays the same, got .*changing"):
        DCDPSGD(OnePeerExponential(4))
