"""Proved here: DCD-PSGD and ECD-PSGD are their stacked references step by step with a compressor that loses; without
one they are D-PSGD; what a worker knows of its neighbours is what they are; biased compressors and changing or directed
graphs are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from reference import methods
from reference.runs import Kept, assert_steps_equal, buffer_of, equal_start, gradient_of, simulate, stacked

from lightning_decentral.algorithms import DCDPSGD, DPSGD, ECDPSGD
from lightning_decentral.averaging import DCD, ECD
from lightning_decentral.compression import Identity, Int8, TopK
from lightning_decentral.compression.base import Traits
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.topology import Exponential, OnePeerExponential, Ring


@dataclass(frozen=True)
class SaidToBeUnbiased(Kept):
    """Sends a share of each value, and says that this is right on average: then the reference can do the same."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, unbiased=True)


@pytest.mark.parametrize(
    ("method", "reference", "share"), [(DCDPSGD, methods.dcd_psgd, 0.8), (ECDPSGD, methods.ecd_psgd, 0.99)]
)
def test_it_is_the_reference_step_by_step_under_jitter(method: Any, reference: Any, share: float) -> None:
    algorithm = method(Ring(5), SaidToBeUnbiased(share=share))
    assert_steps_equal(algorithm, reference, 5, equal=True, compress=lambda x: share * x)


@pytest.mark.parametrize(("method", "averager"), [(DCDPSGD, DCD), (ECDPSGD, ECD)])
def test_without_compression_it_is_dpsgd(method: Any, averager: Any) -> None:
    assert_steps_equal(method(compressor=Identity()), methods.dpsgd, equal=True)
    assert_steps_equal(DPSGD(Ring, averager(Identity()), order="atc"), methods.dpsgd, equal=True)


def test_what_a_worker_knows_of_its_neighbours_is_what_they_are() -> None:
    problem, graph = equal_start(4), Ring(4)
    simulator = simulate(DCDPSGD(graph), problem)
    simulator.run(gradient_of(problem), 0.1, 25)
    x = stacked(simulator)
    pulls = torch.stack([buffer_of(worker.state["pull"]) for worker in simulator.workers])
    # Int8's scale is of float32.
    torch.testing.assert_close(pulls, graph.mixing_matrix() @ x - x, rtol=0.0, atol=1e-12)
    assert len(x.unique(dim=0)) == 4


@pytest.mark.parametrize("method", [DCDPSGD, ECDPSGD])
def test_what_it_refuses(method: Any) -> None:
    for compressor in (Int8(), TopK(0.1)):
        with pytest.raises(ConfigurationError, match=r"CD got .* which is biased.*Use Int8\(stochastic=True\)"):
            method(compressor=compressor).resolved(4)
    for graph, why in ((OnePeerExponential(4), "changing"), (Exponential(8), "directed")):
        with pytest.raises(TopologyError, match=rf"CD needs a symmetric graph that stays the same, got .*{why}"):
            method(graph)
