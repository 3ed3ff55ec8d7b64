"""Natural compression: signs and exponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.binary import pack_signs
from lightning_decentral.compression.packing import Unpacker, packed_bytes
from lightning_decentral.compression.tiles import Scratch, chunk_of, rows_of, tiles


@final
@dataclass(frozen=True)
class NaturalCompression(AbstractCompressor):
    r"""Every value is rounded at random to one of the two powers of two around it; what is sent is float32 without
    its significand.

    C(x)_i = sign(x_i) 2^e  or  sign(x_i) 2^(e + 1),   e = floor(log2 |x_i|)

    up with the probability `|x_i| / 2^e - 1`, so that the mean is `x_i`. Unbiased, with an error of at most an eighth
    of `||x||^2` and usually about 0.08, for vectors of any size and distribution: there is no scale and no bucket.
    Adding a random significand to the value's own and cutting it off is all there is to compute.

    Cost: 9 bits per element.

    Example:
        >>> import torch
        >>> natural = NaturalCompression()
        >>> payload = natural.compress(torch.tensor([0.25, -8.0, 0.0]), torch.Generator().manual_seed(0))
        >>> natural.decompress(payload).tolist()
        [0.25, -8.0, 0.0]

    References:
        Horvath, Ho, Horvath, Sahu, Canini, Richtarik, *Natural Compression for Distributed Deep Learning*, 2019 (MSML
        2022), arXiv:1905.10988.
    """

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, randomness="own")

    def error_bound(self, numel: int) -> float:
        """Return 1/8, the worst case: all values half-way between two powers of two in the sense of `x = 4/3 2^e`.

        For values that are 0 or at least 1.2e-38, float32's smallest normal number, and below 1.7e38.
        """
        return 0.125

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        return ((torch.uint8, n), (torch.uint8, packed_bytes(n, 2)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        exponents = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        scratch = Scratch(x, torch.int32, torch.int32)
        for tile in tiles(x):
            bits, noise = scratch[0, tile], scratch[1, tile]
            torch.bitwise_and(rows_of(x, tile).view(torch.int32), 0x7FFFFFFF, out=bits)
            # The carry into the exponent has the probability significand / 2^23, for subnormal numbers too.
            bits.add_(noise.random_(0, 1 << 23, generator=generator)).bitwise_right_shift_(23)
            rows_of(exponents, tile).copy_(bits.clamp_(max=254))  # 255 would be infinity
        return exponents, pack_signs(x)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        exponents, signs = payload.tensors
        unpacker = Unpacker(signs, 2, chunk_of(out))
        scratch = Scratch(out, torch.float32)
        for tile in tiles(out):
            positive, bits = scratch[0, tile], rows_of(out, tile).view(torch.int32)
            bits.copy_(rows_of(exponents, tile)).bitwise_left_shift_(23)
            unpacker.read(tile.start, positive)
            rows_of(out, tile).copysign_(positive.sub_(0.5))
