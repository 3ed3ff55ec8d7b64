"""Batch Renormalization (Ioffe, 2017)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization.base import AbstractNorm
from lightning_decentral.normalization.channels import moments, values_per_channel


class BatchRenorm(AbstractNorm):
    r"""Batch Renormalization: the forward pass by running moments, the backward pass through the batch's own.

    ``y = (x - mean_B) / std_B r + d`` with ``r = clip(std_B / std, 1/r_max, r_max)`` and ``d = clip((mean_B - mean) /
    std, -d_max, d_max)``, which no gradient passes. Unclipped, ``y = (x - mean) / std``. Both limits rise linearly from
    BatchNorm (1 and 0) over the first steps. Then the running moments move towards the batch's.

    Args:
        num_features: channels, the second dimension of an input of any number of dimensions.
        eps: added to the variance.
        momentum: of the running moments, in [0, 1] (paper: 0.01).
        affine: whether there are a weight and a bias per channel.
        r_max: at least 1 (paper: 3).
        d_max: at least 0 (paper: 5).
        start_steps: steps as BatchNorm, before the limits begin to rise (paper: 5,000).
        warmup_steps: steps after which the limits are reached (paper: ``r_max`` at 40,000, ``d_max`` at 25,000).
        device: of parameters and statistics.
        dtype: of parameters.

    Raises:
        ConfigurationError: a number outside of its range.
        ValueError: in ``forward``: another number of channels; one value per channel while training.

    Differences with the paper:
        Variances are averaged, not standard deviations, so that a BatchNorm's weights load; both limits are reached
        at the same step.

    References:
        Sergey Ioffe. Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models. NeurIPS
        2017, arXiv:1702.03275.

    Example:
        >>> BatchRenorm(2)(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).round(decimals=2).tolist()
        [[-1.0, 0.0], [1.0, 0.0]]
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start_steps: int = 5_000,
        warmup_steps: int = 40_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        if not (0 <= momentum <= 1 and r_max >= 1 and d_max >= 0 and 0 <= start_steps <= warmup_steps):
            raise ConfigurationError(
                f"BatchRenorm got momentum={momentum}, r_max={r_max}, d_max={d_max}, start_steps={start_steps}, "
                f"warmup_steps={warmup_steps}; needs a momentum in [0, 1], r_max >= 1, d_max >= 0 and 0 <= start_steps "
                "<= warmup_steps. The paper has 0.01, 3, 5, 5000 and 40000."
            )
        self.momentum, self.r_max, self.d_max = momentum, r_max, d_max
        self.start_steps, self.warmup_steps = start_steps, warmup_steps
        self.add_estimates(running_mean=0.0, running_var=1.0)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        weight, bias = self.scale_and_bias(self.running_mean)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, training=False, eps=self.eps)
        require_several_values(self, x)
        with torch.no_grad():
            t = self.num_batches_tracked.add_(1).to(self.running_mean.dtype)
            risen = ((t - self.start_steps) / max(1, self.warmup_steps - self.start_steps)).clamp(0.0, 1.0)
            r_max, d_max = 1 + risen * (self.r_max - 1), risen * self.d_max
            mean, variance = moments(x.detach())
            std = torch.sqrt(self.running_var + self.eps)
            r = torch.sqrt(variance + self.eps).div_(std).clamp_(1 / r_max, r_max)
            d = ((mean - self.running_mean) / std).clamp_(-d_max, d_max)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
        return F.batch_norm(x, None, None, weight * r, bias + weight * d, training=True, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, r_max={self.r_max}, d_max={self.d_max}"


def require_several_values(layer: AbstractNorm, x: Tensor) -> None:
    """Refuse to normalize by the moments of one value.

    Raises:
        ValueError: the input has one value per channel.
    """
    if values_per_channel(x) == 1:
        name = type(layer).__name__
        raise ValueError(
            f"{name} got an input of shape {tuple(x.shape)}, one value per channel, and needs two or more to train on. "
            "Use larger batches, or FullNorm, which can do with one."
        )
