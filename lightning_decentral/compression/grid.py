"""Evenly spaced levels, the same on both sides of zero, with unbiased rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_decentral.compression.packing import Packer, Unpacker
from lightning_decentral.compression.tiles import Scratch, chunk_elements, column_of, reciprocal, rows_of, tiles


def encode_on_grid(
    x: Tensor, scale: Tensor, levels: int, bucket: int | None, generator: torch.Generator | None
) -> Tensor:
    """Round `levels x / scale` to one of its two neighbouring whole numbers, up with the probability of the fractional
    part, clip it to the levels, and pack it. With a scale of 0 everything is 0."""
    packer = Packer(x.numel(), 2 * levels + 1, x.device)
    scratch = Scratch(x, torch.float32, torch.float32, torch.int32, torch.uint8)
    factor = levels * reciprocal(scale)
    for tile in tiles(x, bucket):
        values, uniform, whole, codes = (scratch[i, tile] for i in range(4))
        torch.mul(rows_of(x, tile), column_of(factor, tile), out=values)
        # floor(v + u) rounds negative values as it should, too
        values.add_(uniform.uniform_(generator=generator)).floor_().clamp_(-levels, levels).add_(levels)
        packer.write(tile.start, codes.copy_(whole.copy_(values)))  # float32 to uint8 directly is slow
    return packer.packed


def decode_from_grid(packed: Tensor, scale: Tensor, levels: int, bucket: int | None, out: Tensor) -> None:
    """Write the levels that `encode_on_grid` chose."""
    unpacker = Unpacker(packed, 2 * levels + 1, chunk_elements(out.device))
    step = scale / levels
    for tile in tiles(out, bucket):
        values = rows_of(out, tile)
        unpacker.read(tile.start, values)
        values.sub_(levels).mul_(column_of(step, tile))
