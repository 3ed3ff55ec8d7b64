"""Working through a long vector in pieces that stay in the processor's cache.

A memory-sized intermediate result costs more than the arithmetic on it, above all where it is new memory. So schemes
compute in a few scratch tensors of `chunk_elements` each, and touch the long tensors once per pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 17  # 512 KiB of float32: in the cache, and long enough that calling the operations costs little
_DEVICE_CHUNK = 1 << 24  # an accelerator needs more to be busy


def chunk_of(x: Tensor) -> int:
    """Tell how many elements of this vector to work on at once. What is a little longer than a chunk is not cut:
    operations have a price of their own, and the parts of a gradient that workers own are often of that size."""
    chunk = chunk_elements(x.device)
    return x.numel() if x.numel() <= 2 * chunk else chunk


class Tile(NamedTuple):
    """The elements from `start` to `stop`: all of `rows` buckets from number `row` on, or a part of one bucket."""

    start: int
    stop: int
    row: int
    rows: int


def chunk_elements(device: torch.device) -> int:
    """Tell how many elements to work on at once."""
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def num_buckets(numel: int, bucket: int | None) -> int:
    """Tell how many buckets a vector has; ``None`` is one bucket for all."""
    return min(1, numel) if bucket is None else -(-numel // bucket)


def tiles(x: Tensor, bucket: int | None = None, chunk: int | None = None) -> Iterator[Tile]:
    """Cut a vector into pieces that do not cross a bucket's border, except between whole buckets."""
    numel, chunk = x.numel(), chunk_of(x) if chunk is None else chunk
    if not numel:
        return
    width = numel if bucket is None else bucket
    if width <= chunk:
        full = numel // width * width
        step = chunk // width * width
        for start in range(0, full, step):
            stop = min(start + step, full)
            yield Tile(start, stop, start // width, (stop - start) // width)
        if full < numel:
            yield Tile(full, numel, full // width, 1)
        return
    for row, first in enumerate(range(0, numel, width)):
        last = min(first + width, numel)
        for start in range(first, last, chunk):
            yield Tile(start, min(start + chunk, last), row, 1)


def whole_buckets(x: Tensor, bucket: int | None = None) -> Iterator[Tile]:
    """Return all full buckets at once, and the rest: for kernels, which need no scratch memory."""
    return tiles(x, bucket, x.numel())


def rows_of(x: Tensor, tile: Tile) -> Tensor:
    """Return the tile's part of a vector, one bucket (or part of one) per row."""
    return x[tile.start : tile.stop].view(tile.rows, -1)


def column_of(per_bucket: Tensor, tile: Tile) -> Tensor:
    """Return the tile's part of a tensor that has one value per bucket, as a column."""
    return per_bucket[tile.row : tile.row + tile.rows].unsqueeze(1)


class Scratch:
    """Tensors of a chunk's size that are used again for every tile.

    On a CPU every thread keeps its own for the next vector: new memory has to be cleared by the system, which takes
    longer than to compute in it. Of an accelerator's memory torch does the keeping.

    Args:
        x: the vector that is worked through.
        dtypes: one tensor each.
        chunk: elements of the largest tile; by default as `tiles` cuts by default.
    """

    def __init__(self, x: Tensor, *dtypes: torch.dtype, chunk: int | None = None) -> None:
        size = min(x.numel(), chunk_of(x) if chunk is None else chunk)
        self._views: dict[tuple[int, int, int], Tensor] = {}  # to make one takes as long as to compute with thousands
        if x.device.type != "cpu":
            self._tensors = [torch.empty(size, dtype=dtype, device=x.device) for dtype in dtypes]
            return
        kept = _kept.__dict__
        self._tensors = []
        for number, dtype in enumerate(dtypes):
            key = f"{number} {dtype}"
            if key not in kept or kept[key].numel() < size:
                with torch.inference_mode(False):  # or it could not be written to outside of that
                    kept[key] = torch.empty(size, dtype=dtype)
            self._tensors.append(kept[key])

    def __getitem__(self, key: tuple[int, Tile]) -> Tensor:
        index, tile = key
        size, rows = tile.stop - tile.start, tile.rows
        if (index, size, rows) not in self._views:
            self._views[index, size, rows] = self._tensors[index][:size].view(rows, -1)
        return self._views[index, size, rows]


_kept = threading.local()


def per_bucket(x: Tensor, bucket: int | None) -> Tensor:
    """Zeros, one for each bucket."""
    return torch.zeros(num_buckets(x.numel(), bucket), dtype=torch.float32, device=x.device)


def largest_magnitudes(x: Tensor, bucket: int | None) -> Tensor:
    """Return `max |x|` of every bucket."""
    result = per_bucket(x, bucket)
    for tile in tiles(x, bucket):
        values, mine = rows_of(x, tile), column_of(result, tile).squeeze(1)
        torch.maximum(mine, torch.maximum(values.amax(1), values.amin(1).neg_()), out=mine)
    return result


def sums_of_magnitudes(x: Tensor, bucket: int | None) -> Tensor:
    """Return `||x||_1` of every bucket, in float64."""
    result = _sums_of_magnitudes(x, bucket, torch.float32)
    if bool(result.isinf().any()):  # of large values, which float64 can add
        result = _sums_of_magnitudes(x, bucket, torch.float64)
    return result


def _sums_of_magnitudes(x: Tensor, bucket: int | None, within_tiles: torch.dtype) -> Tensor:
    result = per_bucket(x, bucket).double()
    magnitudes = Scratch(x, torch.float32)
    for tile in tiles(x, bucket):  # torch's own norm of order 1 takes four times as long
        mine = torch.abs(rows_of(x, tile), out=magnitudes[0, tile])
        column_of(result, tile).squeeze(1).add_(mine.sum(1, dtype=within_tiles))
    return result


def norms(x: Tensor, bucket: int | None) -> Tensor:
    """Return `||x||_2` of every bucket, and float32's largest number where it is larger than that."""
    return wide_norms(x, bucket).clamp_(max=torch.finfo(torch.float32).max).float()


def wide_norms(x: Tensor, bucket: int | None) -> Tensor:
    """Return `||x||_2` of every bucket, in float64, where squares neither overflow nor vanish."""
    result = per_bucket(x, bucket).double()
    wide = Scratch(x, torch.float64)
    for tile in tiles(x, bucket):
        squares = wide[0, tile].copy_(rows_of(x, tile)).square_()
        column_of(result, tile).squeeze(1).add_(squares.sum(1))
    return result.sqrt_()


def parts_of(scale: Tensor, count: float) -> Tensor:
    """Return `scale / count`, rounded such that so many of them together are not infinite."""
    part = scale / count
    return torch.where((part * count).isinf(), part * (1 - torch.finfo(torch.float32).eps), part)


def unless_infinite(values: Tensor, computed: Tensor) -> Tensor:
    """Return the values, and NaN where what is computed of them is infinite: `AbstractCompressor.compress` refuses
    that."""
    return values + (computed - computed)


def reciprocal(scale: Tensor) -> Tensor:
    """Return `1 / scale`, and 0 where the scale is 0 or so small that the quotient is infinite."""
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale.reciprocal(), 0.0)


def sizes_of_buckets(numel: int, bucket: int | None, device: torch.device) -> Tensor:
    """Tell how many elements each bucket has; only the last one may have fewer than the others."""
    count = num_buckets(numel, bucket)
    sizes = torch.full((count,), float(numel if bucket is None else bucket), device=device)
    if bucket is not None and count:
        sizes[-1] = numel - (count - 1) * bucket
    return sizes
