"""Proved here: identity loses nothing in any dtype; casts round to the nearest representable value, float16 saturates
and underflows where it must, and casts of what is representable are exact."""

from __future__ import annotations

import torch

from lightning_decentral.compression import Cast, Identity


def test_identity_is_exact_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(Identity().decompress(Identity().compress(x)), x)
    assert Identity().num_bits(1000, torch.float64) == 64000


def test_casts_are_torchs() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 100  # several tiles
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        payload = Cast(name).compress(x)
        assert torch.equal(payload.tensors[0], x.to(dtype))
        assert torch.equal(Cast(name).decompress(payload), x.to(dtype).float())


def test_float16_saturates_and_underflows() -> None:
    x = torch.tensor([1e6, -1e6, 65504.0, 1e-9, 6e-8])
    result = Cast("float16").decompress(Cast("float16").compress(x))
    assert result.tolist() == [65504.0, -65504.0, 65504.0, 0.0, 2.0**-24]


def test_bfloat16_does_not_overflow_at_the_end_of_its_range() -> None:
    x = torch.tensor([torch.finfo(torch.float32).max])  # rounding to the nearest would give infinity
    assert Cast("bfloat16").decompress(Cast("bfloat16").compress(x)).item() == torch.finfo(torch.bfloat16).max
