"""256 evenly spaced levels between the smallest and the largest value of a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.fused import Kernel, is_fused
from lightning_decentral.compression.tiles import (
    Scratch,
    column_of,
    num_buckets,
    per_bucket,
    reciprocal,
    rows_of,
    tiles,
    unless_infinite,
    whole_buckets,
)
from lightning_decentral.compression.validation import require_bucket

_ROUND = 1.5 * 2**23  # added to a float32 below 2^22 it leaves the nearest whole number, in the last bits


@final
@dataclass(frozen=True)
class Int8(AbstractCompressor):
    r"""8 bits per value: the smallest value of a bucket, a step, and how many steps each value is above it.

    step = (max - min) / 255;   code = round((x - min) / step);   C(x) = min + step code

    Nearest rounding has the smaller error and is biased; stochastic rounding (up with the probability of the fractional
    part) is unbiased and needs a generator. The error of a value is at most half a step, or one step if stochastic.

    Cost: 8 bits per element and 64 per bucket.

    Args:
        bucket: elements that share a range; ``None`` for one range for all. Torch's quantization hooks take 512; a
            larger one costs fewer bits and lets one outlier spoil more of its neighbours.
        stochastic: unbiased rounding.

    Raises:
        ConfigurationError: for a bucket that is no positive number.

    Example:
        >>> import torch
        >>> int8 = Int8()
        >>> x = torch.linspace(-1, 1, 1000)
        >>> payload = int8.compress(x)
        >>> payload.num_bits / 1000, bool((int8.decompress(payload) - x).abs().max() <= 0.5 * 2 / 255)
        (8.128, True)

    References:
        The same idea is in PyTorch's quantization hooks (nearest, per 512), in torch_cgx (1 to 8 bits) and in Bagua's
        ByteGrad (per tensor). Stochastic: "QSGD in the maximum norm", Alistarh, Grubic, Li, Tomioka, Vojnovic, *QSGD:
        Communication-Efficient SGD via Gradient Quantization and Encoding*, NeurIPS 2017, arXiv:1610.02132.
    """

    _shows_what_is_not_finite = True  # in the smallest values and the steps

    bucket: int | None = 512
    stochastic: bool = False

    def __post_init__(self) -> None:
        require_bucket("Int8", self.bucket)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=self.stochastic,
            randomness="own" if self.stochastic else "none",
            unit=self.bucket or 1,
            divisible=self.bucket is not None,
        )

    def error_bound(self, numel: int) -> float:
        """Return `2 d / 510^2` for buckets of d elements: (half a step)^2 each, and (max - min)^2 <= 2 ||x||^2."""
        width = numel if self.bucket is None else min(self.bucket, numel)
        return 2.0 * width / 510**2

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        buckets = num_buckets(numel(shape), self.bucket)
        return ((torch.float32, buckets), (torch.float32, buckets), (torch.uint8, numel(shape)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        if is_fused() and not self.stochastic:
            return self._encode_in_one(x)
        low, high = per_bucket(x, self.bucket).fill_(torch.inf), per_bucket(x, self.bucket).fill_(-torch.inf)
        for tile in tiles(x, self.bucket):
            values = rows_of(x, tile)
            lows, highs = column_of(low, tile), column_of(high, tile)
            torch.minimum(lows, values.amin(1, keepdim=True), out=lows)
            torch.maximum(highs, values.amax(1, keepdim=True), out=highs)
        step = _usable(low, high / 255 - low / 255)  # each divided first: the difference may overflow
        inverse = reciprocal(step)
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        scratch = Scratch(x, torch.float32, torch.float32)
        for tile in tiles(x, self.bucket):
            values = scratch[0, tile]
            torch.sub(rows_of(x, tile), column_of(low, tile), out=values).mul_(column_of(inverse, tile))
            if self.stochastic:
                values.add_(scratch[1, tile].uniform_(generator=generator)).floor_().clamp_(max=255)
            rows_of(codes, tile).copy_(values.add_(_ROUND).view(torch.int32))  # its last byte
        return low, step, codes

    def _encode_in_one(self, x: Tensor) -> tuple[Tensor, ...]:
        low, step = per_bucket(x, self.bucket), per_bucket(x, self.bucket)
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for tile in whole_buckets(x, self.bucket):
            _encode_rows(rows_of(x, tile), column_of(low, tile), column_of(step, tile), rows_of(codes, tile))
        return low, _usable(low, step), codes  # not in the kernel: a compiler takes a difference of equals for zero

    def _decode(self, payload: Payload, out: Tensor) -> None:
        low, step, codes = payload.tensors
        if is_fused():
            for tile in whole_buckets(out, self.bucket):
                _decode_rows(rows_of(codes, tile), column_of(low, tile), column_of(step, tile), rows_of(out, tile))
            return
        for tile in tiles(out, self.bucket):
            values = rows_of(out, tile).copy_(rows_of(codes, tile))
            values.mul_(column_of(step, tile)).add_(column_of(low, tile))


def _usable(low: Tensor, step: Tensor) -> Tensor:
    """Return the steps, and NaN where the range is beyond float32's; a little more than what is computed is looked
    at."""
    return unless_infinite(step, (256 * step).add_(low))


@Kernel
def _encode_rows(x: Tensor, low: Tensor, step: Tensor, codes: Tensor) -> None:
    """Encode ``x`` into ``codes``: [buckets, elements]; ``low`` and ``step``: [buckets, 1]."""
    smallest, largest = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    width = largest / 255 - smallest / 255
    codes.copy_(((x - smallest) * reciprocal(width)).round())
    low.copy_(smallest)
    step.copy_(width)


@Kernel
def _decode_rows(codes: Tensor, low: Tensor, step: Tensor, out: Tensor) -> None:
    out.copy_(codes * step + low)
