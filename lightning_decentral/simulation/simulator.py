"""The simulator: any number of virtual workers in one process, on a virtual clock.

Events are kept in a heap; a worker's coroutine runs until it has to wait. The *driver* (a loop over
`Simulator.demands`) computes gradients and applies updates: tests pass a gradient to
`Simulator.run`, the Lightning strategy answers with its own batches. The same seed gives the same bits.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from lightning_decentral.conduct import COMMUNICATION, Conduct, UnderWay, require_no_ticket
from lightning_decentral.errors import ConfigurationError, DeadlockError, PeerLost
from lightning_decentral.flat import AbstractVector, Vector, mean_over, pack, unpack
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AbstractRequest,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    NeighborAverage,
    NeighborExchange,
    Receive,
    Send,
    Start,
    Steps,
    Ticket,
    Until,
    answered_at_once,
)
from lightning_decentral.simulation.cluster import Cluster, Traffic, all_reduce_bytes
from lightning_decentral.worker import Worker

_WAIT = object()  # a handler's answer that comes later, by an event
Demands = Generator[tuple["Gradient | LocalStep", Worker], "bool | None", None]


class _Ticket(Ticket[Any]):
    """Of something started; its task does not keep it, so that a ticket that nobody keeps is noticed."""

    __slots__ = ("task",)

    def __init__(self, task: _Task) -> None:
        self.task = task


_CHECKPOINTED = ("x", "state", "step", "version", "staleness", "snapshot_version")


class _Task:
    """A coroutine that runs for one worker: its steps, or something that it started.

    Attributes:
        started: whether it is something that the step started.
        under_way: what the conduct knows of it, or of what it waits for.
        average: what was started, if it is one; it replaces its value when the ticket is awaited.
    """

    __slots__ = (
        "answer",
        "average",
        "coroutine",
        "done",
        "pending",
        "since",
        "started",
        "under_way",
        "waiting",
        "worker",
    )

    def __init__(self, worker: Worker, coroutine: Steps[Any], started: bool = False) -> None:
        self.worker = worker
        self.coroutine = coroutine
        self.started = started
        self.average: NeighborAverage | None = None
        self.under_way: list[UnderWay] = []
        self.pending: AbstractRequest[Any] | None = None
        self.since = 0.0
        self.done = False
        self.answer: Any = None
        self.waiting: tuple[_Task, _Ticket] | None = None


@dataclass(slots=True)
class _Exchange:
    task: _Task
    missing: set[int]
    received: dict[int, AbstractVector]
    unsent: dict[int, AbstractVector]  # messages that wait until their receivers have asked for them
    sent_at: float


@dataclass(slots=True)
class SiteLink:
    """One direction of the link between a site and the others, which all workers of the site share.

    Attributes:
        free_at_seconds: the virtual second at which it will have carried all that was sent so far.
        num_bytes: what it has carried, or will have by then.
    """

    free_at_seconds: float = 0.0
    num_bytes: int = 0


class _Message(NamedTuple):
    source: int
    target: int
    num_bytes: int
    occupied: float  # seconds of the sender's uplink, and of the receiver's downlink
    paced: float  # seconds from its first byte to its last, which the slowest link on its way sets
    latency: float
    event: tuple[Callable[..., None], Any, Any]


class _Call:
    """A call and its answer, which may come at the same time, part by part."""

    __slots__ = ("in_parts", "missing", "peer", "reply", "task", "then")

    def __init__(self, task: _Task, request: Call, in_parts: bool) -> None:
        self.task = task
        self.peer = request.peer
        self.then = request.then
        self.in_parts = in_parts
        self.reply: AbstractVector | None = None
        self.missing = 1 + in_parts


class Simulator:
    """Virtual workers that run one algorithm.

    Args:
        algorithm: the method.
        start: every worker's parameters at the beginning: one vector per worker.
        cluster: how long computing and sending take.
        seed: of the workers' random numbers and the cluster's jitter.

    Attributes:
        workers: the virtual workers, by rank.
        traffic: what each of them sent and waited for, by rank.
        seconds: the virtual clock.
        site_uplinks: of the sites of the cluster, in their order; one, that carries nothing, if it names none.
        site_downlinks: likewise.

    Example:
        >>> import torch
        >>> from lightning_decentral.algorithms import DPSGD
        >>> simulator = Simulator(DPSGD(), [Vector([torch.full((3,), float(i))]) for i in range(4)])
        >>> def gradient(worker):  # of |x|^2 / 2
        ...     return worker.snapshot
        >>> simulator.run(gradient, learning_rate=0.1, steps=50)
        >>> bool(simulator.consensus().buffers[0].abs().max() < 0.01)
        True
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        start: Sequence[AbstractVector],
        cluster: Cluster | None = None,
        seed: int = 0,
    ) -> None:
        if not start:
            raise ConfigurationError("A simulation needs at least 1 worker, got 0.")
        self.cluster = cluster or Cluster()
        self.cluster.check_ranks(len(start))
        self.algorithm = algorithm.resolved(len(start))
        self._answers_calls = isinstance(self.algorithm, AbstractAsynchronousAlgorithm)
        self._jitter = random.Random(seed)
        self.seconds = 0.0
        self.workers: list[Worker] = []
        for rank, x in enumerate(start):
            worker = Worker(rank, len(start), x, x.clone() if self._answers_calls else x)
            worker.seed(seed)
            self.algorithm.init(worker)
            self.workers.append(worker)
        self.traffic = [Traffic() for _ in self.workers]
        n = len(self.workers)
        self._heap: list[tuple[float, int, Callable[..., None], Any, Any]] = []
        self._order = itertools.count()
        self._ready: deque[tuple[_Task, Any]] = deque()
        self._conduct = [Conduct(self.algorithm, worker) for worker in self.workers]
        self._up_free = [0.0] * n
        self._down_free = [0.0] * n
        self._sites = [self.cluster.site_of(rank) for rank in range(n)]
        self.site_uplinks = [SiteLink() for _ in self.cluster.sites or ((),)]
        self.site_downlinks = [SiteLink() for _ in self.cluster.sites or ((),)]
        self._lanes: list[deque[_Task]] = [deque() for _ in range(n)]  # what each worker started, in order
        self._arrived: list[dict[int, deque[AbstractVector]]] = [{} for _ in range(n)]
        self._exchanges: list[_Exchange | None] = [None] * n
        self._asked: list[Counter[int]] = [Counter() for _ in range(n)]  # how many messages each waits to send whom
        self._all_reduce: list[tuple[_Task, AllReduce]] = []
        self._demand: deque[tuple[_Task, Gradient | LocalStep]] = deque()
        self._steps: list[_Task | None] = [None] * n
        self._dead: set[int] = set()
        self._handlers: dict[type, Callable[[_Task, Any], Any]] = {
            Gradient: self._on_gradient,
            LocalStep: self._on_local_step,
            NeighborExchange: self._on_exchange,
            NeighborAverage: self._on_average,
            AllReduce: self._on_all_reduce,
            Call: self._on_call,
            Until: self._not_yet,
            Send: self._not_yet,
            Receive: self._not_yet,
            Start: self._on_start,
            Ticket: self._on_ticket,
        }
        for rank, second in self.cluster.failures.items():
            self._at(second, self._die, rank, None)

    # -- driving ------------------------------------------------------------------------------------------------------

    def demands(self, steps: int | None = None) -> Demands:
        """Run; yield each gradient that is due and each update to apply, in the order of the virtual clock.

        The driver computes the gradient at ``worker.snapshot`` (leaving it where ``worker.read_gradient`` finds it), or
        applies it to ``worker.x`` (or to the request's ``at``), and sends whether an update was made (``None`` counts
        as made).

        Args:
            steps: stop each worker after this many steps of its own in total; ``None``: go on for ever.

        Raises:
            DeadlockError: if nobody can go on; names who waits for what.
            PeerLost: if a worker waits for one that died.
        """
        try:
            yield from self._demands(steps)
        except Exception:  # nobody goes on from here: let none be collected that was started and never came to run
            started = itertools.chain((task for task, _ in self._ready), *self._lanes)
            for task in (*started, *filter(None, self._steps)):
                task.coroutine.close()
            raise

    def _demands(self, steps: int | None) -> Demands:
        for worker in self.workers:
            if worker.rank not in self._dead and self._steps[worker.rank] is None:
                self._begin_step(worker, steps)
        while True:
            while self._ready:
                task, answer = self._ready.popleft()
                self._advance(task, answer, steps)
            if self._demand:
                task, request = self._demand.popleft()
                worker = task.worker
                if worker.rank in self._dead:
                    continue
                if type(request) is LocalStep:
                    worker.staleness = worker.version - worker.snapshot_version
                answer = yield request, worker
                if type(request) is LocalStep:
                    worker.version += 1
                    self._ready.append((task, answer is not False))
                else:
                    self._conduct[worker.rank].gradient_is_there()
                    self._ready.append((task, None))
                continue
            if self._only_failures_ahead():
                break
            self.seconds, _, action, first, second = heapq.heappop(self._heap)
            action(first, second)
        blocked = [task for task in self._steps if task is not None and task.worker.rank not in self._dead]
        if blocked:
            raise DeadlockError(self._describe_deadlock(blocked))

    def run(
        self, gradient: Callable[[Worker], AbstractVector], learning_rate: float | Callable[[int], float], steps: int
    ) -> None:
        """Train with plain SGD.

        Args:
            gradient: the gradient at ``worker.snapshot``, for one worker.
            learning_rate: constant, or by the worker's own step.
            steps: how many steps each worker makes, in addition to those already made.
        """
        rate = learning_rate if callable(learning_rate) else lambda step: learning_rate
        gradients: dict[int, AbstractVector] = {}
        for worker in self.workers:
            worker.read_gradient = partial(gradients.__getitem__, worker.rank)
        goal = max(worker.step for worker in self.workers) + steps
        demands = self.demands(goal)
        for request, worker in demands:
            if isinstance(request, Gradient):
                value = gradient(worker)
                gradients[worker.rank] = value.clone() if value is worker.snapshot else value
            else:
                target = worker.x if request.at is None else request.at
                direction = worker.gradient if request.gradient is None else request.gradient
                target.add_(direction, alpha=-rate(worker.step))

    def consensus(self, leave_out: Collection[int] = ()) -> Vector:
        """The mean of the living workers' parameters, but for those left out."""
        return mean_over(self._living(leave_out))

    def consensus_distance(self) -> float:
        """``(1/n) sum_i ||x_i - mean||^2`` over the living workers."""
        mean = self.consensus()
        alive = self._living()
        return sum(x.squared_distance(mean) for x in alive) / len(alive)

    def _living(self, leave_out: Collection[int] = ()) -> list[Vector]:
        alive = [worker.x for worker in self.workers if worker.rank not in self._dead and worker.rank not in leave_out]
        values = [x for x in alive if isinstance(x, Vector)]
        if not values or len(values) < len(alive):
            raise ConfigurationError(
                "A mean over the workers needs at least 1 living worker, and vectors that have values, got "
                f"{len(values)} of {len(alive)}. Start the simulation from a `Vector` for each worker."
            )
        return values

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as plain tensors and Python values. Only between two runs.

        Raises:
            ConfigurationError: if a worker is in the middle of a step, or a message on its way.
            ProtocolError: if its algorithm keeps a ticket in ``worker.state``.
        """
        for worker in self.workers:
            require_no_ticket(self.algorithm, worker)
        busy = [worker.rank for worker in self.workers if worker.rank not in self._dead and self._steps[worker.rank]]
        unread = any(queue for arrived in self._arrived for queue in arrived.values())
        if busy or unread or self._ready or self._demand or not self._only_failures_ahead():
            raise ConfigurationError(
                f"A checkpoint of a simulation needs all workers at rest, got workers {busy} in the middle of a step, "
                "or a message on its way. Take it after `run` has returned, or `demands` has come to its end."
            )
        return {
            "seconds": self.seconds,
            "jitter": self._jitter.getstate(),
            "dead": sorted(self._dead),
            "links": (list(self._up_free), list(self._down_free)),
            "site_links": [[asdict(link) for link in links] for links in (self.site_uplinks, self.site_downlinks)],
            "traffic": [asdict(traffic) for traffic in self.traffic],
            "workers": [
                {name: pack(getattr(worker, name)) for name in _CHECKPOINTED} | {"rng": worker.rng.getstate()}
                for worker in self.workers
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; of a simulation of the same algorithm with as many workers and sites.

        Raises:
            ConfigurationError: if there are not as many.
        """
        if len(state["workers"]) != len(self.workers):
            raise ConfigurationError(
                f"The checkpoint is of {len(state['workers'])} workers, this simulation has {len(self.workers)}. "
                f"Make it with {len(state['workers'])} workers."
            )
        sites = len(state["site_links"][0])
        if sites != len(self.site_uplinks):
            raise ConfigurationError(
                f"The checkpoint is of a cluster of {sites} sites, this simulation has {len(self.site_uplinks)}. "
                f"Make it with {sites} sites."
            )
        self.seconds = state["seconds"]
        self._jitter.setstate(state["jitter"])
        self._dead = set(state["dead"])
        self._up_free, self._down_free = (list(free) for free in state["links"])
        self.site_uplinks, self.site_downlinks = ([SiteLink(**link) for link in links] for links in state["site_links"])
        self.traffic = [Traffic(**traffic) for traffic in state["traffic"]]
        self._heap = [event for event in self._heap if event[3] not in self._dead]  # only deaths, before the first step
        heapq.heapify(self._heap)
        for worker, saved in zip(self.workers, state["workers"], strict=True):
            device = worker.x.buffers[0].device if isinstance(worker.x, Vector) else torch.device("cpu")
            loaded = {name: unpack(saved[name], device) for name in _CHECKPOINTED}
            x = loaded.pop("x")
            assert isinstance(x, AbstractVector)
            worker.x.copy_(x)  # in place: a module's parameters may be views of it
            for name, value in loaded.items():
                setattr(worker, name, value)
            if self._answers_calls:
                worker.snapshot.copy_(worker.x)
            worker.rng.setstate(saved["rng"])

    # -- the coroutines -----------------------------------------------------------------------------------------------

    def _begin_step(self, worker: Worker, steps: int | None) -> None:
        if steps is not None and worker.step >= steps:
            self._steps[worker.rank] = None
            return
        if self._answers_calls:
            worker.snapshot.copy_(worker.x)
        worker.snapshot_version = worker.version
        self._conduct[worker.rank].begin()
        task = _Task(worker, self.algorithm.step(worker))
        self._steps[worker.rank] = task
        self._ready.append((task, None))

    def _advance(self, task: _Task, answer: Any, steps: int | None) -> None:
        rank = task.worker.rank
        if rank in self._dead:
            return
        conduct = self._conduct[rank]
        if task.pending is not None:
            if task is self._steps[rank] and type(task.pending) not in (Gradient, LocalStep):
                self.traffic[rank].exposed_seconds += self.seconds - task.since
            answer = self._answered(task, answer)
        send = task.coroutine.send
        handlers = self._handlers
        while True:
            try:
                request: Any = send(answer)
            except StopIteration as finished:
                self._finished(task, finished.value, steps)
                return
            if not task.started:
                conduct.ask(request)
                if self._lanes[rank] and isinstance(request, COMMUNICATION):
                    # What was started before comes first: exchanges keep the order in which they were asked for.
                    request = self._begin(task, request)
            elif task.average is None and task.under_way:  # a coroutine of the algorithm
                task.under_way.append(conduct.ask_inside(task.under_way[0], request))
            kind = Ticket if type(request) is _Ticket else type(request)
            answer = handlers[kind](task, request)
            if answer is _WAIT:
                task.pending = request
                task.since = self.seconds
                return
            answer = self._answered(task, answer, request)

    def _answered(self, task: _Task, answer: Any, request: Any = None) -> Any:
        """What a coroutine gets for what it has asked for."""
        request, task.pending = request or task.pending, None
        if len(task.under_way) > 1:
            self._conduct[task.worker.rank].answered_inside(task.under_way.pop())
        if type(request) is NeighborAverage and answer is not None:
            return request.apply(answer)
        return answer

    def _finished(self, task: _Task, value: Any, steps: int | None) -> None:
        worker = task.worker
        if not task.started:
            self._conduct[worker.rank].end()
            worker.step += 1
            self._begin_step(worker, steps)
            return
        task.done, task.answer = True, value
        if task.waiting is not None:
            waiting, ticket = task.waiting
            task.waiting = None
            self._ready.append((waiting, self._given(ticket)))
        lane = self._lanes[worker.rank]
        lane.popleft()
        if lane:
            self._ready.append((lane[0], None))

    def _on_gradient(self, task: _Task, request: Gradient) -> Any:
        seconds = self.cluster.gradient_seconds(task.worker.rank, self._jitter)
        self._at(self.seconds + seconds, self._demand_later, task, request)
        return _WAIT

    def _demand_later(self, task: _Task, request: Gradient) -> None:
        self._demand.append((task, request))

    def _on_local_step(self, task: _Task, request: LocalStep) -> Any:
        self._demand.append((task, request))
        return _WAIT

    def _on_start(self, task: _Task, request: Start[Any]) -> Any:
        work = request.work
        ticket = self._begin(task, work)
        under_way = self._conduct[task.worker.rank].begun(ticket, work)
        if not isinstance(work, AbstractRequest):
            ticket.task.under_way.append(under_way)
        return ticket

    def _begin(self, task: _Task, work: AbstractRequest[Any] | Steps[Any]) -> _Ticket:
        """Put something into the lane of a worker."""
        average = work if isinstance(work, NeighborAverage) else None
        if average is not None:
            work = average.exchange
        started = _Task(task.worker, _single(work) if isinstance(work, AbstractRequest) else work, started=True)
        started.average = average
        lane = self._lanes[task.worker.rank]
        lane.append(started)
        if len(lane) == 1:
            self._ready.append((started, None))
        return _Ticket(started)

    def _on_ticket(self, task: _Task, ticket: _Ticket) -> Any:
        if ticket.task.done:
            return self._given(ticket)
        ticket.task.waiting = task, ticket
        return _WAIT

    def _given(self, ticket: _Ticket) -> Any:
        """The answer behind a ticket, for who awaits it now."""
        started = ticket.task
        self._conduct[started.worker.rank].take(ticket)
        if started.average is not None:
            started.average.apply(started.answer)
            started.average = started.answer = None
        return started.answer

    # -- messages -----------------------------------------------------------------------------------------------------

    def _at(self, second: float, action: Callable[..., None], first: Any, second_argument: Any) -> None:
        heapq.heappush(self._heap, (second, next(self._order), action, first, second_argument))

    def _transmit(
        self, source: int, target: int, num_bytes: int, arrive: Callable[..., None], first: Any, second: Any
    ) -> float:
        """Send a message, that calls ``arrive(first, second)`` when it is there; return when its last byte has left."""
        traffic = self.traffic[source]
        traffic.bytes_sent += num_bytes
        traffic.messages += 1
        start = max(self.seconds, self._up_free[source])
        cluster = self.cluster
        occupied = cluster.link_seconds(num_bytes, source, target)
        if isinstance(first, _Call) and first.in_parts:
            paced = cluster.call_paced_seconds(num_bytes, source, target)
        else:
            paced = cluster.transfer_seconds(num_bytes, source, target)
        latency = cluster.message_latency_seconds(source, target)
        message = _Message(source, target, num_bytes, occupied, paced, latency, (arrive, first, second))
        self._up_free[source] = start + occupied
        forward = self._download if self._sites[source] == self._sites[target] else self._leave_site
        if start > self.seconds:  # the next link stays free for others until the first byte leaves
            self._at(start, forward, message, None)
        else:
            forward(message, None)
        return start + occupied

    def _leave_site(self, message: _Message, _: None) -> None:
        self._pass(self.site_uplinks[self._sites[message.source]], message, self._enter_site)

    def _enter_site(self, message: _Message, _: None) -> None:
        self._pass(self.site_downlinks[self._sites[message.target]], message, self._download)

    def _pass(self, link: SiteLink, message: _Message, forward: Callable[..., None]) -> None:
        """The first byte of a message has come to a link between sites; ``forward`` is called when it leaves it."""
        occupied = self.cluster.site_link_seconds(message.num_bytes)
        link.free_at_seconds = max(self.seconds, link.free_at_seconds) + occupied
        link.num_bytes += message.num_bytes
        # When the last byte has left, less the seconds that the message takes to pass. If a slower link feeds this one,
        # that is now: its bytes find room between those of other messages.
        self._at(max(self.seconds, link.free_at_seconds - message.paced), forward, message, None)

    def _download(self, message: _Message, _: None) -> None:
        begin = max(self.seconds, self._down_free[message.target])
        received = begin + message.occupied
        self._down_free[message.target] = received
        arrive, call, _ = message.event
        if arrive == self._answer and call.in_parts:  # its answer sets out when the first part is there
            self._at(begin + message.latency, self._begin_reply, call, message.num_bytes)
        self._at(max(received, self.seconds + message.paced) + message.latency, *message.event)

    def _on_exchange(self, task: _Task, request: NeighborExchange) -> Any:
        if not request.send_to and not request.receive_from:
            return {}
        rank = task.worker.rank
        workers = len(self.workers)
        # Each worker begins with its next rank. If all began with rank 0, its downlink would be the bottleneck, which
        # it is not on a network that shares its links between connections.
        targets = sorted(request.send_to, key=lambda target: (target - rank) % workers)
        for target in targets:
            self._check_alive(target, rank)
        received: dict[int, Any] = dict.fromkeys(request.receive_from)
        unsent = {target: request.value.clone() for target in targets}
        exchange = _Exchange(task, set(request.receive_from), received, unsent, self.seconds)
        self._exchanges[rank] = exchange
        if self.cluster.rendezvous:
            for source in request.receive_from:
                heard = self.seconds + self.cluster.message_latency_seconds(rank, source)
                self._at(heard, self._ask, source, rank)
        self._send(exchange)
        for source in request.receive_from:
            waiting = self._arrived[rank].get(source)
            if waiting:
                exchange.received[source] = waiting.popleft()
                exchange.missing.discard(source)
            else:
                self._check_alive(source, rank)
        self._complete_exchange(exchange)
        return _WAIT

    def _on_average(self, task: _Task, request: NeighborAverage) -> Any:
        return self._on_exchange(task, request.exchange) or None  # nobody to wait for, and nothing to average

    def _ask(self, source: int, target: int) -> None:
        """A worker has heard that another one waits for its next message."""
        self._asked[source][target] += 1
        # After what others ask for at the same time, so that it keeps its order of sending.
        self._at(self.seconds, self._send_asked, source, None)

    def _send_asked(self, rank: int, _: None) -> None:
        exchange = self._exchanges[rank]
        if exchange is not None:
            self._send(exchange)
            self._complete_exchange(exchange)

    def _send(self, exchange: _Exchange) -> None:
        """Send what was asked for, of an exchange; everything, if a message does not wait for that."""
        rank = exchange.task.worker.rank
        asked = self._asked[rank]
        for target in list(exchange.unsent):
            if self.cluster.rendezvous:
                if not asked[target]:
                    continue
                asked[target] -= 1
            value = exchange.unsent.pop(target)
            exchange.sent_at = self._transmit(rank, target, value.num_bytes, self._deliver, (rank, target), value)

    def _deliver(self, edge: tuple[int, int], value: AbstractVector) -> None:
        source, target = edge
        exchange = self._exchanges[target]
        if exchange is not None and source in exchange.missing:
            exchange.received[source] = value
            exchange.missing.discard(source)
            self._complete_exchange(exchange)
        else:
            self._arrived[target].setdefault(source, deque()).append(value)

    def _complete_exchange(self, exchange: _Exchange) -> None:
        rank = exchange.task.worker.rank
        if exchange.missing or exchange.unsent or self._exchanges[rank] is not exchange:
            return
        self._exchanges[rank] = None
        self.traffic[rank].exchanges += 1
        self._at(max(self.seconds, exchange.sent_at), self._resume, exchange.task, exchange.received)

    def _not_yet(self, task: _Task, request: AbstractRequest[Any]) -> Any:
        raise NotImplementedError(f"`{type(request).__name__}`")

    def _on_all_reduce(self, task: _Task, request: AllReduce) -> Any:
        if request.among is not None or request.weight != 1.0:
            self._not_yet(task, request)
        waiting = self._all_reduce
        waiting.append((task, request))
        workers = len(self.workers)
        if self._dead:
            self._check_alive(min(self._dead), task.worker.rank)
        if len(waiting) < workers:
            return _WAIT
        waiting.sort(key=lambda item: item[0].worker.rank)
        values = [item.value for _, item in waiting]
        weight = 1.0 / workers
        mean = values[0].clone().mix_(values[0], weight, [(value, weight) for value in values[1:]])
        done = self.seconds + self.cluster.all_reduce_seconds(mean.num_bytes, workers)
        for site, edges in enumerate(self.cluster.ring_edges_out_of_sites(workers)):
            self.site_uplinks[site].num_bytes += edges * all_reduce_bytes(mean.num_bytes, workers)
            self.site_downlinks[site].num_bytes += edges * all_reduce_bytes(mean.num_bytes, workers)
        for member, item in waiting:
            traffic = self.traffic[member.worker.rank]
            traffic.bytes_sent += all_reduce_bytes(mean.num_bytes, workers)
            traffic.messages += 1
            traffic.exchanges += 1
            self._at(done, self._resume, member, item.value.copy_(mean))
        waiting.clear()
        return _WAIT

    def _on_call(self, task: _Task, request: Call) -> Any:
        rank, peer = task.worker.rank, request.peer
        self._check_alive(peer, rank)
        assert isinstance(self.algorithm, AbstractAsynchronousAlgorithm)
        call = _Call(task, request, self.algorithm.answers_in_parts)
        leaves = self.seconds + self.cluster.call_wait_seconds(rank, peer)
        self._at(leaves, self._send_call, call, request.value.clone())
        return _WAIT

    def _send_call(self, call: _Call, value: AbstractVector) -> None:
        source = call.task.worker.rank
        if source not in self._dead:
            self._check_alive(call.peer, source)
            self._transmit(source, call.peer, value.num_bytes, self._answer, call, value)

    def _answer(self, call: _Call, theirs: AbstractVector) -> None:
        """All of a call is there."""
        source, peer = call.task.worker.rank, call.peer
        self._check_alive(peer, source)
        algorithm = self.algorithm
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        call.reply = answered_at_once(algorithm, self.workers[peer], source, theirs)
        self._conduct[peer].check_answer(source, call.reply)
        self.workers[peer].version += 1
        self.traffic[peer].calls_answered += 1
        if not call.in_parts:
            self._transmit(peer, source, call.reply.num_bytes, self._called, call, None)
        else:  # the answer to the last part is on its way back, if not held up by a slower link
            self._at(self.seconds + self.cluster.message_latency_seconds(peer, source), self._called, call, None)

    def _begin_reply(self, call: _Call, num_bytes: int) -> None:
        source = call.task.worker.rank
        self._check_alive(call.peer, source)
        self._transmit(call.peer, source, num_bytes, self._called, call, None)

    def _called(self, call: _Call, _: None) -> None:
        """The answer has come back; in parts: when the last byte has, and when the last part could have."""
        call.missing -= 1
        if call.missing:
            return
        self.traffic[call.task.worker.rank].exchanges += 1
        if call.then is not None and call.reply is not None:
            call.then(call.task.worker, call.reply)
            call.reply = None
        self._ready.append((call.task, call.reply))

    def _resume(self, task: _Task, answer: Any) -> None:
        self._ready.append((task, answer))

    # -- failures -----------------------------------------------------------------------------------------------------

    def _only_failures_ahead(self) -> bool:
        """Whether nothing is left to happen but deaths: these end a wait, but are no reason to let time pass."""
        if not self.cluster.failures:
            return not self._heap
        return all(event[2] == self._die for event in self._heap)

    def _die(self, rank: int, _: None) -> None:
        self._dead.add(rank)
        for exchange in self._exchanges:
            if exchange is not None and (rank in exchange.missing or rank in exchange.unsent):
                self._check_alive(rank, exchange.task.worker.rank)
        for task, _request in self._all_reduce:
            self._check_alive(rank, task.worker.rank)

    def _check_alive(self, peer: int, waiting: int) -> None:
        if peer in self._dead and waiting not in self._dead:
            raise PeerLost(
                f"Worker {waiting} waits for worker {peer}, which died after {self.cluster.failures[peer]} virtual "
                "seconds. Resume from a checkpoint, or leave the worker out of `Cluster(failures=...)`.",
                ranks=(peer,),
            )

    def _describe_deadlock(self, blocked: Sequence[_Task]) -> str:
        lines = [f"Nobody can go on at {self.seconds:.6g} virtual seconds:"]
        for task in blocked:
            request: AbstractRequest[Any] | None = task.pending
            while isinstance(request, _Ticket):
                request = request.task.pending
            rank = task.worker.rank
            if isinstance(request, (NeighborExchange, NeighborAverage)):
                exchange = self._exchanges[rank]
                what = f"messages from workers {sorted(exchange.missing) if exchange else []}"
                if exchange and exchange.unsent and not exchange.missing:
                    what = f"workers {sorted(exchange.unsent)} to ask for their messages"
            elif isinstance(request, AllReduce):
                there = {member.worker.rank for member, _ in self._all_reduce}
                missing = [other.rank for other in self.workers if other.rank not in there]
                what = f"workers {missing} to join an all-reduce"
            elif isinstance(request, Call):
                what = f"worker {request.peer} to answer its call"
            else:
                what = f"{request!r}"
            lines.append(f"  worker {rank}, step {task.worker.step}, waits for {what}")
        return "\n".join(lines)


async def _single(request: AbstractRequest[Any]) -> Any:
    return await request
