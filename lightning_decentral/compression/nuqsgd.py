"""NUQSGD: levels that halve towards zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.packing import Packer, Unpacker, packed_bytes
from lightning_decentral.compression.tiles import (
    Scratch,
    chunk_of,
    column_of,
    norms,
    num_buckets,
    reciprocal,
    rows_of,
    tiles,
)
from lightning_decentral.compression.validation import require_at_least, require_bucket


@final
@dataclass(frozen=True)
class NUQSGD(AbstractCompressor):
    r"""QSGD with the levels `0, 2^-s, ..., 1/4, 1/2, 1` of the bucket's norm, on both sides of zero.

    Values are rounded at random to one of the two levels around them, so that the mean is right. Most values of a long
    vector are far smaller than its norm; evenly spaced levels leave them nothing but 0 and the first one.

    Cost: `8 / floor(log_(2 s + 3) 256)` bits per element (4 for s = 6) and 32 per bucket.

    Args:
        levels: `s`, how many levels there are between 0 and 1, at most 100. 6 fill 4 bits; the paper has 3 to 8 bits.
        bucket: elements that share a norm; ``None`` for all. The paper has 8192 with ResNets on CIFAR-10 and 4 bits.

    Raises:
        ConfigurationError: for a number out of range.

    Example:
        >>> import torch
        >>> nuqsgd = NUQSGD()
        >>> payload = nuqsgd.compress(torch.tensor([4.0, 0.0, -3.0]), torch.Generator().manual_seed(0))
        >>> nuqsgd.decompress(payload)[1].item()
        0.0

    References:
        Ramezani-Kebrya, Faghri, Markov, Aksenov, Alistarh, Roy, *NUQSGD: Provably Communication-efficient Data-parallel
        SGD via Nonuniform Quantization*, JMLR 2021, arXiv:2104.13818.
    """

    levels: int = 6
    bucket: int | None = 8192

    def __post_init__(self) -> None:
        require_at_least("NUQSGD", "levels", self.levels, 1, 100)
        require_bucket("NUQSGD", self.bucket)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, randomness="own", unit=self.bucket or 1)

    def error_bound(self, numel: int) -> float:
        """Return `1/8 + min(sqrt(d) 2^-s, d 4^-s / 4)` for buckets of d elements: above and below the smallest
        level."""
        width = numel if self.bucket is None else min(self.bucket, numel)
        return 0.125 + min(sqrt(width) * 2.0**-self.levels, width * 4.0**-self.levels / 4)

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        packed = packed_bytes(n, 2 * self.levels + 3)
        return ((torch.float32, num_buckets(n, self.bucket)), (torch.uint8, packed))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        top = 2.0**self.levels
        scale = norms(x, self.bucket)
        inverse = reciprocal(scale)
        packer = Packer(x.numel(), 2 * self.levels + 3, x.device)
        scratch = Scratch(x, torch.float32, torch.float32, torch.int32, torch.int32, torch.uint8)
        for tile in tiles(x, self.bucket):
            ratio, small, bits, noise, codes = (scratch[i, tile] for i in range(5))
            torch.abs(rows_of(x, tile), out=ratio).mul_(column_of(inverse, tile)).mul_(top).clamp_(max=top)
            noise.random_(0, 1 << 23, generator=generator)  # one number for both, as each value needs only one of them
            # From 1 on, the exponent with a random carry (see NaturalCompression); 127 stands for 1.
            bits.copy_(torch.clamp(ratio, min=1.0, out=small).view(torch.int32)).add_(noise).bitwise_right_shift_(23)
            # Below 1, zero or one; this is 1 for what is larger.
            small.copy_(noise).mul_(2.0**-23).add_(ratio.clamp_(max=1.0)).floor_()
            small.add_(bits.sub_(127)).copysign_(rows_of(x, tile)).add_(self.levels + 1)
            packer.write(tile.start, codes.copy_(bits.copy_(small)))
        return scale, packer.packed

    def _decode(self, payload: Payload, out: Tensor) -> None:
        scale, packed = payload.tensors
        unpacker = Unpacker(packed, 2 * self.levels + 3, chunk_of(out))
        scratch = Scratch(out, torch.float32)
        for tile in tiles(out, self.bucket):
            values, magnitude = rows_of(out, tile), scratch[0, tile]
            unpacker.read(tile.start, values)
            values.sub_(self.levels + 1)
            torch.abs(values, out=magnitude).sub_(self.levels + 1).exp2_().mul_(column_of(scale, tile))
            values.sign_().mul_(magnitude)
