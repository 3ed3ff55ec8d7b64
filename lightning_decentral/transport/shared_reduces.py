"""All-reduces of workers of one host, in memory that all of them map.

Each worker copies its vector into memory of its own, averages one slice of all, and copies the others' slices back: six
passes over the vector in place of the copies, packets and threads of 2 (m - 1) messages over the loopback interface,
which took ten times as long. Long vectors go piece by piece, so that the memory has one size, and is in a cache.

The terms are added in the order of the ranks, each multiplied by its share first, as gloo and torch's DDP do for two.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lightning_decentral.errors import ProtocolError
from lightning_decentral.flat import Vector
from lightning_decentral.transport.headers import digest, form_of
from lightning_decentral.transport.shared_memory import SharedMemory

_PIECE_BYTES = 1 << 22  # of a vector at a time
_ALIGNED = 16  # elements: where slices begin
_NUMBER = -1  # of the memory, among what is lent


class SharedReduces:
    """One worker's part in the all-reduces of its host; on the lane.

    Args:
        shared: that has met the others.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self._rooms: dict[int, Tensor] = {}  # of each worker: room for a piece of its vector, then for its slice of all
        self._readers: tuple[int, ...] = ()  # of this worker's last slice

    def reduce(self, value: Vector, members: tuple[int, ...], weight: float) -> None:
        """Replace a vector by its weighted mean over some workers of this host, in its own precision.

        Args:
            value: of the same form on all.
            members: their ranks, in order; this worker's is among them.
            weight: of this worker's value.

        Raises:
            ProtocolError: if the forms are not equal, or all weights are 0.
            OSError: if one of them is gone.
        """
        self._open(members)
        others = [rank for rank in members if rank != self._shared.rank]
        key = digest((*members, *form_of(value)))
        for reader in self._readers:  # or they might read a slice of this vector
            self._shared.hear(reader)
        for buffer in value.buffers:
            for piece in buffer.split(_PIECE_BYTES // buffer.element_size()):
                self._reduce(piece, members, others, key, weight)
        for other in others:
            self._shared.tell(other, key, 0)
        self._readers = tuple(others)

    def _reduce(self, piece: Tensor, members: tuple[int, ...], others: list[int], key: int, weight: float) -> None:
        rank, numel = self._shared.rank, piece.numel()
        size = -(-numel // (len(members) * _ALIGNED)) * _ALIGNED
        slices = {member: slice(place * size, (place + 1) * size) for place, member in enumerate(members)}
        rooms = {member: self._rooms[member].view(piece.dtype) for member in members}
        begin = _PIECE_BYTES // piece.element_size()
        means = {member: room[begin:][: piece[slices[member]].numel()] for member, room in rooms.items()}

        rooms[rank][:numel].copy_(piece)
        weights = self._meet(others, key, weight) | {rank: weight}
        total = sum(weights[member] for member in members)
        if total == 0:
            raise ProtocolError(
                f"`AllReduce` got weight 0 on all workers that take part, {list(members)}; it needs one above 0. Give "
                "the workers weights that say how much each value counts."
            )
        mine = slices[rank]
        terms = [(rooms[member][:numel][mine], weights[member] / total) for member in members if weights[member]]
        _weighted_sum(terms, out=means[rank])
        self._meet(others, key, weight)
        for member in members:
            piece[slices[member]].copy_(means[member])

    def _meet(self, others: list[int], key: int, weight: float) -> dict[int, float]:
        """Wait for the others at this point of the same all-reduce; returns their weights."""
        for other in others:
            self._shared.tell(other, key, _bits(weight))
        weights = {}
        for other in others:
            told, bits = self._shared.hear(other)
            if told != key:
                raise ProtocolError(
                    f"`AllReduce` got a vector of another form, or among other workers, from worker {other} than on "
                    f"worker {self._shared.rank}; it needs the same on all. Let all of them reduce the same."
                )
            weights[other] = struct.unpack("d", struct.pack("q", bits))[0]
        return weights

    def _open(self, members: tuple[int, ...]) -> None:
        """Get everybody's memory, and lend one's own to all of this host."""
        if self._shared.rank not in self._rooms:
            num_bytes = _PIECE_BYTES + _PIECE_BYTES // 2 + 8 * _ALIGNED
            self._rooms[self._shared.rank] = self._shared.lend(_NUMBER, num_bytes, lambda memory: None)
        for member in members:
            if member not in self._rooms:
                self._rooms[member] = self._shared.borrow(member, _NUMBER)


def _weighted_sum(terms: list[tuple[Tensor, float]], out: Tensor) -> None:
    """Add up some values with weights; of half precision the sum is rounded once."""
    half = out.dtype in (torch.float16, torch.bfloat16)
    total = torch.empty_like(out, dtype=torch.float32) if half else out
    (first, share), *others = terms
    torch.mul(first.to(total.dtype), share, out=total)
    for value, share in others:
        total.add_(value, alpha=share)
    if half:
        out.copy_(total)


def _bits(value: float) -> int:
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits
