"""Proved here: BinGrad's levels solve their equations on every kind of data: `b` the one of the partially biased
variant, the threshold half-way between two conditional means the other; for Gaussian values they are the known
numbers; the error is smaller than that of the sign schemes; compressing twice changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_decentral.compression import BinGrad, OneBitSGD, ScaledSign


def data(kind: str, n: int = 8192) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    gauss, uniform = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    return {
        "gauss": gauss,
        "laplace": -gauss.sign() * uniform.log(),
        "student": gauss / torch.randn(4, n, generator=generator).square().mean(0).sqrt(),
        "skewed": gauss.exp() - 1,
        "uniform": uniform - 0.5,
        "sparse": gauss * (uniform < 0.05),
        "tiny": 1e-20 * gauss,
    }[kind]


KINDS = ["gauss", "laplace", "student", "skewed", "uniform", "sparse", "tiny"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bucket", [512, 2048, None])
def test_the_partially_biased_level_solves_its_equation(kind: str, bucket: int | None) -> None:
    """The right side jumps by `|x_i| / n` at a data point, so the root is where the sign of the difference changes: it
    lies within 1 % of `b`, where the error is within 1e-4 of the best."""
    x = data(kind)
    level = BinGrad("pb", bucket).compress(x, torch.Generator().manual_seed(0)).tensors[0]
    for part, b in zip(x.split(bucket or len(x)), level.double(), strict=True):
        magnitudes = part.double().abs()

        def difference(t: Tensor, magnitudes: Tensor = magnitudes) -> float:
            return float((magnitudes * (magnitudes > t)).mean() - t)

        assert difference(0.99 * b) > 0 > difference(1.01 * b)


def test_gaussian_levels_are_the_known_ones() -> None:
    """b = sqrt(2 / pi) exp(-b^2 / 2) has the root 0.6471; Lloyd's levels are plus and minus sqrt(2 / pi)."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    pb = BinGrad("pb", None)
    payload = pb.compress(x, torch.Generator().manual_seed(1))  # not the seed that x was drawn with
    assert float(payload.tensors[0]) == pytest.approx(0.6471, abs=0.004)  # three standard errors
    assert float((pb.decompress(payload) - x).square().mean()) == pytest.approx(0.455, abs=0.005)
    low, high, _ = BinGrad("b", None).compress(x).tensors
    assert (-float(low), float(high)) == pytest.approx((0.7979, 0.7979), abs=0.005)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bucket", [512, 2048, None])
def test_the_biased_threshold_is_half_way_between_the_means(kind: str, bucket: int | None) -> None:
    x = data(kind)
    low, high, _ = BinGrad("b", bucket).compress(x).tensors
    for part, a, c in zip(x.split(bucket or len(x)), low, high, strict=True):
        above = part.double() > (a.double() + c.double()) / 2
        torch.testing.assert_close(part.double()[above].mean().float(), c, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(part.double()[~above].mean().float(), a, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_biased_variant_beats_the_signs_and_is_idempotent(kind: str) -> None:
    x = data(kind)
    bingrad, onebit, sign = BinGrad("b"), OneBitSGD(2048), ScaledSign(2048)
    once = bingrad.decompress(bingrad.compress(x))
    errors = [
        float((one - x).double().square().sum())
        for one in (once, onebit.decompress(onebit.compress(x)), sign.decompress(sign.compress(x)))
    ]
    assert errors[0] <= 1.0001 * errors[1] <= 1.0002 * errors[2]
    torch.testing.assert_close(bingrad.decompress(bingrad.compress(once)), once, rtol=3e-5, atol=0.0)  # sums in float32


def test_skewed_data_gain_most() -> None:
    x = data("skewed", 100_000)
    bingrad, sign = BinGrad("b", None), ScaledSign()
    error = (bingrad.decompress(bingrad.compress(x)) - x).square().mean()
    assert error < 0.7 * (sign.decompress(sign.compress(x)) - x).square().mean()


def test_the_partially_biased_variant_is_unbiased_inside_and_clips_outside() -> None:
    x = data("gauss", 2048)
    pb, generator = BinGrad("pb"), torch.Generator().manual_seed(0)
    samples = torch.stack([pb.decompress(pb.compress(x, generator)) for _ in range(1000)])
    b = float(samples.max())
    chance = 5 * samples.std(0, correction=0) / 1000**0.5 + 12 * 2 * b / 1000  # see the contract
    assert bool(((samples.mean(0) - x.clamp(-b, b)).abs() <= chance).all())
