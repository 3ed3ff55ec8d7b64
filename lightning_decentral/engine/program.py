"""Driving the coroutines of one algorithm on a real worker.

What an algorithm asks for is begun by the thread that drives the step, and ends on the communicator's lane; the step
stops where the training loop has to compute the gradient or to apply the update.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lightning_decentral.conduct import Conduct, UnderWay, described
from lightning_decentral.engine.answering import Answering, Update
from lightning_decentral.engine.monitor import Monitor
from lightning_decentral.engine.waits import Awaited
from lightning_decentral.flat import FlatParameters, Vector
from lightning_decentral.protocol import (
    AbstractAlgorithm,
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
from lightning_decentral.traffic import Wait
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.lanes import Pausing
from lightning_decentral.worker import Worker

_STOP = object()  # a handler's answer that the training loop has to give
_NOTHING: Future[Any] = Future()  # an answer that was used
_NOTHING.set_result(None)


class _FutureTicket(Ticket[Any]):
    __slots__ = ("asked", "awaited", "future", "work")

    def __init__(self, work: AbstractRequest[Any] | Steps[Any]) -> None:
        self.asked = time.perf_counter()
        self.awaited = Awaited()
        if isinstance(work, AbstractRequest):
            self.awaited.begin(work)
        self.future: Future[Any] = Future()
        self.work: AbstractRequest[Any] | Steps[Any] | None = work  # none once it is an average that was applied


class Program:
    """Runs the steps of one algorithm on one worker.

    Args:
        algorithm: resolved for this world size.
        worker: what it sees.
        conduct: refuses what the protocol forbids.
        monitor: held while its code runs.
        flat: the parameters.
        communicator: moves the vectors.
        answering: what the worker does for others.

    Attributes:
        reached: what the training loop has to do; none outside a step, and once it has nothing more to do in it.
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        worker: Worker,
        conduct: Conduct,
        monitor: Monitor,
        flat: FlatParameters,
        communicator: Communicator,
        answering: Answering,
    ) -> None:
        self.reached: AbstractRequest[Any] | None = None
        self._algorithm, self._worker, self._conduct, self._monitor = algorithm, worker, conduct, monitor
        self._flat, self._communicator, self._answering = flat, communicator, answering
        self._index = answering.index
        self._trains = algorithm.trains(worker.rank)
        self._coroutine: Steps[None] | None = None
        self._waits_of_step = (-1, 0)  # of which step, and which of its waits was recorded last
        self._until_when: Until | None = None  # what the step waits for, in `Until`
        self._lent: Update | None = None  # that the training loop makes now
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

    def follow(self, algorithm: AbstractAlgorithm) -> None:
        """Let the steps that follow be those of an algorithm that differs in who takes part."""
        self._algorithm = algorithm

    @property
    def active(self) -> bool:
        """Whether a step has begun and not finished."""
        return self._coroutine is not None

    def begin(self) -> None:
        """Begin a step, and run it until the training loop has something to do."""
        self._communicator.standstill.trains = self._trains
        self._conduct.begin()
        self._coroutine = self._algorithm.step(self._worker)
        self.advance(None)
        if self.reached is None and self._trains:
            self._conduct.end()  # refuses a step without a gradient

    def rest(self) -> None:
        """Bring to an end what is under way, as the algorithm says."""
        self.run_between_steps(self._algorithm.rest(self._worker))

    def begins_anew(self) -> bool:
        """Let the algorithm say, between two micro-batches, whether the gradient begins anew."""
        gradient = self.reached
        if not isinstance(gradient, Gradient) or gradient.begins_anew is None:
            return False
        began = time.perf_counter()
        given_up: bool = self.run_between_steps(gradient.begins_anew(self._worker), "begins_anew")
        self._communicator.traffic.exposed_seconds += time.perf_counter() - began
        return given_up

    def run_between_steps(self, coroutine: Steps[Any], where: str = "rest") -> Any:
        """Run a coroutine that communicates, and does nothing else; give what it returns.

        Args:
            coroutine: of the algorithm.
            where: it comes from, for messages.
        """
        answer = None
        while True:
            try:
                with self._monitor:
                    request: Any = coroutine.send(answer)
            except StopIteration as finished:
                return finished.value
            self._conduct.ask_resting(request, where)
            answer = self.handlers[Ticket if isinstance(request, Ticket) else type(request)](request)

    def end(self) -> None:
        """Learn that the step is over."""
        self._conduct.end()
        self._coroutine = None
        self._communicator.hand_over()
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
            self._conduct.ask(request)
            began = time.perf_counter()
            answer = self.handlers[Ticket if isinstance(request, Ticket) else type(request)](request)
            if answer is _STOP:
                return
            self._waited(request, began)

    def _waited(self, request: AbstractRequest[Any], began: float) -> None:
        """Count a wait that is over; and record it, where somebody wants to know more."""
        traffic, ended = self._communicator.traffic, time.perf_counter()
        traffic.exposed_seconds += ended - began
        if traffic.waits is None or isinstance(request, Start):
            return
        if isinstance(request, _FutureTicket):
            what, asked = request.awaited, request.asked
        else:
            what, asked = Awaited(), began
            what.begin(request)
        step = self._worker.step
        self._waits_of_step = (step, self._waits_of_step[1] + 1 if step == self._waits_of_step[0] else 0)
        place = (self._index, *self._waits_of_step)
        traffic.waits.append(Wait(began, ended, asked, place, what.word, what.peers))

    def _stop_at(self, request: Gradient | LocalStep) -> Any:
        self.reached = request
        return _STOP

    def _start(self, request: Start[Any]) -> _FutureTicket:
        ticket = _FutureTicket(request.work)
        self._submit(ticket, self._conduct.begun(ticket, request.work))
        return ticket

    def _answer(self, request: AbstractRequest[Any]) -> Any:
        ticket = _FutureTicket(request)
        self._submit(ticket, None)
        return self._take(ticket)

    def _submit(self, ticket: _FutureTicket, under_way: UnderWay | None) -> None:
        """Begin a request, or a coroutine of requests."""
        work = ticket.work
        number = self._communicator.leases.submitted(self._index)
        lagging = self._communicator.lagging
        if lagging is not None and isinstance(work, NeighborExchange | NeighborAverage | AllReduce):
            lagging.begun += 1
        if isinstance(work, NeighborExchange):
            ticket.future = self._communicator.exchanges.begin(work, self._index, None, number)
        elif isinstance(work, NeighborAverage):
            own = work.exchange.value is self._answering.x and not self._answering.lent
            ticket.future = self._communicator.exchanges.begin(
                work.exchange, self._index, work if own else None, number
            )
        elif isinstance(work, Call) and under_way is not None and not self._communicator.calls.reaches(work.peer):
            # Beside others that were started: a call has no order among what workers begin.
            asked = self._communicator.calls.begin(work)
            ticket.future = self._communicator.start_beside(work.peer, self._call(work, number, asked))
        elif isinstance(work, AbstractRequest):
            ticket.future = self._communicator.start(self._performers[type(work)](work, number))
        elif work is not None and under_way is not None:
            ticket.future = self._communicator.start(self._run(work, under_way, number, ticket.awaited))

    def _take(self, ticket: _FutureTicket) -> Any:
        """Wait for an answer; an average becomes the value now."""
        standstill = self._communicator.standstill
        standstill.on_lane = True
        answer = self._communicator.wait(ticket.future)
        standstill.on_lane = False
        self._conduct.take(ticket)
        if not isinstance(ticket.work, NeighborAverage):
            return answer
        average, ticket.work, ticket.future = ticket.work, None, _NOTHING
        if isinstance(answer, Vector):  # the average of the parameters
            self._flat.swap(self._answering.x, answer)
        else:
            average.apply(answer)
        return None

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _until(self, request: Until) -> Any:
        """Wait in the step; or stop for an update that an answer asks for, and go on waiting after it."""
        self._communicator.hand_over()  # what was started may bring it about
        with self._monitor:
            if request.condition():
                return True
            what = f", step {self._worker.step}, waits for its `Until`: {described(request.condition)}"
            with self._answering.waiting("step", what) as waiting:
                while True:
                    if self._answering.updates and self._conduct.lend_update():
                        self._until_when, self._lent = request, self._answering.updates.popleft()
                        self.reached = self._lent.request
                        return _STOP
                    if waiting.told:
                        self._conduct.told()
                        return False
                    self._answering.wait(waiting)
                    if request.condition():
                        return True

    def _give_back(self, updated: bool) -> Any:
        """Learn that the update lent to an answer is made: the step goes on waiting."""
        update, request = self._lent, self._until_when
        assert update is not None
        assert request is not None
        self._lent = self._until_when = self.reached = None
        with self._monitor:
            update.made, update.updated = True, updated
        return self._until(request)

    # -- on the lane, or on the thread that waits ---------------------------------------------------------------------

    def _run(self, coroutine: Steps[Any], started: UnderWay, number: int, waits: Awaited) -> Pausing[Any]:
        """Run a started coroutine, and tell whoever waits for it for whom it does."""
        answer: Any = None
        while True:
            try:
                with self._monitor:
                    request = coroutine.send(answer)
            except StopIteration as finished:
                return finished.value
            answer = None
            inside = self._conduct.ask_inside(started, request)
            waits.begin(request)
            answer = yield from self._performers[type(request)](request, number)
            self._conduct.answered_inside(inside)
            if isinstance(request, NeighborAverage):
                request.apply(answer)
                answer = None

    def _exchange(self, request: NeighborExchange, number: int) -> Pausing[Any]:
        return self._communicator.exchanges.work(request, self._index, None, number)

    def _average(self, request: NeighborAverage, number: int) -> Pausing[Any]:
        """Tell what is averaged with; whoever has asked does so when it is free to."""
        return self._exchange(request.exchange, number)

    def _all_reduce(self, request: AllReduce, number: int) -> Pausing[Any]:
        assert isinstance(request.value, Vector)
        yield None
        return self._communicator.collectives.all_reduce(request.value, request.among, request.weight)

    def _call(self, request: Call, number: int, asked: int | None = None) -> Pausing[Any]:
        if request.may_change and not self._communicator.calls.reaches(request.peer):  # then it is read part by part
            assert isinstance(request.value, Vector)
            with self._monitor:
                copy = self._communicator.leases.new(request.value).copy_(request.value)
            request = dataclasses.replace(request, value=copy)
        return self._calling(request, asked)

    def _calling(self, request: Call, asked: int | None) -> Pausing[Any]:
        if not self._communicator.calls.reaches(request.peer):
            yield None
        return self._communicator.calls.call(request, self._answering, asked)

    def _send(self, request: Send, number: int) -> Pausing[Any]:
        yield None
        self._communicator.mail.send(request)

    def _receive(self, request: Receive, number: int) -> Pausing[Any]:
        yield None
        return self._communicator.mail.receive(request, self._conduct.check_received)
