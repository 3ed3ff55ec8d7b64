"""Layer-wise adaptive rate scaling (You, Gitman, Ginsburg, 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.optimizers.layerwise import (
    AbstractLayerwise,
    add_scaled_,
    check_fraction,
    check_not_negative,
    check_positive,
    is_adapted,
    momentum_buffers,
    norms,
)


class LARS(AbstractLayerwise):
    r"""Layer-wise adaptive rate scaling; the baseline of `CLARS`.

    For each layer (parameter tensor) ``w_k`` with gradient ``g_k``::

        rate_k = trust ||w_k|| / (||g_k|| + weight_decay ||w_k||)
        buffer_k <- momentum buffer_k + rate_k (g_k + weight_decay w_k)
        w_k <- w_k - lr buffer_k

    Args:
        params: parameters or groups, as for every optimizer. A group may set each of what follows.
        lr: common learning rate, on top of the layer's own; needs a warm-up (`GradualWarmup`).
        momentum: in [0, 1); the paper: 0.9.
        weight_decay: L2 penalty; the paper: 5e-4.
        trust: the factor of the layer's rate, > 0; the paper: 1e-3.
        min_dimensions: tensors with fewer dimensions (biases, normalization) have rate 1.

    Attributes:
        state: for each parameter ``momentum_buffer``, and ``rate``, that of the last step. A layer that is all zero has
            rate 1: by the formula it would stay zero for ever.

    Raises:
        ConfigurationError: A hyper-parameter out of its range; a sparse gradient.

    Cost:
        Memory: one copy of the parameters. A step reads weights and gradients once more than momentum SGD.

    Not to be confused with:
        LARC, which clips the rate at 1; variants that leave the weight decay out of the rate; those with the rate
        outside of the momentum buffer.

    References:
        Yang You, Igor Gitman, Boris Ginsburg. Large Batch Training of Convolutional Networks. 2017, arXiv:1708.03888.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 2.0]])
        >>> optimizer = LARS([weight], lr=1.0, trust=0.1)
        >>> _ = optimizer.step()
        >>> weight.data  # a step of 0.1 times the norm of the weights
        tensor([[3.0000, 3.5000]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        min_dimensions: int = 2,
    ) -> None:
        check_positive("LARS", lr=lr, trust=trust)
        check_fraction("LARS", momentum=momentum)
        check_not_negative("LARS", weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "min_dimensions": min_dimensions,
        }
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        weight_norms = norms(parameters)
        denominators = norms(gradients) + group["weight_decay"] * weight_norms
        rates = group["trust"] * weight_norms / denominators
        adapted = is_adapted(parameters, group["min_dimensions"], rates) & (weight_norms != 0) & (denominators != 0)
        rates = torch.where(adapted, rates, 1.0)
        buffers = momentum_buffers(self.state, parameters, rates)
        torch._foreach_mul_(buffers, group["momentum"])
        add_scaled_(buffers, gradients, rates, alpha=1.0)
        if group["weight_decay"]:
            add_scaled_(buffers, parameters, rates, alpha=group["weight_decay"])
        torch._foreach_add_(parameters, buffers, alpha=-group["lr"])
