"""Exchanges with neighbours: over TCP with workers of other hosts, through shared memory with those of this one."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lightning_decentral.flat import Vector
from lightning_decentral.protocol import NeighborAverage, NeighborExchange
from lightning_decentral.transport.connections import AbstractConnections
from lightning_decentral.transport.lanes import Pausing, finished

_LARGE = 1 << 20  # bytes of a vector that takes longer than what it waits for


@dataclasses.dataclass(slots=True, eq=False)
class _Exchange:
    """A `NeighborExchange` under way.

    Args:
        request: what is exchanged with whom.
        value: what is sent.
        average: what becomes of the answer, if the value is this model's parameters.
        index: the model's number.
        number: of what it is a part of, for the leases.
        received: the answer, by source.
        far: of it, what comes from other hosts.
        incoming: where that arrives: the same vectors, or pinned memory for those of a GPU.
        works: that end when the bytes have come and gone.
        sending: those to the targets whose turn it is: one of them, if what is sent is large.
        sends: begin to send to those that come after it, in turn.
    """

    request: NeighborExchange
    value: Vector
    average: NeighborAverage | None
    index: int
    number: int
    received: dict[int, Vector]
    far: dict[int, Vector] = dataclasses.field(default_factory=dict)
    incoming: dict[int, Vector] = dataclasses.field(default_factory=dict)
    works: list[Any] = dataclasses.field(default_factory=list)
    sending: list[Any] = dataclasses.field(default_factory=list)
    sends: list[Callable[[], list[Any]]] = dataclasses.field(default_factory=list)


class Exchanges:
    """Answers `NeighborExchange` and `NeighborAverage`.

    Args:
        connections: to the other workers.
    """

    def __init__(self, connections: AbstractConnections) -> None:
        self._links = connections
        self._stage = connections.device.type == "cuda" and not connections.native
        self._counting = threading.Lock()
        self._busy: Counter[int] = Counter()  # exchanges under way, by model

    def begin(
        self, request: NeighborExchange, index: int, average: NeighborAverage | None = None, number: int = 0
    ) -> Future[dict[int, Vector] | Vector]:
        """Begin a `NeighborExchange` of the ``index``-th model.

        Its answer is what was received; or, if the value is that model's parameters and ``average`` says what shall
        become of them, that average, where it needs no memory but what is there anyway.

        If nothing is under way, and the last exchange was waited for, the first bytes leave before this returns, as
        many as the connection takes at once: the lane would have to wait for Python's lock first, while the link is
        idle. Exchanges that end in time anyway are handed over by the lane, beside the gradient.

        Where cores are crowded this thread makes all of an exchange within the host; see `AbstractConnections.start`.
        """
        if self._links.crowded and self._links.idle and self._links.shared.peers.issuperset(_peers(request)):
            return self._links.start(self.work(request, index, average, number))
        if self._links.device.type == "cpu" and self._links.late and self._links.idle:
            exchange = self._post(request, index, average, number)
            return self._links.submit(lambda: self._complete(exchange))
        self._note_busy(index, 1)  # from now on, and not only when the lane comes to it

        def in_turn() -> dict[int, Vector] | Vector:
            exchange = self._post(request, index, average, number)
            self._note_busy(index, -1)
            return self._complete(exchange)

        return self._links.submit(in_turn)

    def work(
        self, request: NeighborExchange, index: int, average: NeighborAverage | None = None, number: int = 0
    ) -> Pausing[dict[int, Vector] | Vector]:
        """Answer a `NeighborExchange` of the ``index``-th model, as `begin` does."""
        exchange = self._post(request, index, average, number)
        answer = yield from self._answering(exchange)
        return answer

    def _note_busy(self, index: int, change: int) -> None:
        with self._counting:
            self._busy[index] += change

    def _post(self, request: NeighborExchange, index: int, average: NeighborAverage | None, number: int) -> _Exchange:
        """Hand gloo what goes to other hosts and comes from them; it moves the bytes on a thread of its own."""
        links = self._links
        self._note_busy(index, 1)
        value, near = request.value, links.shared.peers
        assert isinstance(value, Vector)
        received = {source: value if source in near else links.leases.new(value) for source in request.receive_from}
        exchange = _Exchange(request, value, average if links.device.type == "cpu" else None, index, number, received)
        if links.native:
            return exchange
        with links.failures(_peers(request)):
            stage = self._stage
            targets = [target for target in request.send_to if target not in near]
            outgoing = links.staged((index, "out"), value, stage, copy=True) if targets else value
            exchange.far = {source: vector for source, vector in received.items() if source not in near}
            for slot, (source, vector) in enumerate(exchange.far.items()):
                exchange.incoming[source] = links.staged((index, "stage", slot), vector, stage)
            works = exchange.works
            for source, vector in exchange.incoming.items():
                group = links.groups[source < links.rank]
                works += [group.recv([buffer.view(torch.uint8)], source, 0) for buffer in vector.buffers]
            turns = _in_turns(links.rank, links.world_size, targets)
            at_once = 1 if value.num_bytes >= _LARGE else len(turns)
            for target in turns[:at_once]:
                group = links.groups[links.rank < target]
                exchange.sending += [group.send([buffer.view(torch.uint8)], target, 0) for buffer in outgoing.buffers]
            exchange.sends = [partial(self._send, outgoing, target) for target in turns[at_once:]]
        return exchange

    def _send(self, value: Vector, target: int) -> list[Any]:
        group = self._links.groups[self._links.rank < target]
        return [group.send([buffer.view(torch.uint8)], target, 0) for buffer in value.buffers]

    def _complete(self, exchange: _Exchange) -> dict[int, Vector] | Vector:
        return finished(self._answering(exchange))

    def _answering(self, exchange: _Exchange) -> Pausing[dict[int, Vector] | Vector]:
        try:
            answer = yield from self._answer(exchange)
            return answer
        finally:
            self._note_busy(exchange.index, -1)

    def _answer(self, exchange: _Exchange) -> Pausing[dict[int, Vector] | Vector]:
        """Exchange with the workers of this host, wait for the others, and average."""
        links, peers = self._links, _peers(exchange.request)
        request, value, index, received = exchange.request, exchange.value, exchange.index, exchange.received
        if not peers:
            return {}
        near = links.shared.peers
        lies_there = exchange.average is not None and bool(near)
        memory = 2 * index + lies_there  # of the parameters, or of messages
        answer: dict[int, Vector] | Vector = received
        with links.failures(peers):
            if links.native:
                self._exchange_nccl(value, request, received)
                self.inspect(received, value, index, near=received)
            else:
                self._release(index)  # what came before in this step
                near_targets, near_sources = near.intersection(request.send_to), near.intersection(request.receive_from)
                if near_targets or lies_there:
                    if not lies_there:
                        yield partial(links.shared.is_free, memory)
                    links.shared.send(value, memory, near_targets, lies_there)
                yield partial(links.shared.has_come, near_sources, memory) if near.issuperset(peers) else None
                if lies_there:
                    yield partial(links.shared.is_free, memory)
                for source in near_sources:
                    shared = links.shared.receive(source, memory, value)
                    if self._stage:
                        received[source] = links.leases.new(value).copy_(shared)
                    elif exchange.average is not None:  # used at once
                        received[source] = shared
                    else:
                        received[source] = links.leases.borrow(shared, index, exchange.number)
                while exchange.sending:
                    for work in exchange.sending:
                        work.wait(links.timeout)
                    exchange.sending = exchange.sends.pop(0)() if exchange.sends else []
                for work in exchange.works:
                    work.wait(links.timeout)
                unstage(exchange.incoming, exchange.far)
                self.inspect(received, value, index, near_sources)
                if exchange.average is not None and (lies_there or received):
                    # What was received from another host has memory of its own, to which the average may go.
                    answer = links.shared.room(memory) if lies_there else next(iter(received.values()))
                    exchange.average.apply(received, into=answer)
                    self._release(index)
        links.count(value.num_bytes * len(request.send_to), len(request.send_to), exchanges=1)
        return answer

    def inspect(self, received: dict[int, Vector], value: Vector, index: int, near: Collection[int] = ()) -> None:
        """Put this worker's own value in the place of what is not finite, if that is refused.

        Args:
            received: by source.
            value: of this worker.
            index: of the model.
            near: sources that share what they have sent: it must not be written to.
        """
        if self._links.inspector is not None:
            for source, message in received.items():
                if not self._links.inspector.admits(message, source, index):
                    received[source] = (message.empty_like() if source in near else message).copy_(value)

    def release(self, index: int) -> None:
        """End a step of the ``index``-th model: what it has received, its senders need not keep any longer."""
        if not self._busy[index]:  # or the lane does it, with the next exchange
            self._release(index)

    def _release(self, index: int) -> None:
        self._links.leases.secure(index)
        self._links.shared.done(2 * index)
        self._links.shared.done(2 * index + 1)

    def _exchange_nccl(self, value: Vector, request: NeighborExchange, received: dict[int, Vector]) -> None:
        group = self._links.groups[0]
        operations = [
            dist.P2POp(dist.irecv, buffer, source, group) for source, v in received.items() for buffer in v.buffers
        ]
        operations += [
            dist.P2POp(dist.isend, buffer, target, group) for target in request.send_to for buffer in value.buffers
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        # The host waits too: a stream that waits for a lost peer can be neither interrupted nor named.
        done, deadline = torch.cuda.current_stream().record_event(), time.monotonic() + self._links.timeout_seconds
        while not done.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"The exchange was not done after {self._links.timeout_seconds} s.")
            time.sleep(1e-4)


def _in_turns(rank: int, world_size: int, targets: Sequence[int]) -> list[int]:
    """Put those to whom something large is sent into an order in which no two workers send to one at a time.

    On a ring all send to their right, and then all to their left: each link, out of a host and into one, has one
    message at a time. With both at once two that go into one host share its link, while those that sent them wait.
    """
    return sorted(targets, key=lambda target: (target - rank) % world_size)


def _peers(request: NeighborExchange) -> tuple[int, ...]:
    """Name who takes part."""
    return (*request.receive_from, *request.send_to)


def unstage(staged: dict[int, Vector], vectors: dict[int, Vector]) -> None:
    """Copy what arrived in staging buffers to where it belongs."""
    for source, vector in vectors.items():
        if staged[source] is not vector:
            vector.copy_(staged[source])
