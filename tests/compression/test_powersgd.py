"""Proved here: at full rank PowerSGD is exact; a result is a projection, so that what is sent and what is left are
orthogonal; starting from the last step it finds a matrix of low rank; with several workers and all-reduced factors the
result is that of the mean, exact where the rank suffices, and the workers' residuals add up to the mean's."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import PowerSGD, orthogonalize


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 2, 3), (30,), (1,), (7,), (3, 1)])
def test_full_rank_is_exact(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator())
    powersgd = PowerSGD(rank=9)
    result = powersgd.decompress(powersgd.compress(x, generator(1)))
    torch.testing.assert_close(result, x, atol=2e-5, rtol=1e-4)  # the products are made in float32


def test_the_result_is_a_projection() -> None:
    x = torch.randn(40, 60, generator=generator())
    powersgd = PowerSGD(rank=3)
    result = powersgd.decompress(powersgd.compress(x, generator(1)))
    assert int(torch.linalg.matrix_rank(result, rtol=1e-4)) == 3
    assert abs(float((result * (x - result)).sum())) < 1e-3 * float(x.square().sum())


def test_warm_start_is_power_iteration() -> None:
    """From step to step the error falls to that of the best approximation of this rank."""
    u, s, v = torch.linalg.svd(torch.randn(30, 40, generator=generator()), full_matrices=False)
    s[2:] *= 0.3
    x, powersgd = (u * s) @ v, PowerSGD(rank=2)
    right = powersgd.start(x.shape, generator(1))
    for _ in range(30):
        left = orthogonalize(powersgd.left(x, right))
        right = powersgd.right(x, left)
    error = float((powersgd.product(left, right, x.shape) - x).square().sum())
    assert error == pytest.approx(float(s[2:].square().sum()), rel=1e-3)


@pytest.mark.parametrize("shape", [(20, 15), (300,)])
def test_all_reduced_factors_give_the_mean(shape: tuple[int, ...]) -> None:
    powersgd, workers = PowerSGD(rank=4), 3
    base = torch.randn(20, 2, generator=generator())
    xs = [(base @ torch.randn(2, 15, generator=generator(seed))).view(shape) for seed in range(workers)]
    if shape == (300,):  # seen as 18 x 17: of full rank
        powersgd = PowerSGD(rank=18)
    mean = torch.stack(xs).mean(0)
    right = powersgd.start(shape, generator(5))
    left = orthogonalize(torch.stack([powersgd.left(x, right) for x in xs]).mean(0))
    rights = [powersgd.right(x, left) for x in xs]
    result = powersgd.product(left, torch.stack(rights).mean(0), shape)
    torch.testing.assert_close(result, mean, atol=1e-4, rtol=1e-3)
    own = [x - powersgd.product(left, mine, shape) for x, mine in zip(xs, rights, strict=True)]
    torch.testing.assert_close(torch.stack(own).mean(0), mean - result, atol=1e-5, rtol=0.0)


def test_columns_are_orthonormal_even_if_they_nearly_agree() -> None:
    column = torch.randn(50, 1, generator=generator())
    nearly = column + 1e-6 * torch.randn(50, 4, generator=generator(1))
    q = orthogonalize(nearly)
    torch.testing.assert_close(q.t() @ q, torch.eye(4), atol=1e-5, rtol=0.0)
