"""Eight-bit floating point with a scale per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.tiles import (
    Scratch,
    column_of,
    largest_magnitudes,
    num_buckets,
    parts_of,
    reciprocal,
    rows_of,
    tiles,
)
from lightning_decentral.compression.validation import require_bucket, require_one_of

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@final
@dataclass(frozen=True)
class FP8(AbstractCompressor):
    r"""Every block is scaled so that its largest magnitude is the format's largest number, and rounded to 8-bit floats.

    Unlike `Int8`, small values keep their relative precision: 1/16 for e4m3 down to 2^-15 of the largest of the block,
    1/8 for e5m2 down to 2^-30. Rounded to the nearest, so biased.

    Cost: 8 bits per element and 32 per block. Bytes are sent, because not every backend can send 8-bit floats, and none
    should add them.

    Args:
        format: ``"e4m3"`` (4 bits of exponent, 3 of significand) or ``"e5m2"``.
        bucket: elements of a block; ``None`` for one. DeepSeek-V3 trains with 128.

    Raises:
        ConfigurationError: for another format, or a block that is no positive number.

    Example:
        >>> import torch
        >>> fp8 = FP8()
        >>> fp8.decompress(fp8.compress(torch.tensor([448.0, 1.0, 0.1]))).tolist()
        [448.0, 1.0, 0.1015625]

    References:
        Micikevicius, Stosic, Burgess, Cornea, Dubey, et al., *FP8 Formats for Deep Learning*, 2022, arXiv:2209.05433.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    bucket: int | None = 128

    def __post_init__(self) -> None:
        require_one_of("FP8", "format", self.format, tuple(_DTYPES))
        require_bucket("FP8", self.bucket)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, unit=self.bucket or 1, divisible=self.bucket is not None)

    def error_bound(self, numel: int) -> float:
        """Return (Half a unit of the significand)^2, and below the smallest normal number half of the smallest,
        squared."""
        width = numel if self.bucket is None else min(self.bucket, numel)
        limits = torch.finfo(_DTYPES[self.format])
        smallest = limits.tiny * limits.eps  # subnormal
        return (limits.eps / 2) ** 2 + width * (smallest / 2 / limits.max) ** 2

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        return ((torch.float32, num_buckets(n, self.bucket)), (torch.uint8, n))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        scale = largest_magnitudes(x, self.bucket)
        inverse = reciprocal(scale)
        limit = torch.finfo(_DTYPES[self.format]).max
        coded = torch.empty(x.shape, dtype=_DTYPES[self.format], device=x.device)
        scratch = Scratch(x, torch.float32)
        for tile in tiles(x, self.bucket):
            values = torch.mul(rows_of(x, tile), column_of(inverse, tile), out=scratch[0, tile])
            rows_of(coded, tile).copy_(values.mul_(limit).clamp_(-limit, limit))  # beyond, e4m3 has only NaN
        return scale, coded.view(torch.uint8)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        scale, coded = payload.tensors
        factor = parts_of(scale, torch.finfo(_DTYPES[self.format]).max)
        numbers = coded.view(_DTYPES[self.format])
        for tile in tiles(out, self.bucket):
            rows_of(out, tile).copy_(rows_of(numbers, tile)).mul_(column_of(factor, tile))
