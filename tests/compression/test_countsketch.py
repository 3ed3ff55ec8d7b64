"""Proved here: what is large in the sum of several vectors is found in the sum of their tables, even where no vector
has it large alone; with one row the error has its closed form, `(n - 1) / c` of the vector's; more rows make it
smaller for heavy values."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import CountSketch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_heavy_hitters_of_a_sum() -> None:
    n, workers, heavy = 20_000, 8, torch.tensor([5, 777, 19_999])
    xs = [torch.randn(n, generator=generator(seed)) for seed in range(workers)]
    for x in xs:
        x[heavy] = 25.0  # of the sum's noise of sqrt(8) sqrt(n / c) = 20, ten times as much together
    sketch = CountSketch(ratio=0.1, rows=5, keep=3 / n)
    payloads = [sketch.compress(x, generator(4)) for x in xs]
    total = payloads[0].replace([torch.stack([payload.tensors[0] for payload in payloads]).sum(0)])
    result = sketch.decompress(total)
    assert result.nonzero().view(-1).tolist() == heavy.tolist()
    assert float((result[heavy] / 200 - 1).abs().max()) < 0.3


def test_the_error_of_one_row_is_its_closed_form() -> None:
    """`E ||C(x) - x||^2 = (n - 1) / c ||x||^2` for pairwise independent hashes; five standard errors of 200 tables."""
    x, sketch, hashes = torch.randn(1000, generator=generator()), CountSketch(ratio=0.1, rows=1), generator(1)
    errors = torch.stack([(sketch.decompress(sketch.compress(x, hashes)) - x).square().sum() for _ in range(200)])
    expected = 999 / 100 * float(x.square().sum())
    assert abs(float(errors.mean()) - expected) <= 5 * float(errors.std()) / 200**0.5


@pytest.mark.parametrize("n", [1, 3, 70_000])
def test_a_single_value_is_exact(n: int) -> None:
    x = torch.zeros(n)
    x[n // 2] = 3.5
    sketch = CountSketch(rows=3)
    assert sketch.decompress(sketch.compress(x, generator())).max() == 3.5
