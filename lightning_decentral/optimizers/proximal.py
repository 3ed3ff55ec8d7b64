"""Proximal operators: what a proximal step does after the gradient step.

``prox(z) = argmin_x psi(x) + ||x - z||^2 / (2 lr)``. An operator is anything that is called with a tensor and a
learning rate and returns a tensor: a function of your own will do. Those here can also say what ``psi`` is (`value`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError

Proximal = Callable[[Tensor, float], Tensor]
"""Called with the parameter after the gradient step, and the learning rate; returns the parameter's new values."""


class AbstractProximal(ABC):
    """A regularizer ``psi`` of one tensor, and its proximal operator."""

    @abstractmethod
    def value(self, tensor: Tensor) -> Tensor:
        """Return ``psi(tensor)``, a number; to be added to the loss where the objective is reported."""

    @abstractmethod
    def __call__(self, tensor: Tensor, lr: float) -> Tensor:
        """Return ``argmin_x psi(x) + ||x - tensor||^2 / (2 lr)``."""


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < float("inf"):
        raise ConfigurationError(f"{name}(weight={weight}): needs a finite number of at least 0. Use 0 for none.")


@dataclass(frozen=True)
class L1(AbstractProximal):
    """``weight ||x||_1``: numbers within ``lr weight`` of zero become zero, exactly; all others come so much closer.

    Args:
        weight: at least 0.

    Example:
        >>> L1(0.1)(torch.tensor([-2.0, 0.05, 1.0]), 1.0)
        tensor([-1.9000,  0.0000,  0.9000])
    """

    weight: float

    def __post_init__(self) -> None:
        _check_weight("L1", self.weight)

    def value(self, tensor: Tensor) -> Tensor:
        return self.weight * tensor.abs().sum()

    def __call__(self, tensor: Tensor, lr: float) -> Tensor:
        threshold = lr * self.weight
        return torch.nn.functional.softshrink(tensor, threshold) if threshold > 0 else tensor.clone()


@dataclass(frozen=True)
class Ridge(AbstractProximal):
    """``weight ||x||^2 / 2``: all numbers are divided by ``1 + lr weight``.

    Args:
        weight: at least 0.

    Example:
        >>> Ridge(1.0)(torch.tensor([-2.0, 1.0]), 1.0)
        tensor([-1.0000,  0.5000])
    """

    weight: float

    def __post_init__(self) -> None:
        _check_weight("Ridge", self.weight)

    def value(self, tensor: Tensor) -> Tensor:
        return self.weight / 2 * tensor.square().sum()

    def __call__(self, tensor: Tensor, lr: float) -> Tensor:
        return tensor / (1 + lr * self.weight)


@dataclass(frozen=True)
class Box(AbstractProximal):
    """Nothing outside of ``[low, high]``: numbers are clipped.

    Args:
        low: smallest value.
        high: largest value; not below ``low``.

    Example:
        >>> Box(-1.0, 1.0)(torch.tensor([-2.0, 0.5]), 1.0)
        tensor([-1.0000,  0.5000])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ConfigurationError(f"Box got low={self.low} and high={self.high}; needs low <= high. Swap them.")

    def value(self, tensor: Tensor) -> Tensor:
        outside = (tensor < self.low) | (tensor > self.high)
        return torch.where(outside.any(), torch.inf, 0.0)

    def __call__(self, tensor: Tensor, lr: float) -> Tensor:
        return tensor.clamp(self.low, self.high)


@dataclass(frozen=True)
class GroupLasso(AbstractProximal):
    """``weight sum over groups of ||group||``: groups of norm up to ``lr weight`` become zero as a whole.

    Args:
        weight: at least 0.
        dim: the dimension along which the groups lie: 1 for the weights ``[outputs, inputs]`` of a linear layer makes a
            group of each input. ``None``: the whole tensor is one.

    Example:
        >>> GroupLasso(1.0, dim=1)(torch.tensor([[3.0, 0.3], [4.0, 0.4]]), 1.0)
        tensor([[2.4000, 0.0000],
                [3.2000, 0.0000]])
    """

    weight: float
    dim: int | None = None

    def __post_init__(self) -> None:
        _check_weight("GroupLasso", self.weight)

    def _norms(self, tensor: Tensor) -> Tensor:
        """Return the norm of each group, with all dimensions kept."""
        if self.dim is not None and not -tensor.dim() <= self.dim < tensor.dim():
            raise ConfigurationError(
                f"GroupLasso(dim={self.dim}) got a tensor of shape {tuple(tensor.shape)}; needs one that has this "
                "dimension. Give biases a parameter group of their own, with prox=None."
            )
        kept = None if self.dim is None else self.dim % tensor.dim()
        others = [dim for dim in range(tensor.dim()) if dim != kept]
        if not others:  # a vector: each number is a group
            return tensor.abs()
        lengths: Tensor = torch.linalg.vector_norm(tensor, dim=others, keepdim=True)
        return lengths

    def value(self, tensor: Tensor) -> Tensor:
        return self.weight * self._norms(tensor).sum()

    def __call__(self, tensor: Tensor, lr: float) -> Tensor:
        lengths = self._norms(tensor)
        factors = torch.where(lengths > lr * self.weight, 1 - lr * self.weight / lengths, 0.0)
        return tensor * factors
