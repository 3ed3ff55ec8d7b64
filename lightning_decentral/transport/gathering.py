"""Gathering and adding up small values of all workers in one or two messages from each to each.

gloo's own collectives go around a ring: ``m - 1`` messages follow each other, and twice as many in a sum. Over far
links a small value takes nothing but their latencies. A large one is better off in the ring, where each worker sends
to one other: messages from all to one at once make TCP begin slowly, and lose packets.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


def gather_numbers(numbers: Sequence[int], device: torch.device, group: Any = None) -> list[list[int]]:
    """Gather the integers of every worker, by rank, of equally many on all; by default on the group of all."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    return [row.tolist() for row in _gather(own, group)]


def gather_bytes(value: bytes, lengths: Sequence[int], device: torch.device, group: Any = None) -> list[bytes]:
    """Gather what every worker has, by rank, of as many bytes as ``lengths`` tells of each."""
    own = torch.frombuffer(bytearray(value.ljust(max(lengths) or 1)), dtype=torch.uint8).to(device)
    rows = [row.cpu().numpy().tobytes() for row in _gather(own, group)]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def gather_objects(value: Any) -> list[Any]:
    """Tell what every worker passed, by rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    if "gloo" not in dist.get_backend():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value)
        return gathered
    own, device = pickle.dumps(value), torch.device("cpu")
    lengths = [row[0] for row in gather_numbers([len(own)], device)]
    return [pickle.loads(each) for each in gather_bytes(own, lengths, device)]


def begin_gathering(own: Tensor, group: Any = None) -> tuple[Tensor, Any]:
    """Begin to gather equal vectors of all workers; returns where they come, by rank, and what to wait for."""
    gathered = own.new_empty((dist.get_world_size(group), *own.shape))
    if own.device.type == "cpu":  # gloo's all_gather is a ring
        work = dist.all_to_all_single(gathered, own.expand_as(gathered).contiguous(), group=group, async_op=True)
    else:
        work = dist.all_gather(list(gathered), own, group, async_op=True)
    return gathered, work


def sum_of_all(value: Tensor, group: Any = None) -> Tensor:
    """Replace a contiguous vector by its sum over all workers.

    In the memory of a CPU it goes to all at once, part by part: each worker adds up one part for all. Of half precision
    this sum is rounded once.
    """
    size = dist.get_world_size(group)
    if value.device.type != "cpu" or not len(value):
        dist.all_reduce(value, group=group)
        return value
    parts = pad(value, [0, -len(value) % size])
    theirs = torch.empty_like(parts)
    dist.all_to_all_single(theirs, parts, group=group)
    wide = torch.promote_types(value.dtype, torch.float32)
    part = theirs.view(size, -1).sum(0, dtype=wide).to(value.dtype)
    gathered, work = begin_gathering(part, group)
    work.wait()
    return value.copy_(gathered.view(-1)[: len(value)])


def _gather(own: Tensor, group: Any) -> Tensor:
    gathered, work = begin_gathering(own, group)
    work.wait()
    return gathered
