"""Whether values are finite, and whose are not. Of a tensor without values (of torch's `meta` device) all are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_decentral.compression import ErrorFeedback


def is_finite(x: Tensor) -> bool:
    """Say whether all values are finite.

    The sum tells, in one pass; large values whose sum overflows are looked at one by one.
    """
    if not x.numel() or x.is_meta:
        return True
    wide = ErrorFeedback.dtype_of(x.dtype)
    return bool(x.sum(dtype=wide).isfinite()) or bool(x.isfinite().all())


def is_set(flags: Tensor) -> bool:
    """Say whether one of the flags is not zero."""
    return not flags.is_meta and bool(flags.any())


def not_finite(names: Sequence[str], sizes: Sequence[int], x: Tensor) -> list[str]:
    """Name the parameters whose gradient is not finite, or too large for float32 where it is computed in that.

    Args:
        names: of the parameters in a vector.
        sizes: how many elements each has.
        x: the vector.
    """
    wide = x.float() if x.is_floating_point() else x
    pieces = zip(names, torch.split(wide, list(sizes)), strict=True)
    return [name for name, piece in pieces if not bool(piece.isfinite().all())]


def refused(names: Sequence[str], sizes: Sequence[int], x: Tensor) -> list[str]:
    """Name the parameters because of which a compressor refused a vector; arguments as for `not_finite`."""
    found = not_finite(names, sizes, x)
    if found:
        return found
    pieces = zip(names, torch.split(x, list(sizes)), strict=True)
    largest = {name: float(piece.abs().max()) for name, piece in pieces if piece.numel()}
    name = max(largest, key=largest.__getitem__)
    return [f"{name} (finite, but up to {largest[name]:.3g}, too large to be compressed)"]
