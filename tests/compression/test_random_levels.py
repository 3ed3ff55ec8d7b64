"""Proved here, for QSGD, TernGrad, natural compression and NUQSGD: only the levels of the definition occur, each next
to the value; the error has the closed form of rounding at random between them, `(up - x)(x - down)` summed; the
constants in the facts of each scheme (TernGrad's exact error, its clipping; natural compression of powers of two)
hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_decentral.compression import NUQSGD, QSGD, AbstractCompressor, NaturalCompression, TernGrad


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def grid(s: int) -> Tensor:
    return torch.arange(s + 1, dtype=torch.float64) / s


def halves(s: int) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.float64), 2.0 ** torch.arange(-s, 1, dtype=torch.float64)])


CASES: list[tuple[AbstractCompressor, Tensor, str]] = [
    (QSGD(levels=1, bucket=1000), grid(1), "l2"),
    (QSGD(levels=7, bucket=1000), grid(7), "l2"),
    (QSGD(levels=127, bucket=1000), grid(127), "l2"),
    (QSGD(levels=4, bucket=1000, norm="max"), grid(4), "max"),
    (TernGrad(clip=None, bucket=1000), grid(1), "max"),
    (NUQSGD(levels=6, bucket=1000), halves(6), "l2"),
    (NUQSGD(levels=1, bucket=1000), halves(1), "l2"),
]


@pytest.mark.parametrize(("scheme", "levels", "norm"), CASES, ids=lambda value: repr(value)[:30])
def test_levels_and_error_are_those_of_the_definition(scheme: AbstractCompressor, levels: Tensor, norm: str) -> None:
    """400 draws of 1000 values; the mean error is known to 1 %, and five standard errors of it are allowed."""
    x = draw(1000).double()
    scale = x.norm() if norm == "l2" else x.abs().max()
    above = torch.bucketize(x.abs() / scale, levels).clamp(1, len(levels) - 1)
    down, up = scale * levels[above - 1], scale * levels[above]
    expected = ((up - x.abs()) * (x.abs() - down)).sum()
    generator = torch.Generator().manual_seed(1)
    errors = []
    for _ in range(400):
        result = scheme.decompress(scheme.compress(x.float(), generator)).double()
        away = torch.minimum((result.abs() - down).abs(), (result.abs() - up).abs())
        # of values on a level either neighbour may be found: they are the ends of the range
        assert float(away[1e-6 * scale < (x.abs() - up).abs()].max()) <= 1e-6 * scale
        assert bool((result * x >= 0).all())
        errors.append((result - x).square().sum())
    chance = 5 * torch.stack(errors).std() / 20
    assert abs(torch.stack(errors).mean() - expected) <= chance + 1e-6 * expected


def test_terngrads_error_is_its_closed_form_and_clipping_is_at_two_and_a_half_deviations() -> None:
    x = draw(100_000)
    scale = float(TernGrad().compress(x, torch.Generator().manual_seed(0)).tensors[0])
    assert scale == pytest.approx(2.5 * float(x.std()), rel=1e-4)
    x = torch.tensor([3.0, -1.0, 0.5, 0.0])
    expected = 3.0 * x.abs().sum() - x.square().sum()
    generator = torch.Generator().manual_seed(0)
    plain = TernGrad(clip=None)
    errors = torch.stack([
        (plain.decompress(plain.compress(x, generator)) - x).square().sum() for _ in range(1000)
    ])  # fmt: skip
    assert abs(errors.mean() - expected) <= 5 * errors.std() / 1000**0.5


def test_equal_values_are_not_clipped_to_nothing() -> None:
    x = torch.full((100,), 0.3)
    assert torch.allclose(TernGrad().decompress(TernGrad().compress(x, torch.Generator().manual_seed(0))), x)


def test_natural_compression_keeps_powers_of_two_and_zero_and_rounds_the_rest_to_them() -> None:
    natural, generator = NaturalCompression(), torch.Generator().manual_seed(0)
    exact = torch.cat([torch.zeros(1), 2.0 ** torch.arange(-126.0, 127.0)])
    for x in (exact, -exact):
        assert torch.equal(natural.decompress(natural.compress(x, generator)), x)
    x = draw(100_000)
    result = natural.decompress(natural.compress(x, generator))
    down = 2.0 ** x.abs().log2().floor()
    assert bool(((result.abs() == down) | (result.abs() == 2 * down)).all())
    expected = ((2 * down - x.abs()) * (x.abs() - down)).double().sum()
    error = (result - x).double().square().sum()
    assert abs(error / expected - 1) < 0.02  # four standard errors of 100000 values


def test_natural_compression_of_the_largest_number_is_finite() -> None:
    x = torch.full((100,), torch.finfo(torch.float32).max)
    result = NaturalCompression().decompress(NaturalCompression().compress(x, torch.Generator().manual_seed(0)))
    assert bool((result == 2.0**127).all())
