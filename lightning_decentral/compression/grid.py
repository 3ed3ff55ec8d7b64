"""Evenly spaced levels, the same on both sides of zero, with unbiased rounding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, numel
from lightning_decentral.compression.fused import Kernel, is_fused
from lightning_decentral.compression.packing import Packer, Unpacker, packed_bytes
from lightning_decentral.compression.tiles import (
    Scratch,
    chunk_of,
    column_of,
    num_buckets,
    parts_of,
    reciprocal,
    rows_of,
    tiles,
)
from lightning_decentral.errors import CompressionError

_BYTE = 256


class AbstractGrid(AbstractCompressor):
    """Every value becomes a whole number from `-s` to `s` times its bucket's scale over `s`, rounded at random.

    **Sums.** With one scale for all workers, the largest of theirs (*scaler sharing*), the whole numbers of several
    workers can be added. `encode_shared` leaves head room for that: a byte holds digits to the base `2 s n + 1`, so
    that `n` such messages are added byte by byte, by an all-reduce of `uint8`, and no digit overflows into the next.
    """

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int | None]:
        """The levels `s` on each side of zero, and the elements of a bucket; ``None`` for one bucket."""

    @abstractmethod
    def scales(self, x: Tensor) -> Tensor:
        """Return the scale of every bucket of a one-dimensional float32 vector; not negative."""

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        levels, bucket = self.grid
        n = numel(shape)
        return ((torch.float32, num_buckets(n, bucket)), (torch.uint8, packed_bytes(n, 2 * levels + 1)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        levels, bucket = self.grid
        scale = self.scales(x)
        return scale, _encoded(x, scale, levels, bucket, generator, 2 * levels + 1)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        levels, bucket = self.grid
        scale, packed = payload.tensors
        _decoded(packed, parts_of(scale, levels), levels, bucket, out, 2 * levels + 1)

    # -- sums of several workers' messages ----------------------------------------------------------------------------

    def can_add(self, workers: int) -> bool:
        """Tell whether the sum of so many whole numbers fits into a byte."""
        return 2 * self.grid[0] * workers < _BYTE

    def shared_fields(self, elements: int, workers: int) -> tuple[Field, ...]:
        """Tell what is all-reduced: the scales, by their maximum, and the packed numbers, by their sum."""
        packed = packed_bytes(elements, self._base(workers))
        return ((torch.float32, num_buckets(elements, self.grid[1])), (torch.uint8, packed))

    @torch.no_grad()
    def encode_shared(self, x: Tensor, scale: Tensor, workers: int, generator: torch.Generator | None) -> Tensor:
        """Return this worker's packed numbers, to be added to those of the others.

        Args:
            x: a one-dimensional float32 vector.
            scale: of every bucket: the largest of all workers' `scales`.
            workers: how many messages are added.
            generator: of this worker.

        Raises:
            CompressionError: if the sum may not fit into a byte.
        """
        levels, bucket = self.grid
        return _encoded(x, scale, levels, bucket, generator, self._base(workers))

    @torch.no_grad()
    def decode_sum(self, packed: Tensor, scale: Tensor, workers: int, out: Tensor) -> None:
        """Write the mean of the vectors that the sum of so many messages stands for; ``out`` as ``x`` was."""
        levels, bucket = self.grid
        _decoded(packed, parts_of(scale, levels * workers), levels * workers, bucket, out, self._base(workers))

    @torch.no_grad()
    def decode_own(self, packed: Tensor, scale: Tensor, workers: int, out: Tensor) -> None:
        """Write what one message stands for, before it is added to others."""
        levels, bucket = self.grid
        _decoded(packed, parts_of(scale, levels), levels, bucket, out, self._base(workers))

    def _base(self, workers: int) -> int:
        if not self.can_add(workers):
            most = (_BYTE - 1) // (2 * self.grid[0])
            raise CompressionError(
                f"{self} got {workers} messages to add, needs at most {most}: a byte holds no larger sums. Gather the "
                "messages."
            )
        return 2 * self.grid[0] * workers + 1


def _encoded(
    x: Tensor, scale: Tensor, levels: int, bucket: int | None, generator: torch.Generator | None, base: int
) -> Tensor:
    """Round `levels x / scale` to one of its two neighbouring whole numbers, up with the probability of the fractional
    part, clip it to the levels, and pack it. With a scale of 0 everything is 0."""
    packer = Packer(x.numel(), base, x.device)
    if x.is_meta:  # has a size and no values
        return packer.packed
    scratch = Scratch(x, torch.float32, torch.float32, torch.int32, torch.uint8)
    factor, fused = levels * reciprocal(scale), is_fused()
    for tile in tiles(x, bucket):
        values, uniform, whole, codes = (scratch[i, tile] for i in range(4))
        uniform.uniform_(generator=generator)
        if fused:
            _round_rows(rows_of(x, tile), uniform, column_of(factor, tile), codes, levels)
        else:
            torch.mul(rows_of(x, tile), column_of(factor, tile), out=values)
            # floor(v + u) rounds negative values as it should, too
            values.add_(uniform).floor_().clamp_(-levels, levels).add_(levels)
            codes.copy_(whole.copy_(values))  # float32 to uint8 directly is slow
        packer.write(tile.start, codes)
    return packer.packed


@Kernel
def _round_rows(x: Tensor, uniform: Tensor, factor: Tensor, codes: Tensor, levels: int) -> None:
    """Round ``x``, ``uniform`` and ``codes``: [buckets, elements]; ``factor``: [buckets, 1]."""
    codes.copy_((x * factor + uniform).floor().clamp(-levels, levels) + levels)


def _decoded(packed: Tensor, step: Tensor, zero: int, bucket: int | None, out: Tensor, base: int) -> None:
    """Write `step (digit - zero)`."""
    if out.is_meta:
        return
    unpacker = Unpacker(packed, base, chunk_of(out))
    for tile in tiles(out, bucket):
        values = rows_of(out, tile)
        unpacker.read(tile.start, values)
        values.sub_(zero).mul_(column_of(step, tile))
