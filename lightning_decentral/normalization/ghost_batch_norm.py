"""Ghost Batch Normalization (Hoffer, Hubara and Soudry, 2017)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization.base import AbstractNorm
from lightning_decentral.normalization.batch_renorm import require_several_values


class GhostBatchNorm(AbstractNorm):
    """Ghost Batch Normalization: BatchNorm on parts of the batch, as if each were a batch of its own.

    Large batches regain the noise of small ones. The running moments, used in evaluation, move once for each part.

    Args:
        num_features: channels, the second dimension of an input of any number of dimensions.
        ghost_size: samples in a part, at least 1 (paper: 128); the last part of a batch may be smaller.
        eps: added to the variance.
        momentum: of the running moments, in [0, 1].
        affine: whether there are a weight and a bias per channel.
        device: of parameters and statistics.
        dtype: of parameters.

    Raises:
        ConfigurationError: a number outside of its range.
        ValueError: in ``forward``: another number of channels; a part with one value per channel while training.

    References:
        Elad Hoffer, Itay Hubara, Daniel Soudry. Train longer, generalize better: closing the generalization gap in
        large batch training of neural networks. NeurIPS 2017, arXiv:1705.08741.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [10.0], [30.0]])
        >>> GhostBatchNorm(1, ghost_size=2)(x).round(decimals=2).flatten().tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        ghost_size: int = 128,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        if ghost_size < 1 or not 0 <= momentum <= 1:
            raise ConfigurationError(
                f"GhostBatchNorm(ghost_size={ghost_size}, momentum={momentum}): needs parts of at least one sample and "
                "a momentum in [0, 1]. The paper has parts of 128."
            )
        self.ghost_size, self.momentum = ghost_size, momentum
        self.add_estimates(running_mean=0.0, running_var=1.0)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        weight, bias = self.scale_and_bias(self.running_mean)
        mean, variance = self.running_mean, self.running_var
        if not self.training:
            return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=self.eps)
        parts = []
        for part in torch.split(x, self.ghost_size):
            require_several_values(self, part)
            self.num_batches_tracked.add_(1)
            parts.append(F.batch_norm(part, mean, variance, weight, bias, True, self.momentum, self.eps))
        return torch.cat(parts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}, momentum={self.momentum}"
