"""What an optimizer remembers of some parameters, as one vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_decentral.flat import AbstractVector, Vector
from lightning_decentral.worker import AbstractMemory


class OptimizerMemory(AbstractMemory):
    """What an optimizer remembers of some parameters.

    Args:
        state: gives the optimizer's ``state``, by parameter, as it is now.
        parameters: of one worker's model.
    """

    def __init__(
        self, state: Callable[[], MutableMapping[Any, dict[str, Any]]], parameters: Sequence[Parameter]
    ) -> None:
        self._state, self._parameters = state, parameters

    def forget(self) -> None:
        for parameter in self._parameters:
            self._state().pop(parameter, None)

    def values(self) -> AbstractVector | None:
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in self._tensors():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach().reshape(-1))
        return Vector(torch.cat(tensors) for tensors in kinds.values()) if kinds else None

    def replace(self, values: AbstractVector) -> None:
        assert isinstance(values, Vector)
        left = {(buffer.dtype, buffer.device): buffer for buffer in values.buffers}
        with torch.no_grad():
            for tensor in self._tensors():
                kind = tensor.dtype, tensor.device
                own, left[kind] = left[kind][: tensor.numel()], left[kind][tensor.numel() :]
                tensor.copy_(own.view(tensor.shape))

    def _tensors(self) -> Iterator[Tensor]:
        """Go through what can be averaged, in one order on all workers."""
        state = self._state()
        for parameter in self._parameters:
            remembered = state.get(parameter, {})
            for name in sorted(remembered):
                tensor = remembered[name]
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim():
                    yield tensor
