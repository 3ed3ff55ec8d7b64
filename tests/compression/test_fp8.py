"""Proved here: a value keeps its relative precision down to the format's smallest normal number; the largest of a
block is exact; blocks do not disturb each other; what is beyond the range of the format by rounding does not become
NaN."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import FP8


@pytest.mark.parametrize(
    ("name", "relative", "normal"), [("e4m3", 1 / 16, 2.0**-6 / 448), ("e5m2", 1 / 8, 2.0**-14 / 57344)]
)
def test_relative_precision(name: str, relative: float, normal: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator) * 10 ** (4 * torch.rand(100_000, generator=generator))
    fp8 = FP8(name)
    result = fp8.decompress(fp8.compress(x))
    for part, mine in zip(x.split(128), result.split(128), strict=True):
        top = part.abs().max()
        error, magnitude = (mine - part).abs(), part.abs()
        kept = magnitude >= normal * top
        assert bool((error[kept] <= relative * 1.0001 * magnitude[kept]).all())
        torch.testing.assert_close(mine.abs().max(), top, rtol=1e-6, atol=0.0)
        assert bool((error[~kept] <= relative * normal * 1.0001 * top).all())


def test_scales_do_not_matter() -> None:
    """Powers of two change nothing but the scale."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    plain = FP8().decompress(FP8().compress(x))
    for exponent in (-60, 60):
        torch.testing.assert_close(FP8().decompress(FP8().compress(x * 2.0**exponent)) / 2.0**exponent, plain)
