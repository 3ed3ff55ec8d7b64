"""Layer-wise adaptive moments for batch training (You et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers.layerwise import (
    AbstractLayerwise,
    add_scaled_,
    blocks,
    check_fraction,
    check_not_negative,
    check_positive,
    is_adapted,
    norms,
)


class LAMB(AbstractLayerwise):
    r"""Layer-wise adaptive moments: Adam's direction with a length in proportion to the layer's weights.

    For each layer (parameter tensor) ``w_k`` with gradient ``g_k``, at its step ``t``::

        m <- beta1 m + (1 - beta1) g_k;    v <- beta2 v + (1 - beta2) g_k^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w_k
        w_k <- w_k - lr min(||w_k||, max_norm) / ||r|| r

    Args:
        params: parameters or groups, as for every optimizer. A group may set each of what follows.
        lr: learning rate; the length of a layer's step as a fraction of its weights.
        betas: decay of the two moments, in [0, 1); the paper: 0.9, 0.999.
        eps: added to the denominator, > 0; the paper: 1e-6.
        weight_decay: decoupled; the paper: 0.01.
        max_norm: the largest norm of weights that counts, > 0; the paper's code: 10.
        min_dimensions: tensors with fewer dimensions (biases, normalization) have rate 1.

    Attributes:
        state: for each parameter ``exp_avg``, ``exp_avg_sq``, ``step``, and ``rate``, that of the last step. A layer
            that is all zero, or whose direction is, has rate 1.

    Raises:
        ConfigurationError: A hyper-parameter out of its range; a sparse gradient; a complex parameter.

    Cost:
        Memory: two copies of the parameters, and during the step one more: on a CPU, of the largest layer only. The
        moments go through the kernel of ``torch.optim.Adam(fused=True)``: on devices that have it.

    References:
        Yang You, Jing Li, Sashank Reddi, Jonathan Hseu, Sanjiv Kumar, Srinadh Bhojanapalli, Xiaodan Song, James Demmel,
        Kurt Keutzer, Cho-Jui Hsieh. Large Batch Optimization for Deep Learning: Training BERT in 76 minutes. ICLR 2020,
        arXiv:1904.00962.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 2.0]])
        >>> optimizer = LAMB([weight], lr=0.1, weight_decay=0.0)
        >>> _ = optimizer.step()
        >>> weight.data  # a step of 0.1 times the norm of the weights
        tensor([[3.0000, 3.5000]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_norm: float = 10.0,
        min_dimensions: int = 2,
    ) -> None:
        check_positive("LAMB", lr=lr, eps=eps, max_norm=max_norm)
        check_fraction("LAMB", beta1=betas[0], beta2=betas[1])
        check_not_negative("LAMB", weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
            "min_dimensions": min_dimensions,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        shapes = [tuple(each.shape) for each in self.param_groups[-1]["params"] if each.is_complex()]
        if shapes:
            raise ConfigurationError(
                f"LAMB got a complex parameter of shape {shapes[0]}, needs real ones. Give complex parameters to an "
                "optimizer of their own, such as torch.optim.Adam."
            )

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}  # one kernel each
        for parameter in parameters:
            alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        for tensors in alike.values():
            for block in blocks(tensors):
                self._update_block(group, block)

    def _update_block(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
        states = [self.state[parameter] for parameter in parameters]
        directions = list(torch._foreach_mul(parameters, group["weight_decay"]))
        # The kernel below goes through memory, whatever the strides. A gradient that was assigned, or a moment that was
        # loaded into a model with channels last, may have others than its parameter.
        gradients = [_laid_out(gradient, like) for gradient, like in zip(gradients, directions, strict=True)]
        for state, like in zip(states, directions, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _laid_out(state[name], like)
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        counts = {state["step"] for state in states}
        steps = {count: torch.tensor(float(count), device=parameters[0].device) for count in counts}
        # One pass over both moments, by the kernel of torch.optim.Adam(fused=True): a step of length -1 from there.
        torch._fused_adam_(
            directions,
            gradients,
            first,
            second,
            [],
            [steps[state["step"]] for state in states],
            lr=-1.0,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        weight_norms, lengths = norms(parameters), norms(directions)
        adapted = is_adapted(parameters, group["min_dimensions"], lengths) & (weight_norms != 0) & (lengths != 0)
        rates = torch.where(adapted, weight_norms.clamp_max(group["max_norm"]) / lengths, 1.0)
        for state, rate in zip(states, rates.unbind(), strict=True):
            state["rate"] = rate
        add_scaled_(parameters, directions, rates, alpha=-group["lr"])


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the tensor with the strides of another of its shape; itself where it has them."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)
