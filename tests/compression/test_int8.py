"""Proved here: nearest rounding is off by at most half a step and stochastic rounding by less than one; the ends of the
range are exact; an outlier spoils its own bucket only; the stochastic error is what rounding at random has."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import Int8


@pytest.mark.parametrize("bucket", [None, 100, 512, 140_000])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_error_is_within_a_step(bucket: int | None, stochastic: bool) -> None:
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0)) + 3
    int8 = Int8(bucket, stochastic)
    result = int8.decompress(int8.compress(x, torch.Generator().manual_seed(1)))
    for part, mine in zip(x.split(bucket or len(x)), result.split(bucket or len(x)), strict=True):
        step = (part.max() - part.min()) / 255
        allowed = (1.0 if stochastic else 0.5) * step + 4e-6  # float32 rounding of values up to 8
        assert (mine - part).abs().max() <= allowed
        torch.testing.assert_close(mine.min(), part.min(), atol=0.0, rtol=0.0)
        torch.testing.assert_close(mine.max(), part.max(), atol=2e-6, rtol=0.0)


def test_an_outlier_spoils_its_own_bucket_only() -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    x[700] = 1e4
    error = (Int8().decompress(Int8().compress(x)) - x).abs()
    assert error[:512].max() < 0.02 < error[512:].max()


def test_equal_values_are_exact_at_any_magnitude() -> None:
    for value in (0.0, 1.1, -1e-38, 3e38):
        x = torch.full((1000,), value)
        assert torch.equal(Int8().decompress(Int8().compress(x)), x)


def test_the_stochastic_error_is_that_of_rounding_at_random() -> None:
    """`p (1 - p) step^2` per value, p its fractional part; 1 % is four standard errors at 100000 values."""
    x = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    x[0], x[1] = 0.0, 1.0
    int8 = Int8(None, True)
    error = (int8.decompress(int8.compress(x, torch.Generator().manual_seed(1))) - x).double().square().sum()
    part = (x.double() * 255).frac()
    expected = (part * (1 - part)).sum() / 255**2
    assert abs(error / expected - 1) < 0.01
