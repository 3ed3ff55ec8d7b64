"""4-bit floating-point numbers: a sign and an exponent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.packing import Packer, Unpacker, packed_bytes
from lightning_decentral.compression.tiles import (
    Scratch,
    chunk_of,
    column_of,
    largest_magnitudes,
    num_buckets,
    reciprocal,
    rows_of,
    tiles,
)
from lightning_decentral.compression.validation import require_bucket

_LEVELS = 7  # powers of two: 2^-6 to 1 of the largest, and 0


@final
@dataclass(frozen=True)
class FP4(AbstractCompressor):
    r"""4 bits: a sign and 3 bits of exponent (E3M0), relative to the largest magnitude of the bucket.

    The values are `0, 2^-6, ..., 1/2, 1` times that, with both signs; each element becomes the nearest one. An element
    is off by at most a third of itself, if it is not below 1/128 of the largest. Biased: use error feedback, or accept
    it, as Streaming DiLoCo does for differences.

    Cost: 4 bits per element and 32 per bucket.

    Args:
        bucket: elements that share a largest magnitude; ``None`` for all.

    Raises:
        ConfigurationError: for a number out of range.

    Example:
        >>> import torch
        >>> fp4 = FP4()
        >>> fp4.decompress(fp4.compress(torch.tensor([4.0, -1.1, 0.0, 0.7]))).tolist()
        [4.0, -1.0, 0.0, 0.5]

    References:
        Douillard et al., *Streaming DiLoCo with Overlapping Communication*, 2025, arXiv:2501.18512, who pack
        differences so.
    """

    bucket: int | None = 128

    def __post_init__(self) -> None:
        require_bucket("FP4", self.bucket)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, unit=self.bucket or 1)

    def error_bound(self, numel: int) -> float:
        """Return `max(1/9, r / (1 + r))`, `r = (d - 1) / 128^2`, for buckets of d: all but one may become 0."""
        width = numel if self.bucket is None else min(self.bucket, numel)
        lost = max(width - 1, 0) * 4.0**-_LEVELS
        return max(1.0 / 9.0, lost / (1.0 + lost))

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        return ((torch.float32, num_buckets(n, self.bucket)), (torch.uint8, packed_bytes(n, 16)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        scale = largest_magnitudes(x, self.bucket)
        inverse = reciprocal(scale)
        packer = Packer(x.numel(), 16, x.device)
        scratch = Scratch(x, torch.float32, torch.int32, torch.int32, torch.uint8)
        for tile in tiles(x, self.bucket):
            ratio, bits, some, codes = (scratch[i, tile] for i in range(4))
            # Between 2^k and 2^(k + 1) the middle is 1.5 * 2^k: four thirds of a value have the nearest one's exponent.
            torch.abs(rows_of(x, tile), out=ratio).mul_(column_of(inverse, tile)).mul_(4.0 / 3.0)
            some.copy_(ratio >= 4.0 / 3.0 * 2.0**-_LEVELS)  # nearer to the smallest one than to 0
            bits.copy_(ratio.view(torch.int32)).bitwise_right_shift_(23).sub_(127 - _LEVELS).clamp_(max=_LEVELS)
            ratio.copy_(torch.maximum(bits, some, out=bits)).copysign_(rows_of(x, tile)).add_(_LEVELS)  # 0 to 14
            packer.write(tile.start, codes.copy_(ratio))
        return scale, packer.packed

    def _decode(self, payload: Payload, out: Tensor) -> None:
        scale, packed = payload.tensors
        unpacker = Unpacker(packed, 16, chunk_of(out))
        scratch = Scratch(out, torch.float32)
        for tile in tiles(out, self.bucket):
            values, magnitude = rows_of(out, tile), scratch[0, tile]
            unpacker.read(tile.start, values)
            values.sub_(_LEVELS)
            torch.abs(values, out=magnitude).sub_(_LEVELS).exp2_().mul_(column_of(scale, tile))
            values.sign_().mul_(magnitude)
