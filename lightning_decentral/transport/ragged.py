"""Gathering tensors of unequal numbers of rows, as workers have that made unequal numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.transport.collectives import MEETING_NUMBERS
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.gathering import gather_numbers

_TYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)


def is_everybody(group: Any) -> bool:
    """Tell whether a group has all workers of the run."""
    return group is None or group is dist.group.WORLD


def group_of(ranks: Sequence[int], communicator: Communicator) -> Any:
    """Make a group of some workers. All workers together."""
    return communicator.connecting(partial(dist.new_group, list(ranks)))


def gather_rows(tensor: Tensor, group: Any, sync_grads: bool, communicator: Communicator | None) -> list[Tensor]:
    """Return the tensors of all workers of a group, by rank. All of them together.

    They may have unequal numbers of rows; a worker without a row may have any type and any other sizes.

    Args:
        tensor: of this worker.
        group: of all these workers.
        sync_grads: whether gradients flow back to the worker that a tensor came from.
        communicator: through which all workers make sure that they do the same; ``None`` where that is known.

    Raises:
        ConfigurationError: on all workers, if anything but the number of rows differs.
    """
    if communicator is not None and is_everybody(group):
        described = communicator.meet("all_gather", *_describe(tensor))
    else:
        described = gather_numbers(_describe(tensor), tensor.device, group)
    return _gather(tensor, described, group, sync_grads)


def _describe(tensor: Tensor) -> list[int]:
    """Return a tensor's type and shape, as numbers to be exchanged before it is."""
    most = MEETING_NUMBERS - 2
    if tensor.ndim > most:
        raise ConfigurationError(
            f"all_gather got a tensor of shape {tuple(tensor.shape)}: it can have at most {most} dimensions. Flatten "
            "some of them first."
        )
    return [_TYPES.index(tensor.dtype), tensor.ndim, *tensor.shape, *[0] * (most - tensor.ndim)]


def _gather(tensor: Tensor, described: Sequence[Sequence[int]], group: Any, sync_grads: bool) -> list[Tensor]:
    shapes = [tuple(numbers[2 : 2 + numbers[1]]) for numbers in described]
    kinds = [
        (numbers[0], *shape[1:]) if shape else (numbers[0],) for numbers, shape in zip(described, shapes, strict=True)
    ]
    ranks = [rank for rank, shape in enumerate(shapes) if shape[:1] != (0,)] or [0]
    if len({(kinds[rank], len(shapes[rank])) for rank in ranks}) > 1:
        types = [str(_TYPES[numbers[0]]) for numbers in described]
        raise ConfigurationError(
            f"all_gather got tensors of the shapes {shapes} and types {types} from the workers. Types, numbers of "
            "dimensions and sizes must be equal, except for the size of the first dimension. Pad the others to a "
            "common size, or convert them."
        )
    first = shapes[ranks[0]]
    rows = [shape[0] if rank in ranks and shape else 0 for rank, shape in enumerate(shapes)]
    if shapes[dist.get_rank(group)] != first and rows[dist.get_rank(group)] == 0:
        tensor = tensor.new_zeros((0, *first[1:]), dtype=_TYPES[described[ranks[0]][0]])
    ragged = len(set(shapes)) > 1
    if ragged:
        tensor = pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, max(rows) - len(tensor)])
    gathered = _gather_equal(tensor.contiguous(), group, sync_grads)
    return [each[:count] for each, count in zip(gathered, rows, strict=True)] if ragged else gathered


def _gather_equal(tensor: Tensor, group: Any, sync_grads: bool) -> list[Tensor]:
    if sync_grads and torch.is_grad_enabled():
        return list(_Gathering.apply(tensor, group))
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor.detach(), group)
    return gathered


class _Gathering(Function):
    """Gathers equal tensors; a gradient of one goes back, summed over all workers, to where the tensor came from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_gather_equal(tensor, group, sync_grads=False))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = torch.stack([gradient.contiguous() for gradient in gradients])
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None
