"""Driving the coroutines of one algorithm on a real worker.

What an algorithm asks for is begun by the thread that drives the step, and ends on the communicator's lane; the step
stops where the training loop has to compute the gradient or to apply the update.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from lightning_decentral.conduct import Conduct, UnderWay, described
from lightning_decentral.engine.monitor import Monitor
from lightning_decentral.errors import DeadlockError
from lightning_decentral.flat import AbstractVector, FlatParameters, Vector
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
)
from lightning_decentral.transport.answers import AbstractCallee
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.standstill import Waiting
from lightning_decentral.worker import Worker

_PROBED_FIRST, _PROBED_EVERY = 8, 64  # steps in which changes are looked for that autograd does not count
_REDUCE_CHUNK = 1 << 23  # elements of half precision that are reduced in float32 at a time


_POLL_SECONDS = 0.1
_STOP = object()  # a handler's answer that the training loop has to give
_NOTHING: Future[Any] = Future()  # an answer that was used
_NOTHING.set_result(None)


class _FutureTicket(Ticket[Any]):
    __slots__ = ("future", "work")

    def __init__(self, work: AbstractRequest[Any] | Steps[Any]) -> None:
        self.future: Future[Any] = Future()
        self.work: AbstractRequest[Any] | Steps[Any] | None = work  # none once it is an average that was applied


@dataclasses.dataclass(slots=True, eq=False)
class _Update:
    """An update that an answer asks for.

    Args:
        request: what is asked for.
        made: whether it is over.
        updated: whether an update was made.
    """

    request: LocalStep
    made: bool = False
    updated: bool = False


class Program:
    """Runs the steps of one algorithm on one worker.

    Args:
        algorithm: resolved for this world size.
        worker: what it sees.
        monitor: held while its code runs.
        flat: the parameters.
        communicator: moves the vectors.
        callee: the model that calls are about.

    Attributes:
        conduct: refuses what the protocol forbids.
        reached: what the training loop has to do; none outside a step, and once it has nothing more to do in it.
        stays: whether the parameters stay where they are when they become an average: others know where they lie.
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        worker: Worker,
        monitor: Monitor,
        flat: FlatParameters,
        communicator: Communicator,
        callee: AbstractCallee,
    ) -> None:
        self.conduct = Conduct(algorithm, worker)
        self.reached: AbstractRequest[Any] | None = None
        self.stays = False
        self._algorithm, self._worker, self._monitor = algorithm, worker, monitor
        self._flat, self._communicator, self._callee = flat, communicator, callee
        self._index = callee.index
        self._trains = algorithm.trains(worker.rank)
        self._coroutine: Steps[None] | None = None
        self._until_when: Until | None = None  # what the step waits for, in `Until`
        self._updates: deque[_Update] = deque()  # that answers ask for
        self._lent: _Update | None = None  # that the training loop makes now
        communicator.standstill.trains = self._trains
        self.handlers: dict[type, Callable[[Any], Any]] = {
            Gradient: self._stop_at,
            LocalStep: self._stop_at,
            NeighborExchange: self._answer,
            NeighborAverage: self._answer,
            AllReduce: self._answer,
            Call: self._answer,
            Until: self._until,
            Send: self._answer,
            Receive: self._answer,
            Start: self._start,
            Ticket: self._take,
        }
        self._performers: dict[type, Callable[[Any, int], Any]] = {
            NeighborExchange: self._exchange,
            NeighborAverage: self._average,
            AllReduce: self._all_reduce,
            Call: self._call,
            Send: self._send,
            Receive: self._receive,
        }

    @property
    def active(self) -> bool:
        """Whether a step has begun and not finished."""
        return self._coroutine is not None

    def begin(self) -> None:
        """Begin a step, and run it until the training loop has something to do."""
        self._communicator.standstill.ended = False
        self.conduct.begin()
        self._coroutine = self._algorithm.step(self._worker)
        self.advance(None)
        if self.reached is None and self._trains:
            self.conduct.end()  # refuses a step without a gradient

    def rest(self) -> None:
        """Bring to an end what is under way, as the algorithm says."""
        coroutine, answer = self._algorithm.rest(self._worker), None
        while True:
            try:
                with self._monitor:
                    request: Any = coroutine.send(answer)
            except StopIteration:
                return
            self.conduct.ask_resting(request)
            answer = self.handlers[Ticket if isinstance(request, Ticket) else type(request)](request)

    def end(self) -> None:
        """The step is over."""
        self.conduct.end()
        self._coroutine = None
        self._communicator.exchanges.release(self._index)

    def abandon(self) -> None:
        """Drop a step that has begun. All workers, with nothing under way."""
        if self._coroutine is not None:
            self._coroutine.close()
            self._coroutine, self.reached = None, None
            self._communicator.exchanges.release(self._index)

    def advance(self, answer: Any) -> None:
        """Run the step until it asks for what the training loop has to do; or to its end."""
        assert self._coroutine is not None
        if self._lent is not None:
            answer = self._give_back(answer)
            if answer is _STOP:
                return
        while True:
            try:
                with self._monitor:
                    request = self._coroutine.send(answer)
            except StopIteration:
                self.reached = None
                return
            answer = None  # or what was received would stay in use while the next exchange receives
            self.conduct.ask(request)
            began = time.perf_counter()
            answer = self.handlers[Ticket if isinstance(request, Ticket) else type(request)](request)
            if answer is _STOP:
                return
            self._communicator.traffic.exposed_seconds += time.perf_counter() - began

    def _stop_at(self, request: Gradient | LocalStep) -> Any:
        self.reached = request
        return _STOP

    def _start(self, request: Start[Any]) -> _FutureTicket:
        ticket = _FutureTicket(request.work)
        self._submit(ticket, self.conduct.begun(ticket, request.work))
        return ticket

    def _answer(self, request: AbstractRequest[Any]) -> Any:
        ticket = _FutureTicket(request)
        self._submit(ticket, None)
        return self._take(ticket)

    def _submit(self, ticket: _FutureTicket, under_way: UnderWay | None) -> None:
        """Begin a request, or a coroutine of requests."""
        work = ticket.work
        number = self._communicator.leases.submitted(self._index)
        if isinstance(work, NeighborExchange):
            ticket.future = self._communicator.exchanges.begin(work, self._index, None, number)
        elif isinstance(work, NeighborAverage):
            own = work.exchange.value is self._callee.x and not self.stays
            ticket.future = self._communicator.exchanges.begin(
                work.exchange, self._index, work if own else None, number
            )
        elif isinstance(work, AbstractRequest):
            ticket.future = self._communicator.submit(partial(self._performers[type(work)], work, number))
        elif work is not None and under_way is not None:
            ticket.future = self._communicator.submit(partial(self._run, work, under_way, number))

    def _take(self, ticket: _FutureTicket) -> Any:
        """Wait for an answer; an average becomes the value now."""
        standstill = self._communicator.standstill
        standstill.on_lane = True
        answer = self._communicator.wait(ticket.future)
        standstill.on_lane = False
        self.conduct.take(ticket)
        if not isinstance(ticket.work, NeighborAverage):
            return answer
        average, ticket.work, ticket.future = ticket.work, None, _NOTHING
        if isinstance(answer, Vector):  # the average of the parameters
            self._flat.swap(self._callee.x, answer)
        else:
            average.apply(answer)
        return None

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _until(self, request: Until) -> Any:
        """Wait in the step; or stop for an update that an answer asks for, and go on waiting after it."""
        worker, what = self._worker, described(request.condition)
        with self._monitor:
            if request.condition():
                return True
            with self._waiting("step", f", step {worker.step}, waits for its `Until`: {what}") as waiting:
                while True:
                    if self._updates and self.conduct.lend_update():
                        self._until_when, self._lent = request, self._updates.popleft()
                        self.reached = self._lent.request
                        return _STOP
                    if waiting.told:
                        self.conduct.told()
                        return False
                    self._wait(waiting)
                    if request.condition():
                        return True

    def _give_back(self, updated: bool) -> Any:
        """The update that was lent to an answer is made: the step goes on waiting."""
        update, request = self._lent, self._until_when
        assert update is not None
        assert request is not None
        self._lent = self._until_when = self.reached = None
        with self._monitor:
            update.made, update.updated = True, updated
        return self._until(request)

    @contextmanager
    def _waiting(
        self, kind: Literal["step", "answer"], what: str, call: tuple[int, int] | None = None
    ) -> Iterator[Waiting]:
        if self._communicator.watch is None:
            raise DeadlockError(f"Nobody can go on:\n  worker {self._worker.rank}{what}")
        waiting = Waiting(kind, what, lambda: self._monitor.turns, self._monitor.wake, call)
        self._monitor.end_turn()
        with self._communicator.standstill.waiting(waiting):
            yield waiting

    def _wait(self, waiting: Waiting) -> None:
        """Wait until something has run on this worker, or somebody was lost; called in the monitor."""
        waiting.seen = self._monitor.turns
        self._monitor.wait(_POLL_SECONDS)
        self._communicator.check_waiting(waiting.since)
        self._callee.note_answers()

    # -- calls of others ----------------------------------------------------------------------------------------------

    def answer(self, source: int, number: int, theirs: Vector, waits: Callable[[], None]) -> Vector:
        """Answer a call, in its time; on the thread of its edge."""
        algorithm, told, answer = self._algorithm, False, None
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        reply: AbstractVector
        coroutine = algorithm.on_call(self._worker, source, theirs)
        waited = False
        with self._monitor:
            while True:
                try:
                    request = coroutine.send(answer)
                except StopIteration as finished:
                    reply = finished.value
                    break
                self.conduct.ask_answering(source, request, told)
                if isinstance(request, Until) and request.condition():
                    answer = True
                    continue
                if not waited:
                    waited = True
                    waits()
                if isinstance(request, Until):
                    answer = self._answer_until(request, source, number)
                    told = told or not answer
                else:
                    answer = self._answer_update(request, source, number)
            if reply is theirs:
                return theirs  # changed in place, or as it came
            self.conduct.check_answer(source, reply)
            assert isinstance(reply, Vector)
            return reply.clone()  # as it is now: calls and updates change the worker while it is sent

    def _answer_until(self, request: Until, source: int, number: int) -> bool:
        what = f", in its answer to worker {source}, waits for its `Until`: {described(request.condition)}"
        with self._waiting("answer", what, (source, number)) as waiting:
            while not request.condition():
                if waiting.told:
                    return False
                self._wait(waiting)
        return True

    def _answer_update(self, request: LocalStep, source: int, number: int) -> bool:
        """Let the worker's own step make an update, when it waits and has made none."""
        update = _Update(request)
        self._updates.append(update)
        what = f", in its answer to worker {source}, waits for an update that its own step makes"
        with self._waiting("answer", what, (source, number)) as waiting:
            while not update.made:
                waiting.told = False  # there is nothing to be told
                self._wait(waiting)
        return update.updated

    # -- on the lane --------------------------------------------------------------------------------------------------

    def _run(self, coroutine: Steps[Any], started: UnderWay, number: int) -> Any:
        """Run a started coroutine."""
        answer: Any = None
        while True:
            try:
                with self._monitor:
                    request = coroutine.send(answer)
            except StopIteration as finished:
                return finished.value
            answer = None
            inside = self.conduct.ask_inside(started, request)
            answer = self._performers[type(request)](request, number)
            self.conduct.answered_inside(inside)
            if isinstance(request, NeighborAverage):
                request.apply(answer)
                answer = None

    def _exchange(self, request: NeighborExchange, number: int) -> Any:
        return self._communicator.exchanges.exchange(request, self._index, None, number)

    def _average(self, request: NeighborAverage, number: int) -> Any:
        """What is averaged with; whoever has asked does so when it is free to."""
        return self._exchange(request.exchange, number)

    def _all_reduce(self, request: AllReduce, number: int) -> Any:
        assert isinstance(request.value, Vector)
        return self._communicator.collectives.all_reduce(request.value, request.among, request.weight)

    def _call(self, request: Call, number: int) -> Any:
        return self._communicator.calls.call(request, self._callee)

    def _send(self, request: Send, number: int) -> Any:
        self._communicator.mail.send(request)

    def _receive(self, request: Receive, number: int) -> Any:
        return self._communicator.mail.receive(request, partial(self.conduct.check_received, request))
