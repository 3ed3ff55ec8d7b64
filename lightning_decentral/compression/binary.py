"""Vectors of two values per bucket: a bit for each element, and the two values."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_decentral.compression.packing import Packer, Unpacker
from lightning_decentral.compression.tiles import Scratch, chunk_elements, column_of, rows_of, tiles


def pack_signs(x: Tensor) -> Tensor:
    """A bit for each value: 0 where its sign bit is set, so for negative values and -0.0."""
    packer = Packer(x.numel(), 2, x.device)
    scratch = Scratch(x, torch.int32, torch.uint8)
    for tile in tiles(x):
        bits, codes = scratch[0, tile], scratch[1, tile]
        torch.bitwise_right_shift(rows_of(x, tile).view(torch.int32), 31, out=bits).add_(1)
        packer.write(tile.start, codes.copy_(bits))
    return packer.packed


def unpack_levels(bits: Tensor, high: Tensor, low: Tensor, bucket: int | None, out: Tensor) -> None:
    """Write ``high`` where the bit is set and ``low`` elsewhere; both have one value for each bucket."""
    unpacker = Unpacker(bits, 2, chunk_elements(out.device))
    difference = high - low
    for tile in tiles(out, bucket):
        values = rows_of(out, tile)
        unpacker.read(tile.start, values)
        values.mul_(column_of(difference, tile)).add_(column_of(low, tile))
