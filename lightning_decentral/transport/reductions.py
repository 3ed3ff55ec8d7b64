"""All-reduces on the connections that there are, so that any subset of the workers needs no set-up at all.

Each worker sends ``2 (m - 1) / m`` messages' bytes. A large vector goes round a ring: in ``2 (m - 1)`` turns, each of
which waits for a latency. A small one goes part by part from each to each, in two. A process group for each subset
would cost it connections, threads and a meeting; subsets may be drawn anew in every step.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError, ProtocolError
from lightning_decentral.flat import Vector
from lightning_decentral.traffic import DIRECT_BYTES
from lightning_decentral.transport.connections import AbstractConnections
from lightning_decentral.transport.headers import described, digest, empty_header, header_of, is_of

_AHEAD = 4  # messages of a ring that are asked for before they are needed: of two turns
_FIRST_TAG, _TAGS = 1 << 30, 1 << 28  # of the connections: two for each subset, for headers and bytes


def reduce_among(connections: AbstractConnections, value: Vector, among: tuple[int, ...], weight: float) -> None:
    """Replace a vector by its weighted mean over some workers, in its own precision; on the lane of each of them.

    Args:
        connections: of this worker.
        value: of the same form on all.
        among: these workers, in order; this one is among them.
        weight: of this worker's value.

    Raises:
        ProtocolError: if the forms are not equal, or all weights are 0.
    """
    others = tuple(rank for rank in among if rank != connections.rank)
    with connections.failures(others):
        share = weight / _total_weight(connections, value, among, weight)
        for buffer in value.buffers:
            if weight == 0:
                buffer.zero_()  # whatever it was
            else:
                buffer.mul_(share)  # first, or half precision would overflow
            if others:
                on_cpu = buffer if buffer.device.type == "cpu" else buffer.cpu()
                sum_among(on_cpu, connections.rank, among, connections.groups, connections.timeout)
                if on_cpu is not buffer:
                    buffer.copy_(on_cpu)


def _total_weight(connections: AbstractConnections, value: Vector, among: tuple[int, ...], weight: float) -> float:
    """Return the sum of all weights, of workers that have told each other that they do the same thing."""
    if connections.native:
        raise ConfigurationError(
            "`AllReduce` of some workers got workers that are connected by NCCL, and needs gloo. Pass "
            'process_group_backend="gloo" to the strategy.'
        )
    rank, (heads, _) = connections.rank, _tags(among)
    own = header_of(value, digest(among), _bits(weight))
    headers = {other: empty_header() for other in among if other != rank}
    works = [connections.groups[other < rank].recv([head], other, heads) for other, head in headers.items()]
    works += [connections.groups[rank < other].send([own], other, heads) for other in headers]
    for work in works:
        work.wait(connections.timeout)
    total = weight
    for other, header in headers.items():
        if not is_of(header, value, int(own[0]), int(header[1])):
            raise ProtocolError(
                f"`AllReduce` among workers {list(among)} got a vector of {described(header, 2).form} from worker "
                f"{other}; it needs one like that of worker {rank}: {value.form}. Let all of them reduce the same."
            )
        total += struct.unpack("d", struct.pack("q", int(header[1])))[0]
    if total == 0:
        raise ProtocolError(
            f"`AllReduce` among workers {list(among)} got weight 0 on all of them; it needs one above 0. Give the "
            "workers weights that say how much each value counts."
        )
    return total


def sum_among(buffer: Tensor, rank: int, among: tuple[int, ...], groups: Sequence[Any], timeout: timedelta) -> None:
    """Replace equal tensors by their sum, over some workers, in their own precision.

    Args:
        buffer: of this worker, in the memory of the CPU.
        rank: of this worker in the groups.
        among: who takes part, in order.
        groups: for what goes to a worker of a lower rank, and of a higher one.
        timeout: of each wait.
    """
    if buffer.nbytes > DIRECT_BYTES:
        _sum_in_ring(buffer, rank, among, groups, timeout)
    else:
        _sum_directly(buffer, rank, among, groups, timeout)


def _sum_directly(buffer: Tensor, rank: int, among: tuple[int, ...], groups: Sequence[Any], timeout: timedelta) -> None:
    """Replace equal tensors by their sum: each worker adds up one chunk of all, in float32 at least."""
    _, bodies = _tags(among)
    chunks = dict(zip(among, buffer.tensor_split(len(among)), strict=True))
    mine = chunks[rank]

    def swap(outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> None:
        works = [
            groups[other < rank].recv([incoming[other].view(torch.uint8)], other, bodies)
            for other in among
            if other != rank and incoming[other].numel()
        ]
        works += [
            groups[rank < other].send([outgoing[other].view(torch.uint8)], other, bodies)
            for other in among
            if other != rank and outgoing[other].numel()
        ]
        for work in works:
            work.wait(timeout)

    theirs = {other: torch.empty_like(mine) for other in among} | {rank: mine}
    swap(chunks, theirs)
    wide = torch.promote_types(mine.dtype, torch.float32)
    mine.copy_(torch.stack(list(theirs.values())).sum(0, dtype=wide))
    swap(dict.fromkeys(among, mine), chunks)


def _sum_in_ring(buffer: Tensor, rank: int, among: tuple[int, ...], groups: Sequence[Any], timeout: timedelta) -> None:
    """Replace equal tensors by their sum: each worker adds up one chunk of it, and all pass these on.

    A chunk is two halves, so that one is on its way while the other is added. gloo sends what it is asked for, and its
    own ring asks when it has got what came before: a latency there and back for each message. Here a worker asks for
    the messages of the next two turns ahead.
    """
    size, (_, bodies) = len(among), _tags(among)
    place, last = among.index(rank), 2 * (len(among) - 1) - 1
    right, left = among[(place + 1) % size], among[place - 1]
    halves = [chunk.tensor_split(2) for chunk in buffer.tensor_split(size)]
    turns = [(number, half) for number in range(last + 1) for half in (0, 1)]
    asked: deque[tuple[Tensor, Tensor, Any]] = deque()
    sent = []

    def ask(number: int, half: int) -> None:
        mine = halves[(place - number - 1) % size][half]
        # What this worker has sent of the chunk has come when its sum does, so the sum may come there.
        incoming = torch.empty_like(mine) if number < size - 1 else mine
        work = None
        if mine.numel():
            work = groups[left < rank].recv([incoming.view(torch.uint8)], left, bodies)
        asked.append((mine, incoming, work))

    def send(outgoing: Tensor) -> None:
        if outgoing.numel():
            sent.append(groups[rank < right].send([outgoing.view(torch.uint8)], right, bodies))

    for turn in turns[:_AHEAD]:
        ask(*turn)
    for half in halves[place]:
        send(half)
    for index, (number, _) in enumerate(turns):
        for turn in turns[index + _AHEAD : index + _AHEAD + 1]:
            ask(*turn)
        mine, incoming, work = asked.popleft()
        if work is not None:
            work.wait(timeout)
        if incoming is not mine:
            mine.add_(incoming)
        if number < last:
            send(mine)
    for work in sent:
        work.wait(timeout)


def _tags(among: tuple[int, ...]) -> tuple[int, int]:
    first = _FIRST_TAG + 2 * (digest(among) % _TAGS)
    return first, first + 1


def _bits(value: float) -> int:
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits
