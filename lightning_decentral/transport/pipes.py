"""Pipes: tensors that go one way, from a stage of a pipeline to the next, while both compute.

Each direction between two stages has a process group of two, made directly on the store, and a thread at its end that
takes what comes as soon as it comes: so a transfer goes on beside the computation of both. How much can wait there is
bounded by what the schedule lets its sender be ahead. Shapes travel in a header, and may change from batch to batch.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.edges import break_connection, gloo_options

_HEADER, _BODY = 0, 2  # tags; with 1 a connection is broken, and a body that came for it would abort the process
_MOST_DIMENSIONS, _MOST_TENSORS = 8, 64
_MOST_ELEMENTS = 1 << 36
_FIELDS = 3 + _MOST_DIMENSIONS  # of a tensor in a header: its type, whether it is alone, dimensions, shape
_FOREVER = timedelta(days=365)  # between two batches; a peer that dies closes the connection
_POLL_SECONDS = 0.2
_TYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
)
_GOODBYE = -1

_ALONE, _IN_TUPLE = 1, 2  # what a row of a header says of its tensor; 0: there is none

End = tuple[int, int]
"""Two stages: who sends, who receives."""

Value = Tensor | tuple[Tensor, ...]
"""What is sent: a tensor, or several."""


class Pipes:
    """The pipes of one worker. Must be made by all workers together.

    Args:
        communicator: to the other workers; tells who was lost.
        name: of these pipes: another one for others of the same run.
        ends: all pipes between stages that different workers have: the stages, and the ranks of their workers.
    """

    def __init__(self, communicator: Communicator, name: str, ends: Sequence[tuple[End, int, int]]) -> None:
        self._links = communicator
        self._timeout = timedelta(seconds=communicator.timeout_seconds)
        self._arrived = threading.Condition()
        self._inbox: dict[End, deque[Value]] = {}
        self._outward: dict[End, tuple[Any, int]] = {}
        self._inward: dict[End, tuple[Any, int]] = {}
        self._leaving: deque[tuple[Any, Tensor]] = deque()
        self._closing = False
        options = gloo_options(self._timeout)
        for end, source, target in sorted(ends):  # in the same order everywhere: both ends must meet
            if communicator.rank not in (source, target):
                continue
            store = dist.PrefixStore(f"pipe/{name}/{end[0]}-{end[1]}-{source}-{target}", communicator.store)
            make = partial(dist.ProcessGroupGloo, store, int(communicator.rank == target), 2, options)
            group = communicator.connecting(make)
            if communicator.rank == source:
                self._outward[end] = group, target
            else:
                self._inward[end] = group, source
                self._inbox[end] = deque()
        self._threads = [
            threading.Thread(target=self._take, args=(end,), name=f"decentral-pipe-{end[0]}-{end[1]}", daemon=True)
            for end in self._inward
        ]
        for thread in self._threads:
            thread.start()

    def send(self, end: End, value: Value) -> None:
        """Send a copy of tensors to another stage; returns at once.

        Raises:
            ConfigurationError: if one has a type or more dimensions than can be sent.
        """
        group, target = self._outward[end]
        tensors, kind = ((value,), _ALONE) if isinstance(value, Tensor) else (value, _IN_TUPLE)
        header = torch.full((_MOST_TENSORS, _FIELDS), 0, dtype=torch.int64)
        if len(tensors) > _MOST_TENSORS:
            raise ConfigurationError(
                f"Stage {end[0]} sends {len(tensors)} tensors to stage {end[1]}, and can send {_MOST_TENSORS}. Put "
                "them together, or cut the model elsewhere (cuts=)."
            )
        for row, tensor in zip(header, tensors, strict=False):
            if tensor.dtype not in _TYPES or tensor.ndim > _MOST_DIMENSIONS:
                raise ConfigurationError(
                    f"Stage {end[0]} sends a tensor of {tensor.dtype} with {tensor.ndim} dimensions to stage {end[1]}, "
                    f"and can send {_MOST_DIMENSIONS} dimensions of ordinary types. Reshape or convert it in the block "
                    "before the cut, or cut the model elsewhere (cuts=)."
                )
            row[:3] = torch.tensor([_TYPES.index(tensor.dtype), kind, tensor.ndim])
            row[3 : 3 + tensor.ndim] = torch.tensor(tensor.shape, dtype=torch.int64)
        bodies = [_bytes_of(tensor) for tensor in tensors]
        with self._links.failures((target,)):
            while self._leaving and self._leaving[0][0].is_completed():
                self._leaving.popleft()[0].wait()
            self._leaving.append((group.send([header], 1, _HEADER), header))
            for body in bodies:
                if body.numel():
                    self._leaving.append((group.send([body], 1, _BODY), body))
        self._links.count(sum(body.numel() for body in bodies), 1)

    def has(self, end: End) -> bool:
        """Tell whether something has come."""
        return bool(self._inbox[end])

    def receive(self, end: End) -> Value:
        """Return what another stage sent first, once it is there.

        Raises:
            PeerLost: if its worker is lost, or sends nothing in time.
            WorkerFailed: if another worker raised.
        """
        self.wait_for_any([end])
        with self._arrived:
            return self._inbox[end].popleft()

    def waiting(self, end: End, count: int) -> list[Value]:
        """Return what is received next, once so many values have come; they stay where they are."""
        if count:
            self.wait_for_any([end], count)
        with self._arrived:
            return list(self._inbox.get(end, ()))[:count]

    def put(self, end: End, values: Sequence[Value]) -> None:
        """Let values be received before all that comes."""
        with self._arrived:
            self._inbox[end].extendleft(reversed(values))

    def wait_for_any(self, ends: Sequence[End], count: int = 1) -> None:
        """Wait until so many values have come through one of these pipes."""
        since = time.monotonic()

        def have_come() -> bool:
            return any(len(self._inbox.get(end, ())) >= count for end in ends)

        while True:
            with self._arrived:
                if have_come() or self._arrived.wait_for(have_come, _POLL_SECONDS):
                    return
            self._links.check_waiting(since)
            if time.monotonic() - since > self._links.timeout_seconds:
                peers = tuple({self._inward[end][1] for end in ends if end in self._inward})
                with self._links.failures(peers):
                    raise TimeoutError(f"Nothing came to a stage for {self._links.timeout_seconds:g} s.")

    def close(self, failed: bool = False) -> None:
        """Take leave of the other ends; or break all connections, if the run has failed."""
        if self._closing:
            return
        self._closing = True
        goodbye = torch.full((_MOST_TENSORS, _FIELDS), _GOODBYE, dtype=torch.int64)
        for group, _ in self._outward.values():
            if failed:
                break_connection(group, 1)
                continue
            try:
                group.send([goodbye], 1, _HEADER).wait(self._timeout)
            except RuntimeError:  # the peer is gone already
                continue
        if failed:
            for group, _ in self._inward.values():
                break_connection(group, 0)
        deadline = time.monotonic() + (3.0 if failed else self._links.timeout_seconds)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._leaving.clear()
        self._outward.clear()
        self._inward.clear()

    # -- the threads --------------------------------------------------------------------------------------------------

    def _take(self, end: End) -> None:
        group, source = self._inward[end]
        try:
            while True:
                header = torch.empty(_MOST_TENSORS, _FIELDS, dtype=torch.int64)
                group.recv([header], 0, _HEADER).wait(_FOREVER)
                if int(header[0, 0]) == _GOODBYE:
                    return
                rows = [row for row in header.tolist() if row[1]]
                tensors = tuple(self._take_one(group, row) for row in rows)
                with self._arrived:
                    self._inbox[end].append(tensors[0] if [row[1] for row in rows] == [_ALONE] else tensors)
                    self._arrived.notify_all()
        except Exception as error:
            if not self._closing and self._links.watch is not None:
                self._links.watch.publish(self._links.watch.diagnose(error, (source,)))

    def _take_one(self, group: Any, fields: Sequence[int]) -> Tensor:
        dtype, shape = fields[0], fields[3 : 3 + max(0, fields[2])]
        if not (0 <= dtype < len(_TYPES) and 0 <= fields[2] <= _MOST_DIMENSIONS and min(shape, default=0) >= 0):
            raise RuntimeError(f"A header of a pipe has the fields {fields}.")
        if math.prod(shape) > _MOST_ELEMENTS:
            raise RuntimeError(f"A header of a pipe has the shape {shape}.")
        tensor = torch.empty(shape, dtype=_TYPES[dtype])
        if tensor.numel():
            group.recv([tensor.reshape(-1).view(torch.uint8)], 0, _BODY).wait(self._timeout)
        return tensor.to(self._links.device)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Copy the bytes of a tensor to the processor, in memory that nobody changes."""
    values = tensor.detach().to("cpu").contiguous()
    if values.data_ptr() == tensor.data_ptr():
        values = values.clone()
    return values.reshape(-1).view(torch.uint8)
