"""What the links between the hosts of a run can carry: measured in about a second, before a method is chosen.

One worker of each host takes part, the one with the smallest rank: the others share its link.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.transport import shared_memory
from lightning_decentral.transport.communicator import Communicator

_FIRST_BYTES, _MOST_BYTES = 1 << 18, 1 << 28  # of a message by which a rate is measured
_PINGS = 3  # and one before, which opens the connection
_TAG = 1 << 20  # of gloo: no exchange has it


@dataclass(frozen=True)
class Links:
    """What was measured.

    Attributes:
        hosts: the ranks of each host, in order of their first ones.
        latency_seconds: one way, between two hosts, by their places in `hosts`: ``latency_seconds[a][b]`` with a < b.
        bytes_per_second: by host, what it sends to the next one while all do so; empty with one host.
    """

    hosts: tuple[tuple[int, ...], ...]
    latency_seconds: tuple[tuple[float, ...], ...]
    bytes_per_second: tuple[float, ...]


def measure_links(communicator: Communicator, seconds: float = 1.0) -> Links:
    """Measure the links between hosts: latencies of all pairs, and rates around the ring of hosts.

    Args:
        communicator: of this worker, with nothing under way. All workers together.
        seconds: how long to look for the rates, about; latencies take a few round trips for each other host.

    Returns:
        The same on all workers.

    Raises:
        PeerLost: if a worker is lost meanwhile.
    """
    names = [name.decode() for name in communicator.gather(shared_memory.host_name().encode())]
    hosts = tuple(tuple(rank for rank, other in enumerate(names) if other == name) for name in dict.fromkeys(names))
    leaders = [ranks[0] for ranks in hosts]
    if len(hosts) == 1:
        return Links(hosts, ((0.0,),), ())
    place = leaders.index(communicator.rank) if communicator.rank in leaders else None
    pings: dict[int, float] = {}
    for first, second in _rounds(len(hosts)):
        if place in (first, second):
            other = second if place == first else first
            pings[other] = _ping(communicator, leaders[other], place == first)
    rate, size = 0.0, _FIRST_BYTES
    while True:
        communicator.barrier("a measurement of links")  # all begin together
        spent = 0.0 if place is None else _around(communicator, leaders, place, size)
        rate = size / spent if spent else 0.0
        slowest = communicator.agree(spent, "max", "a measurement of links")
        if slowest > seconds / 4 or size >= _MOST_BYTES:
            break
        size *= 2 if slowest > seconds / 16 else 4
    told = [json.loads(each) for each in communicator.gather(json.dumps([rate, sorted(pings.items())]).encode())]
    table = [dict(told[leader][1]) for leader in leaders]
    latencies = tuple(
        tuple(table[a].get(b, 0.0) / 2 if a < b else table[b].get(a, 0.0) / 2 for b in range(len(hosts)))
        for a in range(len(hosts))
    )
    return Links(hosts, latencies, tuple(told[leader][0] for leader in leaders))


def _rounds(count: int) -> list[tuple[int, int]]:
    """List all pairs, in an order in which those that follow each other can be measured at the same time."""
    even = count + count % 2
    pairs = []
    for turn in range(even - 1):
        circle = [0, *((turn + shift) % (even - 1) + 1 for shift in range(even - 1))]
        both = ((circle[i], circle[even - 1 - i]) for i in range(even // 2))
        pairs += [(min(pair), max(pair)) for pair in both if max(pair) < count]
    return pairs


def _ping(communicator: Communicator, other: int, begins: bool) -> float:
    """Return the seconds of a round trip, if this worker begins it."""
    byte = torch.zeros(1, dtype=torch.uint8, device=communicator.meeting_device)
    spent = []
    with communicator.failures((other,)):
        for _ in range(1 + _PINGS):
            began = time.perf_counter()
            for sends in (begins, not begins):
                _move(communicator, [(byte, other)] if sends else [], [] if sends else [(byte, other)])
            spent.append(time.perf_counter() - began)
    return median(spent[1:])


def _around(communicator: Communicator, leaders: list[int], place: int, size: int) -> float:
    """Send to the next host and receive from the one before; return the seconds until both are done."""
    device = communicator.meeting_device
    sent, received = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    following, before = leaders[(place + 1) % len(leaders)], leaders[place - 1]
    with communicator.failures((following, before)):
        began = time.perf_counter()
        _move(communicator, [(sent, following)], [(received, before)])
        return time.perf_counter() - began


def _move(communicator: Communicator, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> None:
    """Wait until this is sent and that is received."""
    rank, groups = communicator.rank, communicator.groups
    if communicator.native:  # in one group, begun together: two that wait for each other would never end
        operations = [dist.P2POp(dist.irecv, tensor, peer, groups[2]) for tensor, peer in receives]
        operations += [dist.P2POp(dist.isend, tensor, peer, groups[2]) for tensor, peer in sends]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        torch.cuda.synchronize(communicator.device)
        return
    works = [groups[peer < rank].recv([tensor], peer, _TAG) for tensor, peer in receives]
    works += [groups[rank < peer].send([tensor], peer, _TAG) for tensor, peer in sends]
    for work in works:
        work.wait(communicator.timeout)
