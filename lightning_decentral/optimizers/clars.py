"""Complete layer-wise adaptive rate scaling (Huo, Gu, Huang, 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers.layerwise import (
    Closure,
    add_scaled_,
    check_fraction,
    check_not_negative,
    check_positive,
    evaluated,
    is_adapted,
    momentum_buffers,
    norms,
    parameters_with_gradients,
)


class CLARS(Optimizer):
    r"""Complete layer-wise adaptive rate scaling: large batches without a warm-up.

    For each layer (parameter tensor) ``w_k`` with the gradient ``g_k``, the mean of the gradients ``g_k,i`` of the
    micro-batches::

        rate_k = min(max_rate, trust ||w_k|| / (mean_i ||g_k,i|| + weight_decay ||w_k||))
        buffer_k <- momentum buffer_k + g_k + weight_decay w_k
        w_k <- w_k - lr rate_k buffer_k

    LARS divides by the norm of the mean, ``||g_k||``; this divides by the mean of the norms. The two agree where all
    micro-batches agree. Where their gradients cancel, which is when LARS takes its largest steps, this one does not.

    **It has to see the micro-batches.** A micro-batch is what one worker sends through one backward pass: the parts of
    an accumulation, the workers of DDP, or both. In Lightning, one line: ``Trainer(callbacks=[MicroBatchNorms()])``.
    Elsewhere call `observe` once. It costs one read of each gradient during the backward pass and, with several
    workers, one all-reduce of as many numbers as the model has layers.

    Args:
        params: parameters or groups, as for every optimizer. A group may set each of what follows.
        lr: common learning rate, on top of the layer's own. The paper: ``0.128 batch / 256`` on ImageNet, without
            warm-up, with polynomial decay of power 2 (`GradualWarmup`).
        momentum: in [0, 1); the paper: 0.9.
        weight_decay: L2 penalty; the paper: 2e-4.
        trust: the factor of the layer's rate, > 0; the authors' code: 1e-2, ten times that of their LARS.
        max_rate: the largest rate, > 0; the authors' code: 0.1. Also the rate of a layer that is all zero, or whose
            gradients are: the limit of the formula, and finite.
        rate_in_buffer: whether the buffer collects gradients that have their rate already, as in `LARS`. As published
            the rate multiplies the whole buffer: where gradients shrink fast, at the beginning of a short training, the
            old and large ones in the buffer then get the new and large rate.
        min_dimensions: tensors with fewer dimensions (biases, normalization) have rate 1, as in the authors' code.

    Attributes:
        state: for each parameter ``momentum_buffer``, and ``rate``, that of the last step.

    Raises:
        ConfigurationError: A hyper-parameter out of its range; a sparse gradient; a step without norms of its
            micro-batches.

    Cost:
        Memory: one copy of the parameters. A step reads the weights once more than momentum SGD.

    Not to be confused with:
        Clipping. And the rate is *outside* of the momentum buffer unless ``rate_in_buffer``, in `LARS` it is inside. A
        NaN gradient makes its layer NaN, as under ``torch.optim.SGD``, and no other.

    References:
        Zhouyuan Huo, Bin Gu, Heng Huang. Large Batch Optimization for Deep Learning Using New Complete Layer-Wise
        Adaptive Rate Scaling. AAAI 2021, doi:10.1609/aaai.v35i9.16962, arXiv:2002.01576.

    Example:
        Two micro-batches whose gradients cancel: LARS would take a step of the same length as ever.

        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = CLARS([weight], lr=1.0, momentum=0.0)
        >>> optimizer.observe()
        >>> for direction in (1.0, -0.9):
        ...     (weight * direction / 2).sum().backward()
        >>> _ = optimizer.step()
        >>> round(optimizer.state[weight]["rate"].item(), 4)  # 0.01 * 5 / mean of sqrt(2) and 0.9 sqrt(2)
        0.0372
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-2,
        max_rate: float = 0.1,
        rate_in_buffer: bool = False,
        min_dimensions: int = 2,
    ) -> None:
        check_positive("CLARS", lr=lr, trust=trust, max_rate=max_rate)
        check_fraction("CLARS", momentum=momentum)
        check_not_negative("CLARS", weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "max_rate": max_rate,
            "rate_in_buffer": rate_in_buffer,
            "min_dimensions": min_dimensions,
        }
        super().__init__(params, defaults)
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch pickles and copies the groups and the state only; hooks belong to the parameters of one process.
        super().__setstate__(state)
        self.__dict__.setdefault("_handles", {})
        self.__dict__.setdefault("_sums", {})
        self.__dict__.setdefault("_mean_over_workers", None)

    def observe(self, mean_over_workers: Callable[[Tensor], Tensor] | None = None) -> None:
        """Begin to measure the gradient of every backward pass, before it is accumulated or averaged.

        Call it once, before the first backward pass; again, where parameters were added or unfrozen. In Lightning the
        callback `MicroBatchNorms` does it.

        Args:
            mean_over_workers: takes a vector with one number for each trained layer (float32, or wider if the
                parameters are) and returns its mean over all workers whose gradients are averaged; called once in a
                step, by all of them. Needed with several workers: without it they would take different steps. With a
                ``GradScaler``, divide by its scale here as well.
        """
        for handle in self._handles.values():
            handle.remove()
        self._sums: dict[Tensor, Tensor] = {}
        self._mean_over_workers = mean_over_workers
        self._handles: dict[Tensor, RemovableHandle] = {
            parameter: parameter.register_hook(self._hook(parameter))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        }

    def _hook(self, parameter: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            # Called once in a backward pass, with what it adds to .grad. Norms are added up and not averaged: so they
            # are in the units of .grad whether or not the loss was divided by the number of micro-batches.
            gradient = gradient.detach()
            if gradient.is_sparse:
                return  # refused in step, with a message
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            norm = torch.linalg.vector_norm(gradient, dtype=dtype)
            self._sums[parameter] = self._sums[parameter] + norm if parameter in self._sums else norm

        return add

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them what was measured of their micro-batches."""
        self._sums.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            The loss of the closure, or ``None``.

        Raises:
            ConfigurationError: A sparse gradient, or one whose micro-batches were not seen.
        """
        loss = evaluated(closure)
        trained = [parameters_with_gradients(group, "CLARS") for group in self.param_groups]
        batch_norms = self._batch_norms([parameter for parameters in trained for parameter in parameters])
        for group, parameters in zip(self.param_groups, trained, strict=True):
            if parameters:
                self._update(group, parameters, torch.stack([batch_norms[parameter] for parameter in parameters]))
        self._sums.clear()
        return loss

    def _batch_norms(self, trained: list[Tensor]) -> dict[Tensor, Tensor]:
        """Give for every observed layer the mean over workers of the sum over micro-batches of the gradient's norm."""
        for parameter in trained:
            if parameter not in self._handles or not self._sums:
                raise ConfigurationError(
                    f"CLARS.step got a gradient of a tensor of shape {tuple(parameter.shape)}, but did not see the "
                    "backward passes that made it; it needs the norm of every micro-batch's gradient. In Lightning add "
                    "lightning_decentral.callbacks.MicroBatchNorms() to the Trainer's callbacks; elsewhere call "
                    "optimizer.observe() before the first backward pass, and again when parameters are unfrozen."
                )
        if not self._handles:
            return {}
        # All that are observed, also those without a gradient here: the vector must be as long on every worker.
        observed = list(self._handles)
        zero = torch.zeros((), dtype=torch.promote_types(observed[0].dtype, torch.float32), device=observed[0].device)
        vector = torch.stack([self._sums.get(p, zero).to(zero) for p in observed])  # [layers]
        if self._mean_over_workers is not None:
            vector = self._mean_over_workers(vector)
        return dict(zip(observed, vector.unbind(), strict=True))

    def _update(self, group: dict[str, Any], parameters: list[Tensor], batch_norms: Tensor) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        weight_norms = norms(parameters)
        denominators = batch_norms.to(weight_norms) + group["weight_decay"] * weight_norms
        rates = group["trust"] * weight_norms / denominators
        rates = torch.where((weight_norms == 0) | (denominators == 0), torch.inf, rates).clamp_max(group["max_rate"])
        rates = torch.where(is_adapted(parameters, group["min_dimensions"], rates), rates, 1.0)
        buffers = momentum_buffers(self.state, parameters, rates)
        torch._foreach_mul_(buffers, group["momentum"])
        if group["rate_in_buffer"]:
            add_scaled_(buffers, gradients, rates, alpha=1.0)
            if group["weight_decay"]:
                add_scaled_(buffers, parameters, rates, alpha=group["weight_decay"])
            torch._foreach_add_(parameters, buffers, alpha=-group["lr"])
            return
        torch._foreach_add_(buffers, gradients)
        if group["weight_decay"]:
            torch._foreach_add_(buffers, parameters, alpha=group["weight_decay"])
        add_scaled_(parameters, buffers, rates, alpha=-group["lr"])
