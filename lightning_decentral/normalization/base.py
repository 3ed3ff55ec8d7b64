"""What the normalization layers here have in common with `torch.nn.BatchNorm2d`, and how they load its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization.channels import statistics_dtype


class AbstractNorm(nn.Module, ABC):
    """A layer with one weight and bias per channel, and running estimates that no optimizer sees.

    The estimates are buffers in float32 at least, also after ``module.half()`` or ``.to(torch.bfloat16)``: sums over
    many batches cannot be kept in half precision.

    Args:
        num_features: channels, the second dimension of the input.
        eps: added to the variance.
        affine: whether there are a weight and a bias per channel.
        device: of parameters and estimates.
        dtype: of the parameters; the estimates are in float64 for float64, else in float32.
    """

    dimensions: ClassVar[tuple[int, ...]] = ()
    """How many an input may have, batch and channels included; empty: any number from 2 on."""
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if num_features < 1:
            raise ConfigurationError(f"{name}(num_features={num_features}): needs at least one channel.")
        if not eps > 0:
            raise ConfigurationError(f"{name}(eps={eps}): needs a positive number, or a constant channel gives 0 / 0.")
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        for parameter, value in (("weight", 1.0), ("bias", 0.0)):
            values = torch.full((num_features,), value, device=device, dtype=dtype) if affine else None
            self.register_parameter(parameter, None if values is None else nn.Parameter(values))
        self._statistics = {"device": device, "dtype": statistics_dtype(dtype)}
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self.num_batches_tracked: Tensor

    def add_estimates(self, **values: float | tuple[float, int]) -> None:
        """Register running estimates, ``name=value``: one per channel, or ``(value, rows)`` for several."""
        for name, value in values.items():
            start, shape = (value, ()) if isinstance(value, float) else (value[0], (value[1],))
            self.register_buffer(name, torch.full((*shape, self.num_features), start, **self._statistics))  # type: ignore[arg-type]

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[batch, channels, ...]``."""

    def check_input(self, x: Tensor) -> None:
        """Refuse what cannot be normalized.

        Raises:
            ValueError: another number of dimensions or channels, or nothing at all.
        """
        name = type(self).__name__
        if x.dim() not in self.dimensions if self.dimensions else x.dim() < 2:
            wanted = " or ".join(map(str, self.dimensions)) or "at least 2"
            raise ValueError(f"{name} got an input of shape {tuple(x.shape)}, needs {wanted} dimensions.")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{name} got {x.shape[1]} channels, needs {self.num_features}. Pass num_features={x.shape[1]}, or move "
                "the channels to the second dimension."
            )
        if x.numel() == 0:
            raise ValueError(f"{name} got an empty input, of shape {tuple(x.shape)}. Leave out empty batches.")

    def scale_and_bias(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias in the dtype of the estimates; 1 and 0 where there are none."""
        weight = torch.ones_like(like) if self.weight is None else self.weight.to(like.dtype)
        return weight, torch.zeros_like(like) if self.bias is None else self.bias.to(like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AbstractNorm:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.is_floating_point() and moved.element_size() < 4:
                self._buffers[name] = value.to(moved.device, torch.float32)  # fn(value) has lost its digits
        return self

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


def batch_norm_variance(state_dict: dict[str, Any], prefix: str, estimates: dict[str, Tensor]) -> None:
    """Give weights of BatchNorm, which are about to be loaded, the estimates that a layer here has instead.

    BatchNorm's ``running_var`` becomes ``running_square``, the second moment; whatever BatchNorm does not have starts
    from its present value.

    Args:
        state_dict: changed in place; weights that are not of a BatchNorm are left alone.
        prefix: of the layer's names.
        estimates: the layer's own, by name.
    """
    variance = state_dict.get(f"{prefix}running_var")
    if variance is None or f"{prefix}running_square" in state_dict or "running_square" not in estimates:
        return
    del state_dict[f"{prefix}running_var"]
    state_dict[f"{prefix}running_square"] = variance + state_dict[f"{prefix}running_mean"] ** 2
    for name, value in estimates.items():
        state_dict.setdefault(f"{prefix}{name}", value)
