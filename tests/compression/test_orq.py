"""Proved here: ORQ's levels meet the optimality condition, greedy ones with respect to the levels that they were put
between, refined ones with respect to their neighbours; the error lies between the exact optimum (found by dynamic
programming over all sets of data points) and evenly spaced levels, and refining never makes it larger; uniform data
have evenly spaced levels; levels follow when the data are scaled or shifted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_decentral.compression import ORQ
from lightning_decentral.compression.orq import optimal_levels

KINDS = ["gauss", "laplace", "student", "skewed"]


def data(kind: str, n: int = 400, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gauss, uniform = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    return {
        "gauss": gauss,
        "laplace": -gauss.sign() * uniform.log(),
        "student": gauss / torch.randn(3, n, generator=generator).square().mean(0).sqrt(),
        "skewed": gauss.exp() - 1,
    }[kind]


def error(x: Tensor, levels: Tensor) -> float:
    """The expected squared error of rounding at random between neighbouring levels."""
    x, levels = x.double(), levels.double()
    above = torch.bucketize(x, levels).clamp(1, len(levels) - 1)
    return float(((levels[above] - x) * (x - levels[above - 1])).sum())


def optimum(x: Tensor, s: int) -> float:
    """The smallest error of any s levels: between two data points as levels the error is a quadratic of prefix sums."""
    x = x.double().sort().values
    n, zero = len(x), torch.zeros(1, dtype=torch.float64)
    first, second = torch.cat([zero, x.cumsum(0)]), torch.cat([zero, x.square().cumsum(0)])
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    total, squares = first[j + 1] - first[i], second[j + 1] - second[i]
    cost = (x[i] + x[j]) * total - squares - (j + 1 - i) * x[i] * x[j]
    cost = torch.where(j >= i, cost, torch.inf)
    best = cost[0]
    for _ in range(s - 2):
        best = (best.unsqueeze(1) + cost).min(0).values
    return float(best[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [3, 5, 9])
def test_the_error_is_between_the_optimum_and_even_spacing(kind: str, s: int) -> None:
    x = data(kind)
    greedy, refined = (optimal_levels(x.unsqueeze(0), s, refine)[0] for refine in (False, True))
    best, even = optimum(x, s), error(x, torch.linspace(float(x.min()), float(x.max()), s))
    assert best * (1 - 1e-9) <= error(x, refined) <= error(x, greedy) * (1 + 1e-9)
    assert error(x, greedy) < even
    assert error(x, greedy) <= 1.1 * best  # 7 % in the worst of these cases
    assert error(x, refined) <= 1.06 * best  # no level can be moved alone, but two together


def residual(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> float:
    """By how many values the condition is missed; a data point cannot do better than one."""
    inside = x[(x >= a) & (x <= c)].double()
    return abs(float((inside >= b).sum() - ((inside - a) / (c - a)).sum()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [3, 5, 9, 17])
def test_refined_levels_meet_the_condition(kind: str, s: int) -> None:
    x = data(kind, 2048)
    levels = optimal_levels(x.unsqueeze(0), s, True)[0]
    assert bool((levels.diff() > 0).all())
    assert (levels[0], levels[-1]) == (x.min(), x.max())
    for k in range(1, s - 1):
        assert residual(x, *levels[k - 1 : k + 2]) <= 1.02  # 0.02: prefix sums in float32


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_levels_meet_it_between_those_they_were_put_between(kind: str) -> None:
    x = data(kind, 2048)
    levels = optimal_levels(x.unsqueeze(0), 9, False)[0]
    for step in (4, 2, 1):
        for k in range(step, 8, 2 * step):
            assert residual(x, levels[k - step], levels[k], levels[k + step]) <= 1.02


def test_rows_are_solved_apart() -> None:
    rows = torch.stack([data(kind) for kind in KINDS])
    for refine in (False, True):
        together = optimal_levels(rows, 5, refine)
        for row, levels in zip(rows, together, strict=True):
            assert torch.equal(optimal_levels(row.unsqueeze(0), 5, refine)[0], levels)


def test_uniform_data_have_evenly_spaced_levels() -> None:
    levels = optimal_levels(torch.linspace(0, 1, 2001).unsqueeze(0), 5, True)[0]
    torch.testing.assert_close(levels, torch.linspace(0, 1, 5), atol=2e-3, rtol=0.0)


def test_levels_follow_scale_and_shift() -> None:
    x = data("gauss", 1000).unsqueeze(0)
    levels = optimal_levels(x, 5, False)
    torch.testing.assert_close(optimal_levels(8 * x, 5, False), 8 * levels)
    torch.testing.assert_close(optimal_levels(x + 100, 5, False), levels + 100, atol=0.02, rtol=0.0)


@pytest.mark.parametrize("row", [[2.0] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 2.0, 2.0, 2.0, 2.0], [3.0]])
@pytest.mark.parametrize("s", [3, 9])
def test_ties_and_more_levels_than_values(row: list[float], s: int) -> None:
    """Where the data have two values or one, these are levels, and everything is exact."""
    x = torch.tensor(row)
    for refine in (False, True):
        orq = ORQ(levels=s, refine=refine)
        assert torch.equal(orq.decompress(orq.compress(x, torch.Generator().manual_seed(0))), x)


def test_only_the_two_levels_around_a_value_occur_and_the_error_is_the_expected_one() -> None:
    x = data("laplace", 5000)
    orq, generator = ORQ(levels=5, bucket=5000), torch.Generator().manual_seed(0)
    levels = orq.compress(x, generator).tensors[0]
    above = torch.bucketize(x, levels).clamp(1, 4)
    results = torch.stack([orq.decompress(orq.compress(x, generator)) for _ in range(100)])
    assert bool(((results == levels[above]) | (results == levels[above - 1])).all())
    errors = (results - x).double().square().sum(1)
    assert abs(float(errors.mean()) - error(x, levels)) <= 5 * float(errors.std()) / 10
