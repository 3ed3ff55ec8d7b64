"""Proved here: the error of the scaled sign is its closed form; the levels of 1-bit SGD are the conditional means, its
error never larger than that of the scaled sign; the majority vote is what counting gives; no bit depends on a bucket's
neighbours; large values do not overflow."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import OneBitSGD, ScaledSign, SignSGD, majority_vote
from lightning_decentral.errors import CompressionError


def draw(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 10, 1000, 200_000])
def test_the_error_of_the_scaled_sign_is_its_closed_form(n: int) -> None:
    x = draw(n)
    error = (ScaledSign().decompress(ScaledSign().compress(x)) - x).double().square().sum()
    norm = x.double().square().sum()
    expected = norm - x.double().abs().sum() ** 2 / n
    assert abs(error - expected) <= 1e-6 * norm


def test_a_sparse_vector_keeps_nearly_nothing_and_the_error_is_no_larger_than_the_vector() -> None:
    x = torch.zeros(1000)
    x[17] = 5.0
    error = (ScaledSign().decompress(ScaledSign().compress(x)) - x).square().sum() / x.square().sum()
    assert error.item() == pytest.approx(0.999, abs=1e-6)  # with ||x||_2 / sqrt(n) as the scale it would be 1.94


def test_values_whose_sum_float32_cannot_hold_keep_their_magnitude() -> None:
    x = torch.full((1000,), -1e37)
    torch.testing.assert_close(ScaledSign().decompress(ScaledSign().compress(x)), x)


def test_minus_zero_is_zero_and_not_negative() -> None:
    for n in (16, 17):  # packed at once, and one by one
        x = torch.tensor([0.0, -0.0] * n)[:n]
        assert SignSGD().decompress(SignSGD().compress(x)).tolist() == [1.0] * n
        x[0] = 2.0 * n
        for scheme in (ScaledSign(), ScaledSign(8), ScaledSign(3)):
            payload = scheme.compress(x)
            result = scheme.decompress(payload)
            assert not bool(result.lt(0).any())
            assert torch.equal(scheme.subtract_(payload, x.clone()), x - result)
        onebit = OneBitSGD(None).decompress(OneBitSGD(None).compress(x))
        assert onebit.tolist() == [2.0] * n


def test_values_that_one_message_cannot_hold_are_refused_by_name() -> None:
    for scheme in (ScaledSign(), ScaledSign(4), OneBitSGD(None)):
        x = torch.tensor([3e38, -3e38] * 8)
        with pytest.raises(CompressionError, match=r"(ScaledSign|OneBit).* up to 3e\+38, needs smaller.*Scale"):
            scheme.compress(x)
        assert bool(scheme.decompress(scheme.compress(x / 2)).eq(x / 2).all())


def test_buckets_are_separate() -> None:
    x = torch.cat([torch.full((64,), 2.0), torch.full((64,), -30.0)])
    assert torch.equal(ScaledSign(64).decompress(ScaledSign(64).compress(x)), x)


@pytest.mark.parametrize("bucket", [None, 100, 140_000])
def test_one_bit_levels_are_conditional_means(bucket: int | None) -> None:
    x = draw(300_000).exp() - 1
    onebit, sign = OneBitSGD(bucket), ScaledSign(bucket)
    result, plain = onebit.decompress(onebit.compress(x)), sign.decompress(sign.compress(x))
    size = bucket or len(x)
    for part, mine, scaled in zip(x.split(size), result.split(size), plain.split(size), strict=True):
        for side in (part >= 0, part < 0):
            torch.testing.assert_close(mine[side].mean(), part[side].mean(), rtol=1e-5, atol=1e-6)
            assert mine[side].max() - mine[side].min() == 0
        assert (mine - part).square().sum() <= (scaled - part).square().sum() * (1 + 1e-6)


def test_one_sided_buckets() -> None:
    x = torch.cat([torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -3.0])])
    assert OneBitSGD(2).decompress(OneBitSGD(2).compress(x)).tolist() == [2.0, 2.0, -2.0, -2.0]


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 127])
def test_the_majority_is_counted(workers: int) -> None:
    xs = torch.stack([draw(1001, seed) for seed in range(workers)])
    vote = SignSGD().decompress(majority_vote([SignSGD().compress(x) for x in xs]))
    assert torch.equal(vote, torch.where(xs.sign().sum(0) >= 0, 1.0, -1.0))


def test_no_vote_without_voters() -> None:
    with pytest.raises(CompressionError, match="got 0 messages"):
        majority_vote([])
