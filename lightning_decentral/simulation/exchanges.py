"""What exchanges mean among virtual workers: who is matched with whom, what it costs, and what each one gets."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from lightning_decentral.errors import ProtocolError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AllReduce, NeighborAverage, NeighborExchange, Receive, Send
from lightning_decentral.simulation.links import Links
from lightning_decentral.simulation.tasks import WAIT, Fleet, Task
from lightning_decentral.traffic import all_reduce_bytes

Mailbox = tuple[int, int]
"""A sender, and a tag."""


@dataclass(slots=True)
class _Exchange:
    task: Task
    missing: set[int]
    received: dict[int, AbstractVector]
    value: AbstractVector  # a copy, which all receivers share: nobody changes what was received
    num_bytes: int
    unsent: list[int]  # whose messages wait until they have asked for them
    sent_at: float


class Exchanges:
    """Answers `NeighborExchange`, `NeighborAverage`, `AllReduce`, `Send` and `Receive`."""

    def __init__(self, fleet: Fleet, links: Links) -> None:
        n = len(fleet.workers)
        self._fleet = fleet
        self._clock = fleet.clock
        self._cluster = fleet.cluster
        self._links = links
        self._arrived: list[dict[int, deque[AbstractVector]]] = [{} for _ in range(n)]
        self._exchanges: list[_Exchange | None] = [None] * n
        self._asked: list[Counter[int]] = [Counter() for _ in range(n)]  # how many messages each waits to send whom
        self._about_to_send: set[int] = set()  # who answers, at this very time, what others have asked for
        self._all_reduces: dict[tuple[int, ...], list[tuple[Task, AllReduce]]] = {}
        self._mail: list[dict[Mailbox, deque[AbstractVector]]] = [{} for _ in range(n)]
        self._receiving: list[dict[Mailbox, deque[tuple[Task, Receive]]]] = [{} for _ in range(n)]

    # -- neighbours ---------------------------------------------------------------------------------------------------

    def exchange(self, task: Task, request: NeighborExchange) -> Any:
        """Answer a `NeighborExchange`."""
        if not request.send_to and not request.receive_from:
            return {}
        fleet, clock = self._fleet, self._clock
        rank = task.worker.rank
        workers = len(fleet.workers)
        # Each worker begins with its next rank. If all began with rank 0, its downlink would be the bottleneck, which
        # it is not on a network that shares its links between connections.
        targets = sorted(request.send_to, key=lambda target: (target - rank) % workers)
        for target in targets:
            fleet.check_alive(target, rank)
        received: dict[int, Any] = dict.fromkeys(request.receive_from)
        value = request.value.clone()
        exchange = _Exchange(task, set(request.receive_from), received, value, value.num_bytes, targets, clock.seconds)
        self._exchanges[rank] = exchange
        if self._cluster.rendezvous:
            for source in request.receive_from:
                heard = clock.seconds + self._cluster.message_latency_seconds(rank, source)
                clock.at(heard, self._ask, source, rank)
        self._send(exchange)
        for source in request.receive_from:
            waiting = self._arrived[rank].get(source)
            if waiting:
                exchange.received[source] = waiting.popleft()
                exchange.missing.discard(source)
            else:
                fleet.check_alive(source, rank)
        self._complete(exchange)
        return WAIT

    def average(self, task: Task, request: NeighborAverage) -> Any:
        """Answer a `NeighborAverage`."""
        return self.exchange(task, request.exchange) or None  # nobody to wait for, and nothing to average

    def _ask(self, source: int, target: int) -> None:
        """Learn that a worker has heard that another one waits for its next message."""
        self._asked[source][target] += 1
        # After what others ask for at the same time, so that it keeps its order of sending.
        if source not in self._about_to_send:
            self._about_to_send.add(source)
            self._clock.at(self._clock.seconds, self._send_asked, source, None)

    def _send_asked(self, rank: int, _: None) -> None:
        self._about_to_send.discard(rank)
        exchange = self._exchanges[rank]
        if exchange is not None:
            self._send(exchange)
            self._complete(exchange)

    def _send(self, exchange: _Exchange) -> None:
        """Send what was asked for, of an exchange; everything, if a message does not wait for that."""
        rank = exchange.task.worker.rank
        asked, rendezvous, transmit = self._asked[rank], self._cluster.rendezvous, self._links.transmit
        value, num_bytes, unasked = exchange.value, exchange.num_bytes, []
        for target in exchange.unsent:
            if rendezvous:
                if not asked[target]:
                    unasked.append(target)
                    continue
                asked[target] -= 1
            exchange.sent_at = transmit(rank, target, num_bytes, self._deliver, (rank, target), value)
        exchange.unsent = unasked

    def _deliver(self, edge: tuple[int, int], value: AbstractVector) -> None:
        source, target = edge
        exchange = self._exchanges[target]
        if exchange is not None and source in exchange.missing:
            exchange.received[source] = value
            exchange.missing.discard(source)
            self._complete(exchange)
        else:
            self._arrived[target].setdefault(source, deque()).append(value)

    def _complete(self, exchange: _Exchange) -> None:
        rank = exchange.task.worker.rank
        if exchange.missing or exchange.unsent or self._exchanges[rank] is not exchange:
            return
        self._exchanges[rank] = None
        self._fleet.traffic[rank].exchanges += 1
        done = max(self._clock.seconds, exchange.sent_at)
        self._clock.at(done, self._fleet.resume, exchange.task, exchange.received)

    # -- all together -------------------------------------------------------------------------------------------------

    def all_reduce(self, task: Task, request: AllReduce) -> Any:
        """Answer an `AllReduce`."""
        fleet, rank = self._fleet, task.worker.rank
        among = tuple(range(len(fleet.workers))) if request.among is None else tuple(sorted(request.among))
        waiting = self._all_reduces.setdefault(among, [])
        waiting.append((task, request))
        for lost in sorted(fleet.dead.intersection(among)):
            fleet.check_alive(lost, rank)
        if len(waiting) < len(among):
            return WAIT
        waiting.sort(key=lambda item: item[0].worker.rank)
        total = sum(item.weight for _, item in waiting)
        terms = [(item.value, item.weight / total) for _, item in waiting if item.weight] if total else []
        if not terms:
            raise ProtocolError(
                f"{type(fleet.algorithm).__name__} got, in step {task.worker.step} of worker {rank}, `AllReduce` among "
                f"workers {list(among)} with weight 0 on all of them; it needs one above 0. Give the workers weights "
                "that say how much each value counts."
            )
        own, own_weight = terms[0]
        mean = own.clone().mix_(own, own_weight, terms[1:])
        clock, num_bytes = self._clock, all_reduce_bytes(mean.num_bytes, len(among))
        done = clock.seconds + self._cluster.all_reduce_seconds(mean.num_bytes, among)
        self._links.count_between_sites(self._cluster.bytes_out_of_sites(mean.num_bytes, among))
        for member, item in waiting:
            traffic = fleet.traffic[member.worker.rank]
            traffic.bytes_sent += num_bytes
            traffic.messages += 1
            traffic.exchanges += 1
            clock.at(done, fleet.resume, member, item.value.copy_(mean))
        waiting.clear()
        return WAIT

    # -- one way ------------------------------------------------------------------------------------------------------

    def send(self, task: Task, request: Send) -> Any:
        """Answer a `Send`: its header travels first, as that of a call, so that its receiver has memory for it."""
        rank, to = task.worker.rank, request.to
        if to in self._fleet.dead and self._fleet.algorithm.tolerates_loss:
            return None
        self._fleet.check_alive(to, rank)
        leaves = self._clock.seconds + self._cluster.call_wait_seconds(rank, to)
        self._clock.at(leaves, self._send_mail, (task, request), request.value.clone())
        return WAIT

    def _send_mail(self, sent: tuple[Task, Send], value: AbstractVector) -> None:
        task, request = sent
        rank = task.worker.rank
        if rank in self._fleet.dead:
            return
        edge = ((rank, request.tag), request.to)
        sent_at = self._links.transmit(rank, request.to, value.num_bytes, self._deliver_mail, edge, value)
        self._clock.at(sent_at, self._fleet.resume, task, None)

    def _deliver_mail(self, edge: tuple[Mailbox, int], value: AbstractVector) -> None:
        box, target = edge
        waiting = self._receiving[target].get(box)
        if waiting:
            task, request = waiting.popleft()
            self._fleet.conduct[target].check_received(request, value)
            self._fleet.resume(task, value)
        else:
            self._mail[target].setdefault(box, deque()).append(value)

    def receive(self, task: Task, request: Receive) -> Any:
        """Answer a `Receive`."""
        rank, box = task.worker.rank, (request.source, request.tag)
        mail = self._mail[rank].get(box)
        if mail:
            value = mail.popleft()
            self._fleet.conduct[rank].check_received(request, value)
            return value
        self._fleet.check_alive(request.source, rank)
        self._receiving[rank].setdefault(box, deque()).append((task, request))
        return WAIT

    # -- failures and rest --------------------------------------------------------------------------------------------

    def lose(self, rank: int) -> None:
        """Learn that a worker has died.

        Raises:
            PeerLost: if another one waits for it.
        """
        check = self._fleet.check_alive
        for exchange in self._exchanges:
            if exchange is not None and (rank in exchange.missing or rank in exchange.unsent):
                check(rank, exchange.task.worker.rank)
        for among, waiting in self._all_reduces.items():
            for task, _ in waiting if rank in among else ():
                check(rank, task.worker.rank)
        for receiver, boxes in enumerate(self._receiving):
            if any(waiting and source == rank for (source, _), waiting in boxes.items()):
                check(rank, receiver)

    def unread(self) -> str:
        """Tell what has arrived that nobody has asked for, in words; empty if there is nothing."""
        for rank, (arrived, mail) in enumerate(zip(self._arrived, self._mail, strict=True)):
            for source, messages in arrived.items():
                if messages:
                    return f"a message of worker {source} that worker {rank} has not received"
            for (source, tag), sent in mail.items():
                if sent:
                    return f"a vector sent by worker {source} with tag {tag} that worker {rank} has not received"
        return ""

    def forget(self) -> None:
        """Drop what has arrived: it belongs to a past that is given up."""
        for arrived, mail in zip(self._arrived, self._mail, strict=True):
            arrived.clear()
            mail.clear()

    def described(self, task: Task) -> str:
        """Tell what a task waits for, if it is an exchange."""
        rank, request = task.worker.rank, task.waits_for
        if isinstance(request, NeighborExchange | NeighborAverage):
            exchange = self._exchanges[rank]
            if exchange and exchange.unsent and not exchange.missing:
                return f"workers {sorted(exchange.unsent)} to ask for their messages"
            return f"messages from workers {sorted(exchange.missing) if exchange else []}"
        if isinstance(request, AllReduce):
            among = range(len(self._fleet.workers)) if request.among is None else sorted(request.among)
            there = {member.worker.rank for member, _ in self._all_reduces.get(tuple(among), ())}
            return f"workers {[other for other in among if other not in there]} to join an all-reduce"
        if isinstance(request, Receive):
            return f"a vector from worker {request.source} with tag {request.tag}"
        return f"{request!r}"
