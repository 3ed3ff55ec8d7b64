"""BinGrad: the best two levels for the values of a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn.functional import threshold

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.binary import unpack_levels
from lightning_decentral.compression.packing import Packer, packed_bytes
from lightning_decentral.compression.sorting import sorted_rows
from lightning_decentral.compression.tiles import (
    Scratch,
    chunk_elements,
    column_of,
    num_buckets,
    reciprocal,
    rows_of,
    tiles,
    unless_infinite,
)
from lightning_decentral.compression.validation import require_bucket, require_one_of

_SMALLER = 2.0**-64  # by which values are made smaller so that their sums do not overflow
_STEPS = 4  # of the search for b: from 0.81 of the mean magnitude, which is within 3 % for usual distributions
_PART = 1 << 20  # elements whose buckets are solved together: enough to make operations on one value per bucket cheap


@final
@dataclass(frozen=True)
class BinGrad(AbstractCompressor):
    r"""One bit per value, with the two levels that make the error smallest.

    *Partially biased* (``"pb"``): levels -b and b. Values between them are rounded at random, so that their mean is
    right; those beyond are clipped. For symmetric data the best `b` solves

        b = mean of |x_i| [|x_i| > b]     (the others count as 0)

    *Biased* (``"b"``): values above a threshold become their own mean, those below theirs; the best threshold lies
    half-way between the two means (Lloyd and Max); all are tried. No random numbers, and the smaller error. Both need
    error feedback.

    Cost: 1 bit per element and 32 (pb) or 64 (b) per bucket. The biased variant sorts every bucket; a bucket of more
    than 131072 elements needs several copies of itself.

    Args:
        variant: ``"pb"`` or ``"b"``.
        bucket: elements that share levels; ``None`` for all.

    Raises:
        ConfigurationError: for another variant, or a bucket that is no positive number.

    Example:
        >>> import torch
        >>> bingrad = BinGrad("b")
        >>> bingrad.decompress(bingrad.compress(torch.tensor([1.0, 2.0, 11.0, 12.0]))).tolist()
        [1.5, 1.5, 11.5, 11.5]

    References:
        Xu, Huo, Huang, *Optimal Gradient Quantization Condition for Communication-Efficient Distributed Training*,
        2020, arXiv:2002.11082.
    """

    _may_overflow = True

    variant: Literal["pb", "b"] = "pb"
    bucket: int | None = 2048

    def __post_init__(self) -> None:
        require_one_of("BinGrad", "variant", self.variant, ("pb", "b"))
        require_bucket("BinGrad", self.bucket)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, randomness="own" if self.variant == "pb" else "none", unit=self.bucket or 1)

    def error_bound(self, numel: int) -> float:
        """Return `1 - 1 / (4 d)` (pb) or `1 - 1 / d` (b) for buckets of d elements.

        pb: the error is `||x||^2 - d b^2` at most, and `b >= ||x||_1 / (2 d)`. b: it is at most what a threshold at the
        mean gives, and that is to `x - mean(x)` what `ScaledSign` is to a vector.
        """
        width = max(1, numel if self.bucket is None else min(self.bucket, numel))
        return 1.0 - 1.0 / (4 * width if self.variant == "pb" else width)

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        levels = (torch.float32, num_buckets(n, self.bucket))
        return (*([levels] if self.variant == "pb" else [levels, levels]), (torch.uint8, packed_bytes(n, 2)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        if self.variant == "pb":
            level = self._levels(x)
            if not bool(level.isfinite().all()):  # sums of large values overflowed
                level = self._levels(x * _SMALLER) / _SMALLER
            level = unless_infinite(level, 2 * level)
            return level, _round_at_random(x, level, self.bucket, generator)
        width = x.numel() if self.bucket is None else self.bucket
        full = x.numel() // width * width
        step = max(1, chunk_elements(x.device) // width) * width
        parts = [*torch.split(x[:full].view(-1, width), step // width), x[full:].view(1, -1)]
        pairs = [_best_split(part) for part in parts if part.numel()]
        low, high = (torch.cat(levels) for levels in zip(*pairs, strict=True))
        high = unless_infinite(high, high - low)
        return low, high, _above(x, low / 2 + high / 2, self.bucket)

    def _levels(self, x: Tensor) -> Tensor:
        return torch.cat([_symmetric_level(part, width) for part, width in _parts(x, self.bucket)])

    def _decode(self, payload: Payload, out: Tensor) -> None:
        *levels, bits = payload.tensors
        low, high = (-levels[0], levels[0]) if self.variant == "pb" else levels
        unpack_levels(bits, high, low, self.bucket, out)


def _parts(x: Tensor, bucket: int | None) -> Iterator[tuple[Tensor, int]]:
    """Pieces of whole buckets with the buckets' width, small enough for the cache where a bucket is; they are gone
    through several times. An incomplete last bucket is a piece of its own."""
    width = x.numel() if bucket is None else min(bucket, x.numel())
    full = x.numel() // width * width
    for part in torch.split(x[:full], max(1, max(_PART, chunk_elements(x.device)) // width) * width):
        yield part, width
    if full < x.numel():
        yield x[full:], x.numel() - full


def _symmetric_level(x: Tensor, width: int) -> Tensor:
    """Return `b` of each bucket: the root of `b = mean(|x|; |x| > b)`. The right side falls with `b`, so there is one
    root; found by secants."""
    scratch = Scratch(x, torch.float32)
    inverse = torch.ones(x.numel() // width, device=x.device)
    limit = -1.0

    def tail_means() -> Tensor:
        """Return `mean(|x|; |x| > 1 / inverse)` times the inverse."""
        total = torch.zeros_like(inverse)
        for tile in tiles(x, width):
            values = torch.mul(rows_of(x, tile), column_of(inverse, tile), out=scratch[0, tile]).abs_()
            column_of(total, tile).add_(threshold(values, limit, 0.0, inplace=True).sum(1, keepdim=True))
        return total / width

    level = 0.81 * tail_means()
    limit = 1.0  # from now on everything is in units of the level
    slope = torch.full_like(level, -0.4)  # of the right side, about what usual distributions have
    before: tuple[Tensor, Tensor] | None = None
    for _ in range(_STEPS):
        inverse = reciprocal(level)
        right = tail_means() * level
        if before is not None:
            change = level - before[0]
            secant = torch.where(change.abs() > 1e-5 * level, (right - before[1]) / change, slope)
            slope = torch.where(secant.isfinite(), secant, slope).clamp_(-20.0, 0.0)
        before = level, right
        level = level + (right - level) / (1.0 - slope)
    return level


def _round_at_random(x: Tensor, level: Tensor, bucket: int | None, generator: torch.Generator | None) -> Tensor:
    """Packed bits: 1 with the probability `(x + b) / (2 b)`, cut to [0, 1]."""
    packer = Packer(x.numel(), 2, x.device)
    scratch = Scratch(x, torch.float32, torch.float32, torch.int32, torch.uint8)
    half = reciprocal(2 * level)
    for tile in tiles(x, bucket):
        values, uniform, whole, codes = (scratch[i, tile] for i in range(4))
        torch.mul(rows_of(x, tile), column_of(half, tile), out=values).add_(0.5)
        values.add_(uniform.uniform_(generator=generator)).clamp_(0.0, 1.0)  # 1 stays 1 when it is cut to whole numbers
        packer.write(tile.start, codes.copy_(whole.copy_(values)))
    return packer.packed


def _best_split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the means below and above the best threshold.

    With sums around the mean, cutting the sorted row after k of n values removes `S_k^2 n / (k (n - k))` of the squared
    error. All cuts are tried.
    """
    width = rows.shape[1]
    ordered = sorted_rows(rows).double()
    mean = ordered.mean(1, keepdim=True)
    if width == 1:
        return mean.float().view(-1), mean.float().view(-1)
    sums = torch.cumsum(ordered.sub_(mean), 1)[:, :-1]
    number = torch.arange(1, width, dtype=torch.float64, device=rows.device)
    cut = (sums.square() / (number * (width - number))).argmax(1, keepdim=True)
    below = sums.gather(1, cut)
    low, high = mean + below / (cut + 1), mean - below / (width - 1 - cut)
    return low.float().view(-1), high.float().view(-1)


def _above(x: Tensor, split: Tensor, bucket: int | None) -> Tensor:
    """Packed bits: whether a value is above the threshold."""
    packer = Packer(x.numel(), 2, x.device)
    mask = Scratch(x, torch.bool)
    for tile in tiles(x, bucket):
        values = torch.gt(rows_of(x, tile), column_of(split, tile), out=mask[0, tile])
        packer.write(tile.start, values.view(torch.uint8))
    return packer.packed
