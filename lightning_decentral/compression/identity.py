"""No compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel


@final
@dataclass(frozen=True)
class Identity(AbstractCompressor):
    """Sends the vector as it is: the baseline, and the case in which every compressed method must equal the plain one.

    Cost: all bits of the vector; one copy of it.

    Example:
        >>> import torch
        >>> payload = Identity().compress(torch.tensor([1.0, 2.0]))
        >>> payload.num_bits, Identity().decompress(payload).tolist()
        (64, [1.0, 2.0])
    """

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=True, linear=True, keeps_dtype=True, divisible=True)

    def error_bound(self, numel: int) -> float:
        return 0.0

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return ((dtype, numel(shape)),)

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        return (x.clone(),)  # the vector may change before the message is sent

    def _decode(self, payload: Payload, out: Tensor) -> None:
        out.copy_(payload.tensors[0])
