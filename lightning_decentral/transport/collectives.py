"""What all workers do together: reductions, meetings, and giving everybody the same values."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.errors import ConfigurationError, ProtocolError
from lightning_decentral.flat import Vector
from lightning_decentral.tensors import give, has_values
from lightning_decentral.traffic import DIRECT_BYTES, all_reduce_bytes
from lightning_decentral.transport.connections import AbstractConnections
from lightning_decentral.transport.few_numbers import reduced
from lightning_decentral.transport.gathering import begin_gathering, gather_bytes, gather_numbers, sum_of_all
from lightning_decentral.transport.poison import is_finite
from lightning_decentral.transport.reductions import reduce_among, sum_among
from lightning_decentral.transport.shared_reduces import SharedReduces

MEETING_NUMBERS = 12  # that every worker may bring to a meeting of all
_MEETING_NAME = 40  # bytes of what a meeting is for
_BUCKET_BYTES = 1 << 24  # of small tensors that travel together
_REDUCE_CHUNK = 1 << 23  # elements of half precision that are reduced in float32 at a time


class Collectives:
    """What all workers do together, in the same order.

    Args:
        connections: to the other workers.
    """

    def __init__(self, connections: AbstractConnections) -> None:
        self._links = connections
        self._shared = SharedReduces(connections.shared)

    def all_reduce(self, value: Vector, among: Sequence[int] | None = None, weight: float = 1.0) -> Vector:
        """Replace ``value`` by its weighted mean over some workers, or all, in its own precision."""
        size = self._links.world_size
        if size == 1:
            return value
        members = tuple(range(size)) if among is None else tuple(sorted(among))
        if self._links.device.type == "cpu" and self._links.shared.connects(members):
            with self._links.failures(tuple(rank for rank in members if rank != self._links.rank)):
                self._shared.reduce(value, members, weight)
        elif len(members) < size:
            reduce_among(self._links, value, members, weight)
        else:
            self._reduce_all(value, weight)
        self._links.count(all_reduce_bytes(value.num_bytes, len(members)), 1, exchanges=1)
        return value

    def _reduce_all(self, value: Vector, weight: float) -> None:
        links, size = self._links, self._links.world_size
        with links.failures(links.others):
            # Nobody knows what weights others have. They come beside the values, which are divided by their sum then.
            own = torch.tensor([weight], dtype=torch.float64, device=links.meeting_device)
            weights, gathering = begin_gathering(own, links.groups[1])
            divisor = float(size)
            if any(buffer.dtype is torch.float16 for buffer in value.buffers):  # a weighted sum of it may overflow
                gathering.wait(links.timeout)
                divisor = float(weights.sum()) or 1.0
            for buffer in value.buffers:
                # Dividing first keeps half precision from overflowing; torch's DDP does the same.
                self._sum(buffer.mul_(weight / divisor) if weight else buffer.zero_())
            gathering.wait(links.timeout)
            total = float(weights.sum())
            if total == 0:
                raise ProtocolError(
                    "`AllReduce` got weight 0 on all workers; it needs one above 0. Give the workers weights that say "
                    "how much each value counts."
                )
            if total != divisor:
                for buffer in value.buffers:
                    buffer.mul_(divisor / total)

    def _sum(self, buffer: Tensor, meeting: bool = False) -> None:
        """Replace a buffer by its sum over all workers, in exchanges or in a meeting, which waits for longer."""
        links = self._links
        if buffer.nbytes <= DIRECT_BYTES or buffer.device.type != "cpu":
            sum_of_all(buffer, links.groups[2 if meeting else 0])
            return
        groups = links.groups[2:] * 2 if meeting else links.groups
        timeout = links.meeting_timeout if meeting else links.timeout
        sum_among(buffer, links.rank, tuple(range(links.world_size)), groups, timeout)

    def consensus_(self, value: Vector, keepers: Sequence[int] | None = None) -> Vector:
        """Replace ``value`` by the mean over all workers, summed in float32 at least. Not counted as traffic.

        Args:
            value: of this worker.
            keepers: whose values count; by default those of all.
        """
        if self._links.world_size == 1:
            return value
        with self._links.failures(self._links.others):
            takes_part = keepers is None or self._links.rank in keepers
            count = self._links.world_size if keepers is None else len(keepers)
            if self._links.inspector is not None and self._links.inspector.refuses:
                takes_part = takes_part and is_finite(value)
                told = gather_numbers([takes_part], self._links.meeting_device, self._links.groups[2])
                count = sum(row[0] for row in told)
                takes_part = takes_part or count == 0  # the mean of nothing but NaN is NaN
                count = count or self._links.world_size
            # A power of two: a sum of large values does not overflow, and all others have the same bits.
            share = 0.5 ** (self._links.world_size - 1).bit_length()
            for buffer in value.buffers:
                if not takes_part:
                    buffer.zero_()
                if buffer.dtype not in (torch.float16, torch.bfloat16):
                    self._sum(buffer.mul_(share), meeting=True)
                    buffer.div_(count * share)
                    continue
                for chunk in buffer.split(_REDUCE_CHUNK):
                    total = chunk.float().mul_(share)
                    self._sum(total, meeting=True)
                    chunk.copy_(total.div_(count * share))
        return value

    def agree(self, value: float, operation: str = "mean", what: str = "a meeting of all workers") -> float:
        """Reduce one number of every worker: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``; see `meet` for ``what``.

        Raises:
            ConfigurationError: on all workers, if one of them is at another kind of meeting.
        """
        values: list[float] = [struct.unpack("d", struct.pack("q", row[0]))[0] for row in self.meet(what, _bits(value))]
        if operation == "mean":
            return sum(values) / len(values)
        if operation == "sum":
            return sum(values)
        return min(values) if operation == "min" else max(values)

    def reduce_numbers(self, values: Tensor, operation: str) -> Tensor:
        """Reduce a few numbers of every worker, in double precision, in the order of the ranks: one message of each.

        Args:
            values: for which `is_few` holds; they stay as they are.
            operation: see `few_numbers`.

        Raises:
            ConfigurationError: on all workers, if one of them is at another kind of meeting, with other numbers too.
        """
        floating = values.is_floating_point()
        own = values.detach().reshape(-1).to("cpu", torch.float64 if floating else torch.int64)
        what = f"a reduction ({operation}) of {len(own)} {'numbers' if floating else 'integers'}"
        rows = torch.tensor(self.meet(what, *own.view(torch.int64).tolist()))
        return reduced(rows.view(own.dtype), operation).view(values.shape)

    def meet(self, what: str, *numbers: int) -> list[list[int]]:
        """Wait for everybody; a few integers of every worker, by rank, of equally many on all.

        Workers that would meet for different things, because one has done something that another has not, would read
        each other's bytes as something else, or wait. Here they notice.

        Args:
            what: the workers meet for, as it is named in messages.
            numbers: at most `MEETING_NUMBERS`.

        Raises:
            ConfigurationError: on all workers, if one of them is at another kind of meeting.
        """
        if self._links.world_size == 1:
            return [list(numbers)]
        text = what.encode()[:_MEETING_NAME].ljust(_MEETING_NAME)
        own = [*struct.unpack(f"{_MEETING_NAME // 8}q", text), *numbers]
        own += [0] * (_MEETING_NAME // 8 + MEETING_NUMBERS - len(own))

        def gather() -> list[list[int]]:
            with self._links.failures(self._links.others):
                return gather_numbers(own, self._links.meeting_device, self._links.groups[2])

        rows: list[list[int]] = self._links.wait(self._links.submit(gather))
        names = [struct.pack(f"{_MEETING_NAME // 8}q", *row[: _MEETING_NAME // 8]).decode().strip() for row in rows]
        if len(set(names)) > 1:
            where = "; ".join(
                f"worker{'s' * (names.count(name) > 1)} "
                f"{', '.join(str(rank) for rank, other in enumerate(names) if other == name)} at {name}"
                for name in dict.fromkeys(names)
            )
            raise ConfigurationError(
                f"The workers do not do the same: {where}. What all workers do together, they must do equally often "
                "and in the same order. Look for a gathered list that is longer on some workers (stack or concatenate "
                "it first), a value logged with sync_dist=True, a checkpoint or a collective on some workers only."
            )
        return [row[_MEETING_NAME // 8 :][: len(numbers)] for row in rows]

    def gather(self, value: bytes) -> list[bytes]:
        """Gather what every worker passed, by rank. All workers together; not counted as traffic."""
        if self._links.world_size == 1:
            return [value]
        device = self._links.meeting_device
        lengths = [row[0] for row in self.meet("a gathering of values", len(value))]

        def gather_padded() -> list[bytes]:
            with self._links.failures(self._links.others):
                return gather_bytes(value, lengths, device, self._links.groups[2])

        answer: list[bytes] = self._links.wait(self._links.submit(gather_padded))
        return answer

    def average_floating(self, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous floating-point and complex tensors by their mean over all workers, at any device.

        All workers together, with the same shapes and types; one reduction per type. Not counted as traffic.
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            dtype = torch.float32 if real.element_size() == 1 else real.dtype  # there is no sum of float8
            by_dtype.setdefault(dtype, []).append(real)
        if not tensors or self._links.world_size == 1:
            return
        packed = Vector(
            torch.cat([real.reshape(-1).to(self._links.device, dtype) for real in group])
            for dtype, group in by_dtype.items()
        )
        self._links.wait(self._links.submit(lambda: self.consensus_(packed)))
        for buffer, group in zip(packed.buffers, by_dtype.values(), strict=True):
            for real, part in zip(group, buffer.split([real.numel() for real in group]), strict=True):
                real.copy_(part.view(real.shape))

    def take_from(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous tensors by those of one worker. All workers together; not counted as traffic."""
        if not tensors or self._links.world_size == 1:
            return
        device = self._links.meeting_device
        packed = torch.cat([tensor.reshape(-1).view(torch.uint8).to(device) for tensor in tensors])

        def broadcast() -> None:
            with self._links.failures(self._links.others):
                dist.broadcast(packed, source, group=self._links.groups[2])

        self._links.wait(self._links.submit(broadcast))
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        for tensor, part in zip(tensors, packed.split(sizes), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # a part may begin at an odd byte


def _bits(value: float) -> int:
    """Return the bits of a number in double precision, as an integer."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def broadcast_from_zero(tensors: Sequence[Tensor], through: torch.device | None = None) -> None:
    """Give every worker the values that worker 0 has; many small tensors in one message, for a far network.

    Args:
        tensors: on the same device on all workers, each of them.
        through: the device on which they travel, if they are not.
    """
    if dist.get_world_size() == 1:
        return
    for bucket in _buckets(tensors, through is None):
        # As bytes: gloo knows neither int16 nor float8, and copies nothing that is contiguous.
        own = [tensor.detach().to(tensor.device if through is None else through) for tensor in bucket]
        values = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in own]
        packed = values[0] if len(values) == 1 else torch.cat(values)
        dist.broadcast(packed, 0)
        for tensor, value in zip(bucket, torch.split(packed, [each.numel() for each in values]), strict=True):
            if dist.get_rank() > 0 and value.data_ptr() != tensor.data_ptr():
                give(tensor, value.clone().view(tensor.dtype).view(tensor.shape))  # a dtype has its own alignment


def _buckets(tensors: Sequence[Tensor], by_device: bool) -> Iterator[list[Tensor]]:
    """Put neighbours together, or neighbours on one device, as long as they are small."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        apart = by_device and bucket and tensor.device != bucket[0].device
        if bucket and (apart or size + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def is_few(values: Any) -> bool:
    """Tell whether values are numbers that can be brought to a meeting: `MEETING_NUMBERS` at most, no complex ones."""
    if not isinstance(values, Tensor) or not 0 < values.numel() <= MEETING_NUMBERS or not has_values(values):
        return False
    return not values.is_complex() and values.dtype is not torch.bool


def is_transport_error(error: RuntimeError) -> bool:
    """Tell whether an error comes from a connection, and so may be the trace of another worker's end."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text
