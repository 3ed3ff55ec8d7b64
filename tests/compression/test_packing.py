"""Proved here: whole numbers of every base come back from their packed bytes, written and read in pieces of any length;
the bytes are as few as whole digits per byte allow."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression.packing import Packer, Unpacker, digits_per_byte, packed_bytes


@pytest.mark.parametrize(("base", "digits"), [(2, 8), (3, 5), (4, 4), (5, 3), (6, 3), (7, 2), (9, 2), (16, 2), (17, 1)])
def test_digits_per_byte(base: int, digits: int) -> None:
    assert digits_per_byte(base) == digits
    assert base**digits <= 256 < base ** (digits + 1)


@pytest.mark.parametrize("base", [2, 3, 4, 5, 6, 7, 9, 15, 16, 17, 255, 256])
def test_there_and_back(base: int) -> None:
    for n in (1, 2, 7, 8, 9, 300, 1023):
        for piece in (1, 13, 5000):
            check_round_trip(base, n, piece)


def check_round_trip(base: int, n: int, piece: int) -> None:
    codes = torch.randint(0, base, (n,), generator=torch.Generator().manual_seed(base + n), dtype=torch.uint8)
    codes[-1] = base - 1
    packer = Packer(n, base, codes.device)
    for start in range(0, n, piece):
        packer.write(start, codes[start : start + piece])
    assert packer.packed.numel() == packed_bytes(n, base) == -(-n // digits_per_byte(base))
    unpacker = Unpacker(packer.packed, base, n)
    result = torch.full((n,), torch.nan)
    for start in range(0, n, piece + 1):
        unpacker.read(start, result[start : start + piece + 1])
    assert torch.equal(result, codes.float())
    if base in (2, 4, 16, 256):
        for start in range(0, n, piece + 1):
            stop = min(start + piece + 1, n)
            assert torch.equal(unpacker.codes(start, stop), codes[start:stop])
