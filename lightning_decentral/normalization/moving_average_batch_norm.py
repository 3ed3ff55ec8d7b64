"""Moving Average Batch Normalization (Yan et al., 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization.base import AbstractNorm, batch_norm_variance
from lightning_decentral.normalization.channels import correlation, scale_and_shift, values_per_channel


class MovingAverageBatchNorm(AbstractNorm):
    r"""MABN: normalizes by the second moment alone, averaged over the last batches in both passes.

    ``z = x / s`` with ``s^2`` the mean of ``E[x^2] + eps`` over the last ``buffer_size`` batches; ``y = z r`` with
    ``r = s / running s``, clipped to [1/5, 5], so that ``y = x / running s``; backward ``dx = (g - z mean(g z)) / s``
    with ``g = r weight dy`` and the mean over the last ``buffer_size`` batches as well. The mean of ``x`` is not
    subtracted: it is kept near zero by centring the weights of the convolution before (`center_weights`), without which
    this is another network.

    Args:
        num_features: channels, the second dimension of an input of any number of dimensions.
        buffer_size: batches to average over (paper: 16, for batches of 2).
        eps: added to the second moment.
        momentum: of the long average, in [0, 1] (paper's code: 0.02, written as 0.98).
        affine: whether there are a weight and a bias per channel.
        warmup_steps: steps that use the batch alone (paper's code: 100).
        renorm_after_steps: steps with ``r = 1`` (paper's code: 1,000).
        device: of parameters and estimates.
        dtype: of parameters.

    Raises:
        ConfigurationError: a number outside of its range.
        ValueError: in ``forward``: another number of channels.

    Cost:
        ``2 buffer_size + 1`` numbers per channel. Activation checkpointing counts each batch twice, as with BatchNorm.

    References:
        Junjie Yan, Ruosi Wan, Xiangyu Zhang, Wei Zhang, Yichen Wei, Jian Sun. Towards Stabilizing Batch Statistics in
        Backward Propagation of Batch Normalization. ICLR 2020, arXiv:2001.06838.

    Example:
        >>> MovingAverageBatchNorm(1)(torch.tensor([[3.0], [-3.0]])).round(decimals=2).flatten().tolist()
        [1.0, -1.0]
    """

    running_square: Tensor
    recent_squares: Tensor
    recent_correlations: Tensor

    def __init__(
        self,
        num_features: int,
        buffer_size: int = 16,
        eps: float = 1e-5,
        momentum: float = 0.02,
        affine: bool = True,
        warmup_steps: int = 100,
        renorm_after_steps: int = 1_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        if buffer_size < 1 or not 0 <= momentum <= 1 or min(warmup_steps, renorm_after_steps) < 0:
            raise ConfigurationError(
                f"MovingAverageBatchNorm got buffer_size={buffer_size}, momentum={momentum}, warmup_steps="
                f"{warmup_steps}, renorm_after_steps={renorm_after_steps}; needs a buffer of at least one batch, a "
                "momentum in [0, 1] and steps >= 0. The paper's code has 16, 0.02, 100 and 1000."
            )
        self.buffer_size, self.momentum = buffer_size, momentum
        self.warmup_steps, self.renorm_after_steps = warmup_steps, renorm_after_steps
        self.add_estimates(
            running_square=1.0, recent_squares=(1.0, buffer_size), recent_correlations=(0.0, buffer_size)
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        weight, bias = self.scale_and_bias(self.running_square)
        if not self.training:
            return scale_and_shift(x, weight * torch.rsqrt(self.running_square + self.eps), bias)
        normalized: Tensor = _MovingAverageNormalization.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
        return normalized

    def _track(self, recent: Tensor, value: Tensor) -> Tensor:
        """Put a batch's value in the place of the oldest one; the mean to use."""
        t = self.num_batches_tracked
        recent.index_copy_(0, (t % self.buffer_size).view(1), value[None])
        return torch.where(t <= max(self.buffer_size, self.warmup_steps), value, recent.mean(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {"recent_squares": self.recent_squares, "recent_correlations": self.recent_correlations}
        batch_norm_variance(state_dict, prefix, {"running_square": self.running_square, **own})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, buffer_size={self.buffer_size}, momentum={self.momentum}"


class _MovingAverageNormalization(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: MovingAverageBatchNorm) -> Tensor:
        t = layer.num_batches_tracked.add_(1)
        zero, one = torch.zeros_like(weight), torch.ones_like(weight)
        total, _ = correlation(x, x, zero, one)
        square = layer._track(layer.recent_squares, total / values_per_channel(x))
        inverse = torch.rsqrt(square + layer.eps)
        r = (torch.rsqrt(layer.running_square + layer.eps) / inverse).clamp(0.2, 5.0)
        r = torch.where(t <= max(layer.renorm_after_steps, layer.warmup_steps), one, r)
        layer.running_square.lerp_(square, layer.momentum)
        ctx.save_for_backward(x, weight, inverse, r)
        ctx.layer = layer
        return scale_and_shift(x, weight * inverse * r, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, r = ctx.saved_tensors
        layer: MovingAverageBatchNorm = ctx.layer
        if output_gradient.stride() != x.stride():
            output_gradient = torch.empty_like(x).copy_(output_gradient)
        projected, total = correlation(output_gradient, x, torch.zeros_like(weight), inverse)  # sum(dy z), sum(dy)
        mean = layer._track(layer.recent_correlations, weight * r * projected / values_per_channel(x))
        x_gradient = None
        if ctx.needs_input_grad[0]:
            zero = torch.zeros_like(weight)
            x_gradient = scale_and_shift(output_gradient, weight * r * inverse, zero)
            x_gradient -= scale_and_shift(x, inverse.square() * mean, zero)
        return x_gradient, r * projected, total, None


class CenteredWeight(nn.Module):
    """The parametrization ``weight - mean(weight)``, over all inputs of each output; see `center_weights`.

    Example:
        >>> CenteredWeight()(torch.tensor([[1.0, 3.0]])).tolist()
        [[-1.0, 1.0]]
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return the centred weight, ``[outputs, ...]``."""
        return weight - weight.flatten(1).mean(1).view(-1, *(1,) * (weight.dim() - 1))


def center_weights(module: nn.Module) -> nn.Module:
    """Centre the weights of all convolutions, as MABN needs it; in place, also of those that are not followed by one.

    Args:
        module: whose convolutions get the parametrization `CenteredWeight`; those that have it already are left alone.

    Returns:
        The same module. Names in its state change, as with every `torch.nn.utils.parametrize`:
        ``parametrizations.weight.original``.

    Example:
        >>> layer = center_weights(nn.Conv2d(2, 3, 1))
        >>> bool(layer.weight.sum(1).abs().max() < 1e-6)
        True
    """
    for layer in list(module.modules()):
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not parametrize.is_parametrized(layer, "weight"):
            parametrize.register_parametrization(layer, "weight", CenteredWeight())
    return module
