"""QSGD: evenly spaced levels between zero and a bucket's norm."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal, final

from torch import Tensor

from lightning_decentral.compression.base import Traits
from lightning_decentral.compression.grid import AbstractGrid
from lightning_decentral.compression.packing import digits_per_byte
from lightning_decentral.compression.tiles import largest_magnitudes, norms
from lightning_decentral.compression.validation import require_at_least, require_bucket, require_one_of


@final
@dataclass(frozen=True)
class QSGD(AbstractGrid):
    r"""Every value is rounded at random to one of `2 s + 1` levels, multiples of the bucket's norm divided by `s`.

    C(x)_i = (||x|| / s) sign(x_i) (floor(r) or floor(r) + 1),   r = s |x_i| / ||x||

    up with the probability `r - floor(r)`, so that the mean is `x_i`. Unbiased.

    Cost: `8 / floor(log_(2 s + 1) 256)` bits per element (4 for s = 7, 8 for s = 127) and 32 per bucket. The paper's
    entropy code, smaller where nearly all levels are 0, is not here: its size is not known before.

    Args:
        levels: `s`, 1 to 127. 7 fill the 4 bits of the paper's main experiments.
        bucket: elements that share a norm; ``None`` for all. The paper has 512 with 4 bits.
        norm: ``"l2"``, the paper's theory, or ``"max"``, which wastes no level and is better for small `s`.

    Raises:
        ConfigurationError: for a number out of range.

    Example:
        >>> import torch
        >>> qsgd = QSGD(levels=1, bucket=None)
        >>> payload = qsgd.compress(torch.tensor([3.0, -4.0, 0.0]), torch.Generator().manual_seed(0))
        >>> sorted(set(qsgd.decompress(payload).abs().tolist()) | {0.0, 5.0})
        [0.0, 5.0]

    References:
        Alistarh, Grubic, Li, Tomioka, Vojnovic, *QSGD: Communication-Efficient SGD via Gradient Quantization and
        Encoding*, NeurIPS 2017, arXiv:1610.02132.
    """

    levels: int = 7
    bucket: int | None = 512
    norm: Literal["l2", "max"] = "l2"

    def __post_init__(self) -> None:
        require_at_least("QSGD", "levels", self.levels, 1, 127)
        require_bucket("QSGD", self.bucket)
        require_one_of("QSGD", "norm", self.norm, ("l2", "max"))

    @property
    def traits(self) -> Traits:
        one_to_a_byte = digits_per_byte(2 * self.levels + 1) == 1
        divisible = self.bucket is not None and one_to_a_byte
        return Traits(unbiased=True, randomness="own", unit=self.bucket or 1, divisible=divisible)

    def error_bound(self, numel: int) -> float:
        """Return `min(d / (4 s^2), sqrt(d) / s)` for buckets of d elements; the paper has `d / s^2` for the first."""
        width = numel if self.bucket is None else min(self.bucket, numel)
        return min(width / (4 * self.levels**2), sqrt(width) / self.levels)

    @property
    def grid(self) -> tuple[int, int | None]:
        return self.levels, self.bucket

    def scales(self, x: Tensor) -> Tensor:
        return norms(x, self.bucket) if self.norm == "l2" else largest_magnitudes(x, self.bucket)
