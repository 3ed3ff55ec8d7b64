"""Half precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.tiles import Scratch, rows_of, tiles
from lightning_decentral.compression.validation import require_one_of

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@final
@dataclass(frozen=True)
class Cast(AbstractCompressor):
    """Sends every value in half precision, rounded to the nearest: half the bits of float32.

    `bfloat16` has float32's range and 8 significant bits (relative error at most 2^-8). `float16` has 11 significant
    bits (2^-11), but what is larger than 65504 is sent as 65504, what is smaller than 6e-5 loses bits, and what is
    smaller than 3e-8 becomes 0: gradients of large models do.

    Cost: 16 bits per element. The messages of several workers can be added by an all-reduce, in half precision: divide
    by the number of workers before and not after, or float16 overflows.

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``.

    Raises:
        ConfigurationError: for another dtype.

    Example:
        >>> import torch
        >>> cast = Cast("bfloat16")
        >>> cast.decompress(cast.compress(torch.tensor([1.0, 1e30, 0.1]))).tolist()
        [1.0, 1.0002555517425873e+30, 0.10009765625]

    References:
        PyTorch's communication hooks of the same names, which support fewer backends; the formats are IEEE 754 binary16
        and Google's bfloat16.
    """

    dtype: Literal["float16", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        require_one_of("Cast", "dtype", self.dtype, tuple(_DTYPES))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, linear=True, divisible=True)

    def error_bound(self, numel: int) -> float:
        """Return 2^-16 for bfloat16; 1 for float16, because a vector of tiny values becomes 0.

        For bfloat16 of values that are 0 or at least 1.2e-38, float32's smallest normal number.
        """
        return 2.0**-16 if self.dtype == "bfloat16" else 1.0

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return ((_DTYPES[self.dtype], numel(shape)),)

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        half = torch.empty(x.shape, dtype=_DTYPES[self.dtype], device=x.device)
        limit = torch.finfo(half.dtype).max
        scratch = Scratch(x, torch.float32)
        for tile in tiles(x):
            rows_of(half, tile).copy_(torch.clamp(rows_of(x, tile), -limit, limit, out=scratch[0, tile]))
        return (half,)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        out.copy_(payload.tensors[0])
