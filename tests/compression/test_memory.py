"""Proved here: a long vector in new memory is decoded as one in memory that is there; its memory is its own, can be
written, and goes back to the system with it."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from lightning_decentral.compression import Int8, Lattice
from lightning_decentral.compression.memory import uninitialized

LONG = 9_000_001  # float32: 36 MB, where the memory is no longer torch's own


def test_a_long_vector_is_decoded_into_new_memory() -> None:
    x = torch.randn(3, LONG // 3, generator=torch.Generator().manual_seed(0))
    payload = Int8().compress(x)
    first, second = Int8().decompress(payload), Int8().decompress(payload)
    assert torch.equal(first, Int8().decompress(payload, torch.empty_like(x)))
    assert first.shape == x.shape
    assert first.is_contiguous()
    first.zero_()
    assert second.abs().max() > 1
    lattice = Lattice(0.01)
    near = lattice.decompress_near(lattice.compress(x), x)
    assert (near - x).abs().max() <= 0.005001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (5, 3), (20_000_001,)])
def test_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    new = uninitialized(shape, dtype, torch.device("cpu"))
    assert (tuple(new.shape), new.dtype) == (shape, dtype)
    assert torch.equal(new.fill_(2.0), torch.full(shape, 2.0, dtype=dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_goes_back_with_the_vector() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    new = uninitialized((50_000_000,), torch.float32, torch.device("cpu")).zero_()
    assert resident() - before > 150e6
    part = new[:10]
    del new
    assert part.sum() == 0  # a view keeps it
    del part
    assert resident() - before < 50e6
