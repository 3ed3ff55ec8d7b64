"""What a worker does for others: answers their calls, at once or when something has come to hold."""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from lightning_decentral.conduct import Conduct, described
from lightning_decentral.engine.monitor import Monitor
from lightning_decentral.errors import DeadlockError, ProtocolError
from lightning_decentral.flat import AbstractVector, FlatParameters, Vector
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    LocalStep,
    Until,
    answered_at_once,
)
from lightning_decentral.transport.answers import AbstractCallee
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.shared_calls import SharedCalls
from lightning_decentral.transport.standstill import Waiting
from lightning_decentral.worker import Worker

_POLL_SECONDS = 0.1


@dataclasses.dataclass(slots=True, eq=False)
class Update:
    """An update that an answer asks for.

    Args:
        request: what is asked for.
        made: whether it is over.
        updated: whether an update was made.
    """

    request: LocalStep
    made: bool = False
    updated: bool = False


class Answering(AbstractCallee):
    """Answers the calls for one model, and keeps those that wait.

    Args:
        algorithm: resolved for this world size.
        worker: what it sees.
        conduct: refuses what the protocol forbids.
        monitor: held while the algorithm's code runs.
        flat: the parameters.
        communicator: moves the vectors.
        index: the model's number.

    Attributes:
        lent: whether the parameters stay where they are when they become an average: others know where they lie.
        updates: that answers ask for, which the worker's own step makes.
        update_beside: makes an update with a gradient, of the model or of a shard of it, at once, on the thread of an
            answer, and tells whether it was made; of a worker that trains. Whoever drives the stepper sets it.
        look: where workers come and go, learns who is there, and tells whether what somebody waits for cannot come any
            more; called before each answer, and again and again while somebody waits. Whoever drives the stepper sets
            it; only of servers.
    """

    forms: list[Vector]
    monitor: Monitor

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        worker: Worker,
        conduct: Conduct,
        monitor: Monitor,
        flat: FlatParameters,
        communicator: Communicator,
        index: int,
    ) -> None:
        self.index, self.x, self.worker, self.monitor = index, flat.x, worker, monitor
        self.forms = [self.x]
        self.lent = False
        self.updates: deque[Update] = deque()
        self.update_beside: Callable[[Vector, tuple[int, int] | None], bool] | None = None
        self.look: Callable[[], bool] | None = None
        self._algorithm, self._conduct, self._flat, self._communicator = algorithm, conduct, flat, communicator
        self._shared: SharedCalls | None = None  # by which others change the parameters
        self._answered = 0  # calls, by their callers, that the worker's version counts
        self._copied: weakref.ref[Vector] | None = None  # the last answer that was copied

    def open(self) -> None:
        """Get ready for what the algorithm declares, which has initialized its worker."""
        if isinstance(self._algorithm, AbstractAsynchronousAlgorithm):
            for message in self._algorithm.messages(self.worker).values():
                assert isinstance(message, Vector)
                self.forms.append(message)

    def follow(self, algorithm: AbstractAlgorithm) -> None:
        """Let the answers that follow be those of an algorithm that differs in who takes part."""
        self._algorithm = algorithm

    def lend(self, calls: SharedCalls) -> None:
        self._flat.swap(self.x, calls.lend(self.index, self.x))
        self._flat.lent = self.x
        self.monitor.outer = calls.lock(self.index)
        self._shared, self.lent = calls, True

    def note_answers(self) -> None:
        if self._shared is not None:
            with self.monitor:
                answered = self._shared.answered(self.index)
                self.worker.version += answered - self._answered
                self._answered = answered

    # -- waiting, in answers and in steps -----------------------------------------------------------------------------

    @contextmanager
    def waiting(
        self, kind: Literal["step", "answer"], what: str, call: tuple[int, int] | None = None
    ) -> Iterator[Waiting]:
        """Somebody waits, under this, in the monitor.

        Args:
            kind: a step, or an answer.
            what: who it is and what for, in words.
            call: who has called, and that one's number for it.
        """
        if self._communicator.watch is None and self.look is None:
            raise DeadlockError(f"Nobody can go on:\n  worker {self.worker.rank}{what}")
        waiting = Waiting(kind, what, lambda: self.monitor.turns, self.monitor.wake, call)
        self.monitor.end_turn()
        with self._communicator.standstill.waiting(waiting):
            yield waiting

    def wait(self, waiting: Waiting) -> None:
        """Wait until something has run on this worker, or somebody was lost; called in the monitor."""
        waiting.seen = self.monitor.turns
        self.monitor.wait(_POLL_SECONDS)
        if self.look is not None:
            waiting.told = self.look() or waiting.told
        self._communicator.check_waiting(waiting.since)
        self.note_answers()

    # -- answers ------------------------------------------------------------------------------------------------------

    def answer(self, source: int, number: int, handed: list[Vector], waits: Callable[[], None]) -> Vector:
        if handed[0].form[: len(self.x.form)] == self.x.form:  # numbers may be beside it
            self._inspect(source, handed[0].apart(self.x)[0], self.x)
        return self._answer(source, number, handed, waits)

    def answer_part(self, source: int, theirs: Vector, part: Vector, whole: Callable[[], Vector]) -> Vector:
        self._inspect(source, theirs, part, whole)
        assert isinstance(self._algorithm, AbstractAsynchronousAlgorithm)
        with self.monitor:
            reply = answered_at_once(self._algorithm, dataclasses.replace(self.worker, x=part), source, theirs)
            assert isinstance(reply, Vector)
            if reply is not theirs:
                reply = reply.clone()  # as it is now: calls and updates change the worker while it is sent
        return reply

    def _inspect(self, source: int, theirs: Vector, own: Vector, whole: Callable[[], Vector] | None = None) -> None:
        """Put this worker's own value in the place of what is not finite, if that is refused."""
        inspector = self._communicator.inspector
        if inspector is not None and not inspector.admits(theirs, source, self.index, whole):
            with self.monitor:  # as if the caller had the same: nothing changes here, nor there
                theirs.copy_(own)

    def answered(self) -> None:
        with self.monitor:
            self.worker.version += 1

    def _answer(self, source: int, number: int, handed: list[Vector], waits: Callable[[], None]) -> Vector:
        """Let the algorithm answer a call, and wait where it does; what was sent is the algorithm's alone."""
        if self.look is not None:
            self.look()
        algorithm, told, answer = self._algorithm, False, None
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        reply: AbstractVector
        theirs = weakref.ref(handed[0])
        coroutine = algorithm.on_call(self.worker, source, handed.pop())
        waited = False
        with self.monitor:
            while True:
                try:
                    request = coroutine.send(answer)
                except StopIteration as finished:
                    reply = finished.value
                    break
                self._conduct.ask_answering(source, request, told)
                if isinstance(request, Until) and request.condition():
                    answer = True
                    continue
                if isinstance(request, LocalStep) and algorithm.trains(self.worker.rank):
                    answer = self._update_beside(request)
                    continue
                if not waited:
                    waited = True
                    waits()
                if isinstance(request, Until):
                    answer = self._answer_until(request, source, number)
                    told = told or not answer
                else:
                    answer = self._answer_update(request, source, number)
            sent = theirs()
            if sent is not None and reply is sent:
                return sent  # changed in place, or as it came
            self._conduct.check_answer(source, reply)
            assert isinstance(reply, Vector)
            return self._as_it_is_now(reply)

    def _as_it_is_now(self, reply: Vector) -> Vector:
        """Return a copy of an answer, for calls and updates change the worker while it is sent.

        It is that of another answer, if that one is still being sent, and has the same bits: so many workers that have
        waited for the same model need one copy together.
        """
        other = None if self._copied is None or reply.buffers[0].device.type != "cpu" else self._copied()
        if other is not None and other.form == reply.form and all(map(_same_bits, other.buffers, reply.buffers)):
            return other
        # Not a clone: malloc would keep its memory for the thread that has asked for it, one for each caller.
        copy = self._communicator.leases.new(reply).copy_(reply)
        self._copied = weakref.ref(copy)
        return copy

    def _answer_until(self, request: Until, source: int, number: int) -> bool:
        what = f", in its answer to worker {source}, waits for its `Until`: {described(request.condition)}"
        with self.waiting("answer", what, (source, number)) as waiting:
            while not request.condition():
                if waiting.told:
                    return False
                self.wait(waiting)
        return True

    def _update_beside(self, request: LocalStep) -> bool:
        """Make an update at once, while the training loop computes; called in the monitor."""
        assert isinstance(request.gradient, Vector)
        if self.update_beside is None:
            raise ProtocolError(
                f"{type(self._algorithm).__name__} got `LocalStep` in its `on_call` on worker {self.worker.rank}, "
                "which trains; it needs a training loop that makes updates beside its gradients. Set "
                "`stepper.callee.update_beside`."
            )
        updated = self.update_beside(request.gradient, request.shard)
        self.worker.version += int(updated)
        return updated

    def _answer_update(self, request: LocalStep, source: int, number: int) -> bool:
        """Let the worker's own step make an update, when it waits and has made none."""
        update = Update(request)
        self.updates.append(update)
        what = f", in its answer to worker {source}, waits for an update that its own step makes"
        with self.waiting("answer", what, (source, number)) as waiting:
            while not update.made:
                waiting.told = False  # there is nothing to be told
                self.wait(waiting)
        return update.updated


def _same_bits(one: Tensor, other: Tensor) -> bool:
    as_numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(one.itemsize, torch.int64)
    return torch.equal(one.view(as_numbers), other.view(as_numbers))
