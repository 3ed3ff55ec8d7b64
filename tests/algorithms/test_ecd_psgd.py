"""Proved here: ECD-PSGD is its stacked reference step by step with a compressor that loses; without one it is D-PSGD;
biased compressors and changing graphs are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from reference import methods
from reference.runs import Kept, assert_steps_equal

from lightning_decentral.algorithms import DPSGD, ECDPSGD
from lightning_decentral.averaging import ECD
from lightning_decentral.compression import Identity, TopK
from lightning_decentral.compression.base import Traits
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.topology import Exponential, Ring


@dataclass(frozen=True)
class SaidToBeUnbiased(Kept):
    """Sends a share of each value, and says that this is right on average: then the reference can do the same."""

    @property
    def traits(self) -> Traits:
        return replace(super().traits, unbiased=True)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    algorithm = ECDPSGD(Ring(5), SaidToBeUnbiased(share=0.99))
    assert_steps_equal(algorithm, methods.ecd_psgd, 5, equal=True, compress=lambda x: 0.99 * x)


def test_without_compression_it_is_dpsgd() -> None:
    assert_steps_equal(ECDPSGD(compressor=Identity()), methods.dpsgd, equal=True)
    assert_steps_equal(DPSGD(Ring, ECD(Identity()), order="atc"), methods.dpsgd, equal=True)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigurationError, match=r"ECD got .* which is biased.*Use Int8\(stochastic=True\)"):
        ECDPSGD(compressor=TopK(0.1)).resolved(4)
    with pytest.raises(TopologyError, match=r"ECD needs a symmetric graph that stays the same, got .*directed"):
        ECDPSGD(Exponential(8))
