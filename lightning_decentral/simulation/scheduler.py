"""What virtual workers do: their coroutines, one after the other, each until it has to wait."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

from lightning_decentral.conduct import COMMUNICATION
from lightning_decentral.errors import PeerLost, ProtocolError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import (
    AbstractAsynchronousAlgorithm,
    AbstractRequest,
    Call,
    Gradient,
    LocalStep,
    NeighborAverage,
    Start,
    Ticket,
    Until,
)
from lightning_decentral.simulation.tasks import WAIT, CallUnderWay, Fleet, SimulatedTicket, Task
from lightning_decentral.worker import Worker

Handler = Callable[[Task, Any], Any]
_IDLE_STEPS = 1000  # that a worker may make while nothing happens


class Scheduler:
    """Drives the coroutines; answers `Gradient`, `LocalStep`, `Start`, `Ticket` and `Until`.

    Args:
        fleet: the workers.
        draw: how many seconds a worker's gradient takes, drawn anew each time.
        micro_batches: of a gradient, each of which takes as long.

    Attributes:
        handlers: what answers each word.
        on_answer: what becomes of what an ``on_call`` has returned.
        goal: after how many steps a worker that trains has come to its end; none for ever.
        steps: what each worker is doing, if it is.
        demand: gradients and updates that the driver is to compute.
    """

    def __init__(self, fleet: Fleet, draw: Callable[[int], float], micro_batches: int = 1) -> None:
        n = len(fleet.workers)
        self._fleet = fleet
        self._clock = fleet.clock
        self._draw = draw
        self._micro_batches = micro_batches
        self._has_snapshots = isinstance(fleet.algorithm, AbstractAsynchronousAlgorithm)
        self._training = {rank for rank in range(n) if fleet.algorithm.trains(rank)}
        self._ended: set[int] = set()
        self._lanes: list[deque[Task]] = [deque() for _ in range(n)]  # what each worker started, in order
        self._waiting: list[list[Task]] = [[] for _ in range(n)]  # in `Until`
        self._updates: list[deque[tuple[Task, LocalStep]]] = [deque() for _ in range(n)]  # asked for by answers
        self._told_at = [-1] * n  # up to which event each worker's step was told that it waits in vain
        self._idle = [(-1, 0)] * n  # up to which event, how many steps
        self.handlers: dict[type, Handler] = {}
        self.on_answer: Callable[[CallUnderWay, AbstractVector], None]
        self.goal: int | None = None
        self.steps: list[Task | None] = [None] * n
        self.demand: deque[tuple[Task, Gradient | LocalStep]] = deque()
        self._parts: dict[int, tuple[float, int]] = {}  # seconds of a micro-batch, and how many are left of a gradient

    # -- steps --------------------------------------------------------------------------------------------------------

    def begin(self, goal: int | None) -> None:
        """Let every worker that is not in the middle of a step begin one, until it has come to its goal."""
        self.goal = goal
        self._ended.clear()
        alive = [worker for worker in self._fleet.workers if worker.rank not in self._fleet.dead]
        for worker in sorted(alive, key=lambda worker: worker.rank not in self._training):  # so that those end first
            if self.steps[worker.rank] is None:
                self._begin_step(worker)

    def begin_rest(self) -> None:
        """Let every worker come to rest."""
        for worker in self._fleet.workers:
            if worker.rank not in self._fleet.dead:
                task = self.steps[worker.rank] = Task(worker, self._fleet.algorithm.rest(worker), "rest")
                self._fleet.resume(task, None)

    def _begin_step(self, worker: Worker) -> None:
        rank, goal = worker.rank, self.goal
        if goal is not None:
            if rank in self._training:
                if worker.step >= goal:
                    self._ended.add(rank)
                    return
            elif self._training <= self._ended | self._fleet.dead and not self._updates[rank]:
                return
        if self._has_snapshots:
            worker.snapshot.copy_(worker.x)
        worker.snapshot_version = worker.version
        self._fleet.conduct[rank].begin()
        task = Task(worker, self._fleet.step(worker))
        self.steps[rank] = task
        self._fleet.ready.append((task, None))

    def _end_step(self, worker: Worker) -> None:
        rank = worker.rank
        conduct = self._fleet.conduct[rank]
        conduct.end()
        self.steps[rank] = None
        if conduct.counts:
            worker.step += 1
        elif rank in self._training:
            self._ended.add(rank)
            return
        if rank not in self._training:
            self._require_progress(worker)
        self._begin_step(worker)

    def _require_progress(self, worker: Worker) -> None:
        """Refuse a worker that does not train and makes step after step while nothing happens."""
        event, count = self._idle[worker.rank]
        now = self._fleet.clock.count
        self._idle[worker.rank] = (now, count + 1 if event == now else 1)
        if count >= _IDLE_STEPS and event == now:
            raise ProtocolError(
                f"{type(self._fleet.algorithm).__name__} got, by step {worker.step} of worker {worker.rank}, "
                f"{_IDLE_STEPS} steps in which nothing happened, and a condition that always holds; it needs "
                "one that becomes false when what has come was used. Take it out of `worker.state` in the step."
            )

    # -- coroutines ---------------------------------------------------------------------------------------------------

    def advance(self, task: Task, answer: Any) -> None:
        """Let a task go on until it waits for something, or has come to its end."""
        worker, kind, pending = task.worker, task.kind, task.pending
        rank, fleet = worker.rank, self._fleet
        if rank in fleet.dead:
            return
        conduct = fleet.conduct[rank]
        if pending is not None:
            if type(pending) is Until and answer and not pending.condition():
                self._waiting[rank].append(task)  # somebody was quicker
                return
            if kind in ("step", "between") and type(pending) not in (Gradient, LocalStep):
                fleet.traffic[rank].exposed_seconds += self._clock.seconds - task.since
            answer = self._answered(task, answer)
        send = task.coroutine.send
        handlers = self.handlers
        while True:
            try:
                request: Any = send(answer)
            except StopIteration as finished:
                self._finished(task, finished.value)
                break
            if kind in ("step", "rest", "between"):
                if kind == "step":
                    conduct.ask(request)
                else:
                    conduct.ask_resting(request, "rest" if kind == "rest" else "begins_anew")
                if self._lanes[rank] and type(request) in COMMUNICATION:
                    # What was started before comes first: exchanges keep the order in which they were asked for.
                    request = self._put_into_lane(task, request)
            elif kind == "answer":
                assert task.call is not None
                conduct.ask_answering(task.call.task.worker.rank, request, task.told)
            elif task.average is None and task.under_way:  # a coroutine of the algorithm
                task.under_way.append(conduct.ask_inside(task.under_way[0], request))
            word = Ticket if type(request) is SimulatedTicket else type(request)
            answer = handlers[word](task, request)
            if answer is WAIT:
                task.pending = request
                task.since = self._clock.seconds
                break
            answer = self._answered(task, answer, request)
        if self._waiting[rank]:
            self.look_again(rank)

    def _answered(self, task: Task, answer: Any, request: Any = None) -> Any:
        """Return what a coroutine gets for what it has asked for."""
        request, task.pending = request or task.pending, None
        if len(task.under_way) > 1:
            self._fleet.conduct[task.worker.rank].answered_inside(task.under_way.pop())
        if type(request) is NeighborAverage and answer is not None:
            return request.apply(answer)
        return answer

    def _finished(self, task: Task, value: Any) -> None:
        worker = task.worker
        if task.kind == "step":
            self._end_step(worker)
        elif task.kind == "rest":
            self.steps[worker.rank] = None
        elif task.kind == "between":
            self._go_on_with_gradient(worker, value)
        elif task.kind == "answer":
            assert task.call is not None
            self.on_answer(task.call, value)
        else:
            task.done, task.answer = True, value
            if task.waiting is not None:
                waiting, ticket = task.waiting
                task.waiting = None
                self._fleet.ready.append((waiting, self._given(ticket)))
            lane = self._lanes[worker.rank]
            if not lane or lane[0] is not task:  # a call, which runs beside what is in the lane
                return
            lane.popleft()
            if lane:
                self._fleet.ready.append((lane[0], None))

    # -- gradients and updates ----------------------------------------------------------------------------------------

    def gradient(self, task: Task, request: Gradient) -> Any:
        """Answer a `Gradient`, when the driver has computed it."""
        self._compute(task, request)
        return WAIT

    def _compute(self, task: Task, request: Gradient) -> None:
        """Begin a gradient."""
        clock, rank, count = self._clock, task.worker.rank, self._micro_batches
        seconds = self._draw(rank)
        if request.begins_anew is None or count == 1:
            clock.at(clock.seconds + seconds, self._demand_later, task, request)
            return
        self._parts[rank] = seconds / count, count
        clock.at(clock.seconds + seconds / count, self._end_part, task, request)

    def _end_part(self, task: Task, request: Gradient) -> None:
        """Learn that a micro-batch is computed: it is the last one, or the algorithm says whether it goes on."""
        assert request.begins_anew is not None
        worker = task.worker
        seconds, left = self._parts[worker.rank]
        if left == 1:
            self._demand_later(task, request)
            return
        self._parts[worker.rank] = seconds, left - 1
        self._fleet.resume(Task(worker, request.begins_anew(worker), "between"), None)

    def _go_on_with_gradient(self, worker: Worker, anew: bool) -> None:
        """Go on with the next micro-batch of a worker's gradient, or begin it anew at its model as it is now."""
        task = self.steps[worker.rank]
        assert task is not None
        request = task.pending
        assert isinstance(request, Gradient)
        if not anew:
            seconds, _ = self._parts[worker.rank]
            self._clock.at(self._clock.seconds + seconds, self._end_part, task, request)
            return
        if self._has_snapshots:
            worker.snapshot.copy_(worker.x)
        worker.snapshot_version = worker.version
        self._compute(task, request)

    def _demand_later(self, task: Task, request: Gradient) -> None:
        self.demand.append((task, request))

    def local_step(self, task: Task, request: LocalStep) -> Any:
        """Answer a `LocalStep`, when the driver has applied it.

        That of an answer of a worker that does not train has to wait until the worker's step has room for it.
        """
        rank = task.worker.rank
        if task.kind == "answer" and rank not in self._training:
            self._updates[rank].append((task, request))
            if self.steps[rank] is None:
                self._begin_step(task.worker)
            self._update(rank)
        else:
            self.demand.append((task, request))
        return WAIT

    def _update(self, rank: int) -> None:
        """Make the first of the updates that answers ask for, if the worker's step waits and has made none."""
        if self._updates[rank] and self.steps[rank] in self._waiting[rank] and self._fleet.conduct[rank].lend_update():
            self.demand.append(self._updates[rank].popleft())

    # -- waiting until ------------------------------------------------------------------------------------------------

    def until(self, task: Task, request: Until) -> Any:
        """Answer an `Until`."""
        if request.condition():
            return True
        rank = task.worker.rank
        self._waiting[rank].append(task)
        task.pending = request
        if task.kind == "step":
            self._update(rank)
        return WAIT

    def look_again(self, rank: int) -> None:
        """Something has run on a worker: let those go on whose condition holds now."""
        waiting = self._waiting[rank]
        if not waiting:
            return
        for task in waiting[:]:
            if type(task.pending) is Until and task.pending.condition():
                waiting.remove(task)
                self._fleet.ready.append((task, True))

    def tell(self) -> bool:
        """Nobody can go on: tell those who wait in `Until` that it cannot come any more, if there are such.

        Steps are told first, so that what they make of it may be what the answers wait for.

        Raises:
            PeerLost: if a worker was lost that had not come to its end, and the algorithm does not tolerate it.
        """
        fleet = self._fleet
        waiting = [task for tasks in self._waiting for task in tasks if task.worker.rank not in fleet.dead]
        if not waiting:
            return False
        lost = sorted(fleet.dead & self._training - self._ended)
        if lost and not fleet.algorithm.tolerates_loss:
            who = ", ".join(sorted({str(task.worker.rank) for task in waiting}))
            raise PeerLost(
                f"Workers {who} wait in `Until`, and workers {lost} died after "
                f"{[fleet.cluster.failures[rank] for rank in lost]} virtual seconds. Resume from a checkpoint, leave "
                "them out of `Cluster(failures=...)`, or let the method say `tolerates_loss`.",
                ranks=tuple(lost),
            )
        if not self._ended and not lost:
            return False
        now = fleet.clock.count
        steps = [task for task in waiting if task.kind == "step" and self._told_at[task.worker.rank] != now]
        told = steps or [task for task in waiting if task.kind == "answer"]
        for task in told:
            rank = task.worker.rank
            self._waiting[rank].remove(task)
            task.told = True
            if task.kind == "step":
                self._told_at[rank] = now
                fleet.conduct[rank].told()
            fleet.ready.append((task, False))
        return bool(told)

    # -- what was started ---------------------------------------------------------------------------------------------

    def start(self, task: Task, request: Start[Any]) -> Any:
        """Answer a `Start`."""
        work = request.work
        if type(work) is Call:  # has no order among what others begin
            started = Task(task.worker, _single(work), "started")
            self._fleet.ready.append((started, None))
            ticket = SimulatedTicket(started)
        else:
            ticket = self._put_into_lane(task, work)
        under_way = self._fleet.conduct[task.worker.rank].begun(ticket, work)
        if type(work) not in COMMUNICATION:
            ticket.task.under_way.append(under_way)
        return ticket

    def _put_into_lane(self, task: Task, work: Any) -> SimulatedTicket:
        average = work if type(work) is NeighborAverage else None
        if average is not None:
            work = average.exchange
        started = Task(task.worker, _single(work) if type(work) in COMMUNICATION else work, "started")
        started.average = average
        lane = self._lanes[task.worker.rank]
        lane.append(started)
        if len(lane) == 1:
            self._fleet.ready.append((started, None))
        return SimulatedTicket(started)

    def ticket(self, task: Task, ticket: SimulatedTicket) -> Any:
        """Answer a `Ticket`."""
        if ticket.task.done:
            return self._given(ticket)
        ticket.task.waiting = task, ticket
        return WAIT

    def _given(self, ticket: SimulatedTicket) -> Any:
        """Return the answer behind a ticket, for who awaits it now."""
        started = ticket.task
        self._fleet.conduct[started.worker.rank].take(ticket)
        if started.average is not None:
            started.average.apply(started.answer)
            started.average = started.answer = None
        return started.answer

    # -- ends ---------------------------------------------------------------------------------------------------------

    def blocked(self) -> list[Task]:
        """List what cannot go on, of living workers: their steps, and the answers that others wait for."""
        waiting = (task for tasks in self._waiting for task in tasks if task.kind == "answer")
        tasks = itertools.chain(filter(None, self.steps), waiting, (task for each in self._updates for task, _ in each))
        return [task for task in tasks if task.worker.rank not in self._fleet.dead]

    def busy(self) -> list[int]:
        """Living workers that are in the middle of something."""
        return sorted({task.worker.rank for task in self.blocked()})

    def lose(self, rank: int) -> None:
        """Let a worker die.

        Raises:
            PeerLost: if another one waits for its answer.
        """
        for task in (*self._waiting[rank], *(task for task, _ in self._updates[rank])):
            if task.call is not None:
                self._fleet.check_alive(rank, task.call.task.worker.rank)

    def close(self) -> None:
        """End all coroutines: let none be collected that was started and never came to run."""
        tasks = itertools.chain((task for task, _ in self._fleet.ready), *self._lanes, *self._waiting)
        for task in (*tasks, *filter(None, self.steps)):
            task.coroutine.close()


async def _single(request: AbstractRequest[Any]) -> Any:
    return await request
