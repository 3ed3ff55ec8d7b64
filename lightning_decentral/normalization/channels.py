"""Sums and maps per channel of ``[batch, channels, ...]`` tensors: what all layers here are made of.

They use the kernels of torch's batch normalization, which read each memory format and mixed precision (half inputs,
float32 sums) in one pass and are several times faster than reductions over several dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def statistics_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of running estimates for parameters of this dtype: float32 at least."""
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32


def values_per_channel(x: Tensor) -> int:
    """Tell how many values a channel has in ``[batch, channels, ...]``."""
    return x.numel() // x.shape[1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of every channel, both ``[channels]`` and in float32 at least.

    The variance is ``mean(x (x - mean))``. Its relative error is about ``(mean / std)^2`` roundings.

    Example:
        >>> moments(torch.tensor([[1.0], [3.0]]))
        (tensor([2.]), tensor([1.]))
    """
    mean = x.mean([0, *range(2, x.dim())], dtype=statistics_dtype(x.dtype))
    total, _ = correlation(x, x, mean, torch.ones_like(mean))
    return mean, total.div_(values_per_channel(x)).clamp_(min=0)


def correlation(gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum(gradient (x - mean) inverse_std)`` and ``sum(gradient)`` of every channel, both ``[channels]``."""
    weight = inverse_std  # its values do not matter, but a GPU's kernel takes the dtype of its sums from it
    _, projected, total = torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, None, None, mean, inverse_std, True, 0.0, [False, True, True]
    )
    return projected, total


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``scale x + shift`` with one scale and shift per channel, in the dtype and memory format of ``x``.

    Example:
        >>> scale_and_shift(torch.ones(1, 2), torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
        tensor([[1., 3.]])
    """
    zero = torch.zeros_like(scale)
    return F.batch_norm(x, zero, torch.ones_like(scale), scale, shift, training=False, eps=0.0)
