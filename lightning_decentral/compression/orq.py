"""ORQ: the best levels for the values of a bucket, with unbiased rounding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.packing import Packer, Unpacker, packed_bytes
from lightning_decentral.compression.sorting import sorted_rows
from lightning_decentral.compression.tiles import Scratch, chunk_of, num_buckets, rows_of, tiles
from lightning_decentral.compression.validation import require_at_least, require_one_of

_LARGE, _SMALLER = 2.0**100, 2.0**-40
_SWEEPS = 100  # at most, of the refinement; about ten are needed


@final
@dataclass(frozen=True)
class ORQ(AbstractCompressor):
    r"""Optimal random quantization: values are rounded at random to one of the two levels around them, so that the mean
    is right, and the levels are where this makes the smallest error for the bucket's own values.

    The error of a value between the levels `a` and `c` is `(c - x)(x - a)`. A level `b` between them is best where

        number of values in [b, c]  =  sum of (x - a) / (c - a) over the values in [a, c]

    which is a data point that sorting and prefix sums find at once. The outer levels are the bucket's minimum and
    maximum, so nothing is clipped. *Greedy*, the paper's: the best level between those two, then the best in each
    half, until there are `levels`; the error is within a tenth of the optimum. *Refined*: every level again between
    its present neighbours until none moves.

    Cost: `8 / floor(log_s 256)` bits per element (1.6, 2.67 and 4 for s = 3, 5, 9) and 32 s per bucket. A sort of every
    bucket.

    Args:
        levels: `s`: 3, 5, 9, 17 or 33.
        bucket: elements that share levels, at most 32768. A smaller one has a smaller error and more bits.
        refine: solve for all levels together.

    Raises:
        ConfigurationError: for other numbers.

    Example:
        >>> import torch
        >>> orq = ORQ(levels=3)
        >>> payload = orq.compress(torch.tensor([-1.0, 0.0, 0.0, 5.0]), torch.Generator().manual_seed(0))
        >>> orq.decompress(payload).tolist()
        [-1.0, 0.0, 0.0, 5.0]

    References:
        Xu, Huo, Huang, *Optimal Gradient Quantization Condition for Communication-Efficient Distributed Training*,
        2020, arXiv:2002.11082.
    """

    levels: int = 5
    bucket: int = 2048
    refine: bool = False

    def __post_init__(self) -> None:
        require_one_of("ORQ", "levels", self.levels, (3, 5, 9, 17, 33))
        require_at_least("ORQ", "bucket", self.bucket, 1, 1 << 15)
        require_one_of("ORQ", "refine", self.refine, (True, False))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, randomness="own", unit=self.bucket)

    def error_bound(self, numel: int) -> float:
        """Return `d / (2 (s - 1))` for buckets of d elements: the best level at least halves the error between two.

        In practice far less: 0.34 for Gaussian values, five levels and buckets of 2048.
        """
        return min(self.bucket, numel) / (2 * (self.levels - 1))

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        levels = self.levels * num_buckets(n, self.bucket)
        return ((torch.float32, levels), (torch.uint8, packed_bytes(n, self.levels)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        large = float(x.abs().max()) > _LARGE
        if large:  # or the differences would overflow
            x = x * _SMALLER
        levels = torch.empty(num_buckets(x.numel(), self.bucket), self.levels, device=x.device)
        packer = Packer(x.numel(), self.levels, x.device)
        scratch = Scratch(x, torch.float32, torch.float32, torch.bool, torch.uint8)
        for tile in tiles(x, self.bucket):
            values, mine = rows_of(x, tile), levels[tile.row : tile.row + tile.rows]
            mine.copy_(optimal_levels(values, self.levels, self.refine))
            uniform, border, above, codes = (scratch[i, tile] for i in range(4))
            uniform.uniform_(generator=generator)
            codes.zero_()
            for low, high in zip(mine.unsqueeze(2).unbind(1)[:-1], mine.unsqueeze(2).unbind(1)[1:], strict=True):
                # One number decides in the only interval where it matters: below it every border is exceeded, and
                # above it none.
                torch.addcmul(low, uniform, high - low, out=border)
                codes.add_(torch.gt(values, border, out=above).view(torch.uint8))
            packer.write(tile.start, codes)
        return (levels / _SMALLER if large else levels).view(-1), packer.packed

    def _decode(self, payload: Payload, out: Tensor) -> None:
        flat, packed = payload.tensors
        levels = flat.view(-1, self.levels)
        unpacker = Unpacker(packed, self.levels, chunk_of(out))
        index = Scratch(out, torch.int64)
        for tile in tiles(out, self.bucket):
            values = rows_of(out, tile)
            unpacker.read(tile.start, values)
            codes = index[0, tile].copy_(values)
            torch.gather(levels[tile.row : tile.row + tile.rows], 1, codes, out=values)


def optimal_levels(values: Tensor, levels: int, refine: bool) -> Tensor:
    """Return the levels of each row, in increasing order.

    Args:
        values: [buckets, elements].
        levels: `2^K + 1` of them.
        refine: until none moves.

    Returns:
        [buckets, levels], all of them elements of the row.
    """
    ordered = sorted_rows(values)
    rows, width = ordered.shape
    sums = torch.zeros(rows, width + 1, device=values.device)  # of what exceeds the minimum, before each position
    torch.cumsum(ordered - ordered[:, :1], 1, out=sums[:, 1:])
    position = torch.zeros(levels, rows, 1, dtype=torch.int64, device=values.device)  # of each level in its row
    position[-1] = width - 1

    def best_between(left: Tensor, right: Tensor) -> Tensor:
        """Return the position of the best level between two others: `left + floor(number - sum of (x - a) / (c -
        a))`."""
        low, high = ordered.gather(1, left), ordered.gather(1, right)
        number = right - left + 1
        excess = sums.gather(1, right + 1) - sums.gather(1, left) - number * (low - ordered[:, :1])
        offset = torch.where(high > low, number - excess / (high - low), 0.0).floor_().long()
        return torch.minimum(left + offset.clamp_(min=0), right)

    step = (levels - 1) // 2
    while step:
        for k in range(step, levels - 1, 2 * step):
            position[k] = best_between(position[k - step], position[k + step])
        step //= 2
    for _ in range(_SWEEPS if refine else 0):
        before = position.clone()
        for first in (1, 2):  # every other level: its neighbours stand still, so that the error can only fall
            for k in range(first, levels - 1, 2):
                position[k] = best_between(position[k - 1], position[k + 1])
        if torch.equal(before, position):
            break
    return torch.stack([ordered.gather(1, one).squeeze(1) for one in position], 1)
