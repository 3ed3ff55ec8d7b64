"""TernGrad: minus one, zero or one, times the largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import Traits
from lightning_decentral.compression.grid import AbstractGrid
from lightning_decentral.compression.tiles import (
    column_of,
    largest_magnitudes,
    per_bucket,
    rows_of,
    sizes_of_buckets,
    tiles,
    wide_norms,
)
from lightning_decentral.compression.validation import require_bucket, require_positive


@final
@dataclass(frozen=True)
class TernGrad(AbstractGrid):
    r"""Every value becomes 0 or plus or minus the scale, with its magnitude over the scale as the probability.

    C(x)_i = m sign(x_i) b_i,   P(b_i = 1) = min(1, |x_i| / m),   m = min(max |x|, clip sigma)

    `sigma` is the standard deviation. Without clipping it is unbiased, with an error of exactly
    `(m ||x||_1 / ||x||^2 - 1) ||x||^2`: large, as one outlier sets `m` for all. Clipping makes it much smaller, and the
    mean wrong for what is clipped (1.2 % of Gaussian values at 2.5).

    Cost: 1.6 bits per element (five to a byte) and 32 per bucket.

    Args:
        clip: in standard deviations; the paper has 2.5. ``None`` for none: unbiased.
        bucket: elements that share a scale; ``None``, the paper's, for the whole tensor (a layer's, there).

    Raises:
        ConfigurationError: for a number that is not positive.

    Example:
        >>> import torch
        >>> terngrad = TernGrad(clip=None)
        >>> payload = terngrad.compress(torch.tensor([2.0, -2.0, 0.0]), torch.Generator().manual_seed(0))
        >>> terngrad.decompress(payload).tolist()
        [2.0, -2.0, 0.0]

    References:
        Wen, Xu, Yan, Wu, Wang, Chen, Li, *TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
        Learning*, NeurIPS 2017, arXiv:1705.07878.
    """

    clip: float | None = 2.5
    bucket: int | None = None

    def __post_init__(self) -> None:
        if self.clip is not None:
            require_positive("TernGrad", "clip", self.clip)
        require_bucket("TernGrad", self.bucket)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.clip is None, randomness="own", unit=self.bucket or 1)

    def error_bound(self, numel: int) -> float:
        """Return `(sqrt(d) - 1) / 2` for buckets of d elements; with clipping at least 1, for what is cut off."""
        width = numel if self.bucket is None else min(self.bucket, numel)
        rounding = max(0.0, (sqrt(width) - 1) / 2)
        return rounding if self.clip is None else max(1.0, rounding)

    @property
    def grid(self) -> tuple[int, int | None]:
        return 1, self.bucket

    def scales(self, x: Tensor) -> Tensor:
        scale = largest_magnitudes(x, self.bucket)
        if self.clip is not None:
            # All equal: sigma is 0, and nothing is an outlier.
            limit = self.clip * _deviations(x, self.bucket)
            scale = torch.where(limit > 0, torch.minimum(scale, limit), scale)
        return scale


def _deviations(x: Tensor, bucket: int | None) -> Tensor:
    """Return the standard deviation of every bucket."""
    totals = per_bucket(x, bucket).double()
    for tile in tiles(x, bucket):
        column_of(totals, tile).add_(rows_of(x, tile).sum(1, keepdim=True))
    sizes = sizes_of_buckets(x.numel(), bucket, x.device)
    wide = wide_norms(x, bucket)
    narrow = wide.float()
    squares = torch.where(narrow.isinf(), wide, narrow.double()).square_() / sizes
    return squares.sub_((totals / sizes).square_()).clamp_(0.0, inf).sqrt_().float()
