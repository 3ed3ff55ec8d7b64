"""Proved here: FP4 makes the nearest one of its levels of every value, and takes 4 bits and a scale for each bucket."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import FP4


@pytest.mark.parametrize("bucket", [None, 100])
def test_every_value_becomes_the_nearest_level(bucket: int | None) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) ** 5  # over many sizes
    made = FP4(bucket).decompress(FP4(bucket).compress(x))
    powers = 2.0 ** torch.arange(-6.0, 1.0)
    levels = torch.cat([-powers, torch.zeros(1), powers])
    width = bucket or 1000
    for part, result in zip(x.split(width), made.split(width), strict=True):
        away = (part[:, None] - levels * part.abs().max()).abs().min(1).values
        torch.testing.assert_close((part - result).abs(), away, rtol=1e-5, atol=1e-6)
        exponents = (result / part.abs().max()).abs().log2().round()
        assert set(exponents.tolist()) <= {-torch.inf, *range(-6, 1)}


def test_it_takes_4_bits_and_a_scale_for_each_bucket() -> None:
    assert FP4(128).num_bits(128 * 10) == 10 * (128 * 4 + 32)
