"""What an optimizer remembers, taken apart into plain values and tensors, so that it can be sent to other workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError

_TYPES = {str(each).removeprefix("torch."): each for each in (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool),
)}  # fmt: skip


def pack_states(states: Mapping[int, Mapping[str, Any]]) -> tuple[list[list[Any]], list[Tensor]]:
    """Take the states of an optimizer's parameters apart.

    Args:
        states: by number of the parameter, what `torch.optim.Optimizer.state_dict` has under ``"state"``.

    Returns:
        A description that JSON can hold, and the tensors, in its order.

    Raises:
        ConfigurationError: if there is something else than tensors and plain values.
    """
    description: list[list[Any]] = []
    tensors: list[Tensor] = []
    for number, state in states.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and (kind := str(value.dtype).removeprefix("torch.")) in _TYPES:
                description.append([number, name, kind, list(value.shape), value.device.type])
                tensors.append(value)
            elif value is None or isinstance(value, bool | int | float | str):
                description.append([number, name, "", value, ""])
            else:
                raise ConfigurationError(
                    f"An optimizer got {type(value).__name__} under {name!r} in its state, and a pipeline can save "
                    "tensors of ordinary types and plain values. Use another optimizer."
                )
    return description, tensors


def unpack_states(
    description: Sequence[Sequence[Any]], own: Sequence[Tensor] | None
) -> tuple[list[Tensor], Callable[[], dict[int, dict[str, Any]]]]:
    """Make room for the states of an optimizer's parameters, and put them together once they are there.

    Args:
        description: what `pack_states` has given, here or elsewhere.
        own: the tensors, if they are this worker's.

    Returns:
        Contiguous tensors to be filled, those of this worker with their values; and what gives the states then.
    """
    if own is not None:
        tensors = [tensor.detach().clone().contiguous() for tensor in own]
    else:
        tensors = [torch.empty(shape, dtype=_TYPES[kind]) for _, _, kind, shape, _ in description if kind]

    def build() -> dict[int, dict[str, Any]]:
        left = iter(tensors)
        states: dict[int, dict[str, Any]] = {}
        for number, name, kind, value, _ in description:
            states.setdefault(int(number), {})[name] = next(left) if kind else value
        return states

    return tensors, build
