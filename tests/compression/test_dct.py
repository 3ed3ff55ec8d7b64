"""Proved here: the basis is orthonormal and is the cosine transform; with all coefficients nothing is lost; with
some, the error is the energy of those left out; a smooth signal needs few."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import DCTTopK, TopK, cosine_basis


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_the_basis(size: int) -> None:
    basis = cosine_basis(size, torch.device("cpu"))
    torch.testing.assert_close(basis @ basis.t(), torch.eye(size), atol=1e-6, rtol=0.0)
    assert bool((basis[0] > 0).all())
    assert (basis[0].max() - basis[0].min()).item() == pytest.approx(0.0, abs=1e-7)  # the constant
    signs = basis.sign().diff(dim=1).count_nonzero(dim=1)
    assert signs.tolist() == list(range(size))  # row k changes its sign k times


@pytest.mark.parametrize("n", [64, 100, 200_000])
def test_all_coefficients_are_everything(n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    dct = DCTTopK(side=8, top=64)
    torch.testing.assert_close(dct.decompress(dct.compress(x)), x, atol=1e-5, rtol=0.0)


def test_the_error_is_what_is_left_out() -> None:
    x = torch.randn(3 * 64 * 64, generator=torch.Generator().manual_seed(0))
    payload = DCTTopK().compress(x)
    error = (DCTTopK().decompress(payload) - x).double().square().sum()
    left_out = x.double().square().sum() - payload.tensors[0].double().square().sum()
    torch.testing.assert_close(error, left_out, rtol=1e-5, atol=0.0)


def test_a_smooth_signal_needs_few() -> None:
    i = torch.arange(64.0)
    x = (torch.cos(0.05 * i).unsqueeze(1) * torch.exp(-0.02 * i)).view(-1)
    dct, topk = DCTTopK(), TopK(ratio=32 / 4096)
    error, plain = ((one.decompress(one.compress(x)) - x).square().sum() / x.square().sum() for one in (dct, topk))
    assert error < 1e-4
    assert plain > 0.9
