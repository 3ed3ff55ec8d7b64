"""The two ways in which a call that came over a connection is answered: whole, or part by part as it arrives."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_decentral.errors import PeerLost, WorkerFailed
from lightning_decentral.flat import Vector
from lightning_decentral.traffic import call_part_bytes
from lightning_decentral.transport.edges import AbstractAnswer, Header
from lightning_decentral.transport.sending import Sending
from lightning_decentral.transport.shared_calls import SharedCalls
from lightning_decentral.worker import Worker

_SMALL = 100  # times smaller than a model: a question
_PART_SLOTS = 3  # buffers for each caller: two receive, while the answer in another leaves


class AnswerFailed(Exception):
    """What was raised in an answer, by a method or by the user's optimizer: no connection has broken.

    Attributes:
        reason: that exception.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@contextmanager
def _answering() -> Iterator[None]:
    """Tell what an answer raises apart from what a connection does."""
    try:
        yield
    except (PeerLost, WorkerFailed):  # another worker's, for which the answer waited
        raise
    except Exception as error:
        raise AnswerFailed(error) from error


class AbstractCallee(ABC):
    """A model that calls are about: of this worker, and of one optimizer.

    Attributes:
        index: its number.
        x: its parameters.
        forms: what calls and answers may be like: `x`, and what the algorithm declares.
        worker: what its algorithm sees.
        monitor: held while its algorithm runs.
    """

    index: int
    x: Vector
    forms: Sequence[Vector]
    worker: Worker
    monitor: AbstractContextManager[object]

    @abstractmethod
    def lend(self, calls: SharedCalls) -> None:
        """Let the parameters lie where other workers of this host reach them; between steps, all workers together."""

    @abstractmethod
    def answer(self, source: int, number: int, handed: list[Vector], waits: Callable[[], None]) -> Vector:
        """Answer a call of another worker, in its time; on the thread of its edge.

        Args:
            source: who calls.
            number: of the caller for this call.
            handed: what it has sent; may be overwritten and returned. It is taken out of this list, so its memory is
                free once the algorithm has used it, while the answer waits.
            waits: called before the answer waits for anything, once.
        """

    @abstractmethod
    def answer_part(self, source: int, theirs: Vector, part: Vector, whole: Callable[[], Vector]) -> Vector:
        """Answer a part of a call at once, for that part of ``x``; on the thread of its edge.

        Args:
            source: who calls.
            theirs: what it has sent; may be overwritten and returned.
            part: of ``x``.
            whole: makes the model of which ``theirs`` is a part, with zeros for the rest.
        """

    @abstractmethod
    def note_answers(self) -> None:
        """Count in the worker's version how often callers have changed ``x`` themselves."""

    @abstractmethod
    def answered(self) -> None:
        """Note that a call has been answered to the end."""


class Service(Protocol):
    """What answers need of this worker's calls."""

    serving: threading.Lock | threading.Semaphore
    sending: Sending

    @property
    def stages(self) -> bool:
        """Whether answers are copied to where the transport can read them, in a buffer that all share."""

    def serving_buffers(self, callee: AbstractCallee, form: int) -> tuple[Vector, Vector]:
        """Return where a call of this form is received: on the device, and where the transport writes it."""

    def staged_answer(self, callee: AbstractCallee, reply: Vector) -> Vector:
        """Put an answer where the transport can read it."""

    def part_buffers(self, source: int, count: int, num_bytes: int) -> list[Tensor]:
        """Memory for so many parts of a caller's calls."""

    def count_answer(self, num_bytes: int) -> None:
        """Note that a call was answered, with so many bytes."""


class AnswerWhole(AbstractAnswer):
    """Receives all of a call, then answers it, at once or later.

    Calls are received two at a time, of a model in shards one more than it has: gloo moves no byte of a call that
    nobody receives, and the link would be idle while one is answered. One whose answer waits keeps its buffer, and lets
    go of that lock. Each answer that is sent needs a copy of what it says; few are sent at a time (`Sending`).

    A call of a few bytes asks something, and its caller may compute nothing meanwhile: it waits neither for gradients
    that are received nor for models that are sent. On an accelerator, where all have one buffer, it does.
    """

    whole = True

    def __init__(self, service: Service, callee: AbstractCallee, source: int, header: Header) -> None:
        self._service, self._callee, self._source, self._header = service, callee, source, header
        self._outgoing: list[Tensor] = []
        asks = callee.forms[header.form].num_bytes * _SMALL < callee.x.num_bytes
        self._queues = service.stages or not asks  # for room that others use
        self._waited = not self._queues  # whether others were let in
        self._sends: int | None = None  # its number among those that are sent
        self._began = 0.0  # of sending
        self._lock = threading.Lock()  # for what is let go of

    def __enter__(self) -> AbstractAnswer:
        if self._queues:
            self._service.serving.acquire()
        try:
            self._theirs, self._received = self._service.serving_buffers(self._callee, self._header.form)
            self._incoming = as_bytes(self._received)
        except BaseException:
            if self._queues:
                self._service.serving.release()
            raise
        self.parts = self.slots = len(self._incoming)
        return self

    def __exit__(self, *_: object) -> None:
        self._let_others_in()
        self._end_sending(time.monotonic() - self._began)

    def abandon(self) -> None:
        self._let_others_in()
        self._end_sending()

    def buffer(self, part: int) -> Tensor:
        return self._incoming[part]

    def reply(self, part: int) -> Tensor:
        if part == 0:
            if self._received is not self._theirs:
                self._theirs.copy_(self._received)
            handed = [self._theirs]
            del self._theirs, self._received, self._incoming
            if self._queues:
                self._sends = self._service.sending.begin()
            with _answering():
                reply = self._callee.answer(self._source, self._header.number, handed, self._wait)
            self._began = time.monotonic()
            self._reply = reply  # until it is sent: its memory may be a lease, and others may share a copy
            self._callee.answered()
            self._service.count_answer(reply.num_bytes)
            self.form = [each.form for each in self._callee.forms].index(reply.form)
            if self._waited and self._service.stages:
                self._service.serving.acquire()
                self._waited = False
            self._outgoing = as_bytes(self._service.staged_answer(self._callee, reply))
            if not self._waited and not self._service.stages:
                self._let_others_in()  # calls are received while this answer, which has memory of its own, is sent
            self.parts = len(self._outgoing)
        return self._outgoing[part]

    def _wait(self) -> None:
        """Wait, in an answer: others go on meanwhile, and many that waited for the same share one copy."""
        self._let_others_in()
        self._end_sending()

    def _let_others_in(self) -> None:
        with self._lock:
            waited, self._waited = self._waited, True
        if not waited:
            self._service.serving.release()

    def _end_sending(self, *seconds: float) -> None:
        with self._lock:
            sends, self._sends = self._sends, None
        if sends is not None:
            self._service.sending.end(sends, *seconds)


class AnswerInParts(AbstractAnswer):
    """Answers each part as soon as it is there; several callers at a time, each with a few buffers of its own."""

    whole = False

    def __init__(self, service: Service, callee: AbstractCallee, source: int) -> None:
        self._service, self._callee, self._source = service, callee, source

    def __enter__(self) -> AbstractAnswer:
        self._own = _parts(self._callee.x)
        self.parts = len(self._own)
        largest = max(part.num_bytes for part in self._own)
        self._memory = self._service.part_buffers(self._source, min(_PART_SLOTS, self.parts), largest)
        self.slots = len(self._memory)
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def buffer(self, part: int) -> Tensor:
        return self._memory[part % self.slots][: self._own[part].num_bytes]

    def reply(self, part: int) -> Tensor:
        own = self._own[part]
        received = self.buffer(part)
        device = own.buffers[0].device
        theirs = Vector([received.view(own.buffers[0].dtype).to(device)])  # on the CPU no copy
        with _answering():
            reply = self._callee.answer_part(self._source, theirs, own, partial(self._whole, part, theirs))
        if part == self.parts - 1:
            self._callee.answered()
            self._service.count_answer(self._callee.x.num_bytes)
        answer = reply.buffers[0].view(torch.uint8)
        return answer if device.type == "cpu" else received.copy_(answer)

    def _whole(self, part: int, theirs: Vector) -> Vector:
        whole = self._callee.x.empty_like()
        for buffer in whole.buffers:
            buffer.zero_()
        _parts(whole)[part].copy_(theirs)
        return whole


def _parts(vector: Vector) -> list[Vector]:
    """Cut a vector into the pieces in which it travels."""
    size = call_part_bytes(vector.num_bytes)
    return vector.parts(size - size % 16)  # the types of a vector share the buffers of parts


def as_bytes(vector: Vector) -> list[Tensor]:
    """Cut a vector on the CPU into the pieces in which it travels, as bytes."""
    return [part.buffers[0].view(torch.uint8) for part in _parts(vector)]
