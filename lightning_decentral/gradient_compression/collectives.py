"""Answers what the ways of aggregation ask, over the process groups of `torch.distributed`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.gradient_compression.requests import (
    AbstractRequest,
    AllGather,
    AllGatherNumber,
    AllReduce,
    AllToAll,
    Spread,
)
from lightning_decentral.gradient_compression.step import Step
from lightning_decentral.traffic import Traffic, all_reduce_bytes

LANES = 3  # so many take turns; what the last one does asks nobody
_RING_BYTES = 1 << 18  # means of at least this size go around the ring of workers, if these are near
_NEAR_SECONDS = 3e-3  # that is, if an empty message takes less from one worker to the next


class Collectives:
    """Begins requests on process groups of its own: one for each lane that begins any, so that their order is the same
    on all workers.

    Args:
        device: where the tensors are.
        timeout: of a collective; ``None``: the back end's own.
        spreads: whether there will be means to be spread; then it is measured how near the workers are.

    Attributes:
        rank: this worker's.
        workers: how many.
        traffic: what this worker sent.

    Must be made by all workers together.
    """

    def __init__(self, device: torch.device, timeout: timedelta | None, spreads: bool) -> None:
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.traffic = Traffic()
        self._device = device
        self._counting = threading.Lock()  # all lanes count
        self._groups = [dist.new_group(timeout=timeout) for _ in range(LANES - 1)]
        self._near = spreads and self._is_near()

    @property
    def group(self) -> Any:
        """The first lane's process group; between two steps for whatever else has to be said."""
        return self._groups[0]

    @property
    def is_open(self) -> bool:
        """Whether anything can still be exchanged."""
        return bool(self._groups)

    def close(self) -> None:
        """End the process groups."""
        if dist.is_initialized():
            for group in self._groups:
                dist.destroy_process_group(group)
        self._groups = []

    def begin(self, step: Step, request: AbstractRequest[Any], lane: int) -> tuple[Callable[[], Any], bool]:
        """Begin a request on this lane's group.

        Args:
            step: for which it is counted.
            request: one of `requests`.
            lane: its number.

        Returns:
            What waits for the answer, and whether the lane waits itself.
        """
        group, begins = self._groups[lane], self._BEGINS[type(request)]
        works, answer = begins(self, step, request, group)

        def wait() -> Any:
            with step.measuring.timed("communicate"):
                for work in works:
                    work.wait()
            return answer()

        return wait, request.alone

    # -- one function for each request ---------------------------------------------------------------------------------

    def _all_reduce(self, step: Step, request: AllReduce, group: Any) -> tuple[list[Any], Callable[[], None]]:
        operation = dist.ReduceOp.MAX if request.largest else dist.ReduceOp.SUM
        works = []
        for tensor in request.tensors:
            works.append(dist.all_reduce(tensor, operation, group=group, async_op=True))
            self._count(step, tensor.nbytes, all_reduce_bytes(tensor.nbytes, self.workers))
        return works, lambda: None

    def _all_gather(self, step: Step, request: AllGather, group: Any) -> tuple[list[Any], Callable[[], list[Tensor]]]:
        message = request.message
        rows = [torch.empty_like(message) for _ in range(self.workers)]  # views of wider types must be aligned
        work = dist.all_gather(rows, message, group=group, async_op=True)
        self._count(step, message.nbytes, (self.workers - 1) * message.nbytes)
        return [work], lambda: rows

    def _all_gather_number(
        self, step: Step, request: AllGatherNumber, group: Any
    ) -> tuple[list[Any], Callable[[], list[int]]]:
        own = torch.tensor([request.number], device=self._device)
        works, rows = self._all_gather(step, AllGather(own), group)
        return works, lambda: [int(row) for row in rows()]

    def _all_to_all(self, step: Step, request: AllToAll, group: Any) -> tuple[list[Any], Callable[[], Tensor]]:
        own, sizes = request.sizes[self.rank], list(request.sizes)
        incoming = torch.empty((self.workers, own), dtype=torch.uint8, device=self._device)
        everybody = [own] * self.workers
        work = dist.all_to_all_single(incoming.view(-1), request.outgoing, everybody, sizes, group=group, async_op=True)
        self._count(step, request.outgoing.numel(), request.outgoing.numel() - own)
        return [work], lambda: incoming

    def _spread(self, step: Step, request: Spread, group: Any) -> tuple[list[Any], Callable[[], list[Tensor]]]:
        """Take one of two routes, which give the same bits."""
        message, room, sizes = request.message, request.room, list(request.sizes)
        if self._near and len(message) >= _RING_BYTES:
            work = dist.all_gather_into_tensor(room, message, group=group, async_op=True)
            rows = room.view(self.workers, -1)
            means = [row[:size] for row, size in zip(rows, sizes, strict=True)]
        else:
            message, room = message[: sizes[self.rank]], room[: sum(sizes)]
            request.copies.view(self.workers, -1).copy_(message)
            outgoing, everybody = request.copies.view(-1), [len(message)] * self.workers
            work = dist.all_to_all_single(room, outgoing, sizes, everybody, group=group, async_op=True)
            means = list(torch.split(room, sizes))
        self._count(step, len(message), (self.workers - 1) * len(message))
        return [work], lambda: means

    _BEGINS: ClassVar[dict[type[AbstractRequest[Any]], Callable[..., tuple[list[Any], Callable[[], Any]]]]] = {
        AllReduce: _all_reduce,
        AllGather: _all_gather,
        AllGatherNumber: _all_gather_number,
        AllToAll: _all_to_all,
        Spread: _spread,
    }

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _count(self, step: Step, handed: int, sent: int) -> None:
        step.measuring.count(handed=handed)
        with self._counting:
            self.traffic.bytes_sent += sent
            self.traffic.messages += 1
            self.traffic.exchanges += 1

    def _is_near(self) -> bool:
        """Measure whether means should go around the ring of workers; the same answer on all of them.

        Around a ring every worker sends to one other, whose link it has for itself. An all-to-all shares it between
        connections that do not take up what another one leaves, and needs a third more time for the same bytes over
        TCP; but a ring waits for as many latencies in sequence as there are workers.
        """
        group = self._groups[-1]
        if self.workers == 2 or self._device.type != "cpu" or dist.get_backend(group) != "gloo":
            return False
        own, every = torch.zeros(1), torch.zeros(self.workers)
        seconds = []
        for _ in range(5):  # the first makes the connections
            start = time.perf_counter()
            dist.all_gather_into_tensor(every, own, group=group)
            seconds.append(time.perf_counter() - start)
        slowest = torch.tensor([min(seconds)])
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
        return slowest.item() < _NEAR_SECONDS * (self.workers - 1)
