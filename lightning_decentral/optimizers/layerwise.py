"""What the layer-wise optimizers share. A *layer* is one parameter tensor, as in the papers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_decentral.errors import ConfigurationError

Closure = Callable[[], float]
"""Clears the gradients, computes the loss, calls ``backward`` and returns the loss: what ``torch`` calls a closure."""


_BLOCK_NUMBERS = 2**18  # a megabyte of float32


class AbstractLayerwise(Optimizer, ABC):
    """An optimizer whose step of a layer needs the layer's weights, gradient and state, and nothing else."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            The loss of the closure, or ``None``.

        Raises:
            ConfigurationError: A sparse gradient.
        """
        loss = evaluated(closure)
        for group in self.param_groups:
            parameters = parameters_with_gradients(group, type(self).__name__)
            if parameters:
                self._update(group, parameters)
        return loss

    @abstractmethod
    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Make the step of some layers of a group, all with a gradient; at least one."""


def parameters_with_gradients(group: dict[str, Any], optimizer: str) -> list[Tensor]:
    """Return the tensors of a parameter group that have a gradient.

    Args:
        group: one of ``optimizer.param_groups``.
        optimizer: the name of the optimizer, for the error.

    Raises:
        ConfigurationError: A gradient is sparse.
    """
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in parameters:
        if parameter.grad.is_sparse:
            raise ConfigurationError(
                f"{optimizer} got a sparse gradient of a tensor of shape {tuple(parameter.shape)}, it needs dense "
                "ones: the norm of a layer has no meaning on the rows of one batch. Use nn.Embedding(sparse=False)."
            )
    return parameters


def blocks(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Put layers of a quarter of a million numbers together on a CPU; elsewhere all.

    Several passes over a block find it in the cache, and temporaries of its size are at hand.
    """
    if not parameters or parameters[0].device.type != "cpu":
        return [parameters] if parameters else []
    found: list[list[Tensor]] = [[]]
    numbers = 0
    for parameter in parameters:
        if found[-1] and numbers + parameter.numel() > _BLOCK_NUMBERS:
            found.append([])
            numbers = 0
        found[-1].append(parameter)
        numbers += parameter.numel()
    return found


def evaluated(closure: Closure | None) -> float | None:
    """Return the loss of a closure, which computes gradients; none without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def momentum_buffers(state: dict[Tensor, dict[str, Any]], parameters: list[Tensor], rates: Tensor) -> list[Tensor]:
    """Return the ``momentum_buffer`` of each layer, zeros at first; notes its ``rate`` beside it.

    Args:
        state: of the optimizer.
        parameters: the layers.
        rates: ``[len(parameters)]``.
    """
    buffers = []
    for parameter, rate in zip(parameters, rates.unbind(), strict=True):
        own = state[parameter]
        if "momentum_buffer" not in own:
            own["momentum_buffer"] = torch.zeros_like(parameter)
        buffers.append(own["momentum_buffer"])
        own["rate"] = rate
    return buffers


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, ``[len(tensors)]``, in float32 or better; nothing waits for a device."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    device = tensors[0].device
    return torch.stack([norm.to(device) for norm in torch._foreach_norm(tensors, 2, dtype=dtype)])


def add_scaled_(tensors: list[Tensor], directions: list[Tensor], factors: Tensor, alpha: float) -> None:
    """Do ``tensors[k] += alpha * factors[k] * directions[k]``, one pass each; nothing waits for a device.

    Args:
        tensors: changed in place.
        directions: of the same shapes.
        factors: ``[len(tensors)]``, on the device of the tensors.
        alpha: common factor.
    """
    scalars = [
        factor.to(device=tensor.device, dtype=tensor.dtype)
        for factor, tensor in zip(factors.unbind(), tensors, strict=True)
    ]
    torch._foreach_addcmul_(tensors, directions, scalars, value=alpha)


def is_adapted(parameters: Iterable[Tensor], min_dimensions: int, like: Tensor) -> Tensor:
    """Tell which layers get a rate of their own, ``[layers]`` of bool: those with ``min_dimensions`` dimensions and
    more."""
    return torch.tensor([parameter.dim() >= min_dimensions for parameter in parameters], device=like.device)


def check_positive(optimizer: str, **values: float) -> None:
    """Refuse hyper-parameters that are not positive and finite numbers."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ConfigurationError(f"{optimizer}({name}={value}): needs a positive, finite number. Choose one.")


def check_not_negative(optimizer: str, **values: float) -> None:
    """Refuse hyper-parameters that are negative, infinite or NaN."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ConfigurationError(f"{optimizer}({name}={value}): needs a finite number of at least 0. Choose one.")


def check_fraction(optimizer: str, **values: float) -> None:
    """Refuse hyper-parameters outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigurationError(f"{optimizer}({name}={value}): needs a number in [0, 1). Choose one, such as 0.9.")
