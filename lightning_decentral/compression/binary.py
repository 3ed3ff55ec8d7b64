"""Vectors of two values per bucket: a bit for each element, and the two values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_decentral.compression.fused import Kernel, is_fused
from lightning_decentral.compression.packing import Packer, Unpacker
from lightning_decentral.compression.tiles import Scratch, Tile, chunk_elements, chunk_of, column_of, rows_of, tiles

_BITS = 8  # of a byte
_WHOLE = 2.0**23  # added to a small whole number, it leaves this in the last byte of a float32


def pack_signs(x: Tensor) -> Tensor:
    """Return a bit for each value: 0 for negative values, and 1 for the others; -0.0 is not negative."""
    if x.numel() and x.numel() % _BITS == 0:
        return _pack_planes(x.view(_BITS, -1))
    packer = Packer(x.numel(), 2, x.device)
    scratch = Scratch(x, torch.float32, torch.uint8)
    for tile in tiles(x):
        packer.write(tile.start, _signs(rows_of(x, tile), scratch[0, tile], scratch[1, tile]))
    return packer.packed


def _signs(values: Tensor, work: Tensor, out: Tensor) -> Tensor:
    """Return 1 for what is not negative, and 0. A comparison into bytes, or a float32 made a byte, is far slower."""
    return out.copy_(torch.ge(values, 0.0, out=work).add_(_WHOLE).view(torch.int32))


def _pack_planes(planes: Tensor) -> Tensor:
    """Return the same where the planes are full: all eight bits of many bytes at once, which is a fifth of the
    operations. ``planes`` is [8, bytes]."""
    size = planes.shape[1]
    packed = torch.empty(size, dtype=torch.uint8, device=planes.device)
    if is_fused():
        _pack_in_one(planes, packed)
        return packed
    scratch = Scratch(planes, torch.float32, torch.uint8)
    for columns, tile in _columns(planes):
        codes = _signs(planes[:, columns], scratch[0, tile], scratch[1, tile])
        words = codes.view(torch.int32) if codes.shape[1] % 4 == 0 else codes  # four bytes at once: no carries
        words[:4].add_(words[4:], alpha=16)
        words[:2].add_(words[2:4], alpha=4)
        words[0].add_(words[1], alpha=2)
        packed[columns] = codes[0]
    return packed


@Kernel
def _pack_in_one(planes: Tensor, packed: Tensor) -> None:
    bits = torch.zeros_like(planes[0], dtype=torch.int32)
    for bit in range(_BITS):
        bits = bits | ((planes[bit] >= 0).to(torch.int32) << bit)
    packed.copy_(bits)


def unpack_levels(bits: Tensor, high: Tensor, low: Tensor, bucket: int | None, out: Tensor) -> None:
    """Write ``high`` where the bit is set and ``low`` elsewhere; both have one value for each bucket."""
    difference = high - low
    if bucket is None and out.numel() == _BITS * bits.numel():
        _unpack_planes(bits, difference, low, out.view(_BITS, -1))
        return
    unpacker = Unpacker(bits, 2, chunk_of(out))
    for tile in tiles(out, bucket):
        values = rows_of(out, tile)
        unpacker.read(tile.start, values)
        values.mul_(column_of(difference, tile)).add_(column_of(low, tile))


def _unpack_planes(bits: Tensor, difference: Tensor, low: Tensor, planes: Tensor) -> None:
    """Unpack one bucket whose planes are full: all eight bits of many bytes at once, which is a fifth of the
    operations. ``planes`` is [8, bytes]."""
    if is_fused():
        _unpack_in_one(bits, difference, low, planes)
        return
    masks = (2 ** torch.arange(_BITS, device=bits.device)).unsqueeze(1)
    ones, masks = difference / masks, masks.to(torch.uint8)  # exact: by powers of two
    scratch = Scratch(planes, torch.uint8)
    for columns, tile in _columns(planes):
        digits = torch.bitwise_and(bits[columns], masks, out=scratch[0, tile])
        planes[:, columns].copy_(digits).mul_(ones).add_(low)


@Kernel
def _unpack_in_one(bits: Tensor, difference: Tensor, low: Tensor, planes: Tensor) -> None:
    digits = (bits.unsqueeze(0) >> torch.arange(_BITS, dtype=torch.uint8, device=bits.device).unsqueeze(1)) & 1
    planes.copy_(digits * difference + low)


def _columns(planes: Tensor) -> Iterator[tuple[slice, Tile]]:
    """Cut [8, bytes] into columns of a chunk's size, each with the place of all its planes in a `Scratch`."""
    size = planes.shape[1]
    step = chunk_elements(planes.device) // _BITS
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield slice(start, stop), Tile(0, _BITS * (stop - start), 0, _BITS)
