"""Calls between workers of one host: the caller averages, in memory that both map.

The parameters of each worker lie in memory that the other workers of its host map. Who calls reads and writes the
other's parameters there, part by part, under a lock that their owner takes too: the one that is called is not woken,
its threads do not take turns, and a call costs no more than the arithmetic. That is possible where an answer depends on
the parameters only and each element is treated by itself (`AbstractAsynchronousAlgorithm.answers_in_parts`); other
calls, and those to other hosts, go through connections (`edges`), which also tell when a worker has ended.

A worker that ends while it has a lock leaves each element as it was or averaged, never torn, and is named by whoever
wants the lock next: the kernel marks it. One that is stopped is named when its heart has been silent for the time-out.

Linux only, as `shared_memory` is.
"""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_decentral.flat import LentVector, Vector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Call, answered_at_once
from lightning_decentral.transport.poison import TURNS, Inspector, is_finite
from lightning_decentral.transport.shared_memory import SharedMemory, num_bytes_of, views_of
from lightning_decentral.worker import Worker

_PART_BYTES = 1 << 21  # of a vector at a time: all that takes part is in a cache, and locks are soon given up
_WAIT_SECONDS = 0.2  # until a thread that waits for a lock looks whether the run has failed
_HEADER_BYTES = 4096  # of a model's memory; the lock, then some whole numbers
_LOCK_BYTES = 128  # more than a mutex of any C library takes
_HOLDER, _ANSWERED, _BEAT = range(3)  # the numbers, by their place
_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST

Failures = Callable[[tuple[int, ...]], AbstractContextManager[None]]
"""Turns an error under it into who was lost, and tells the others; it is given who is waited for."""


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class ModelLock:
    """A lock around the parameters of one worker, which all workers of a host can take.

    It is the C library's robust mutex: if its holder ends, whoever takes it next is told.

    Args:
        header: of the model's memory.
        owner: the worker whose parameters they are.
        rank: this worker.
        timeout_seconds: for a holder to give it up.
        failures: names whose fault an error is, of these workers or others.
        check: raises what ended the run elsewhere; called now and then while the lock is waited for.
    """

    def __init__(
        self,
        header: Tensor,
        owner: int,
        rank: int,
        timeout_seconds: float,
        failures: Failures,
        check: Callable[[], None],
    ) -> None:
        self._address = ctypes.c_void_p(header.data_ptr())
        self._memory = header  # stays mapped as long as the lock is there
        self._owner, self._rank = owner, rank
        self._timeout_seconds, self._failures, self._check = timeout_seconds, failures, check
        self.numbers = memoryview(header[_LOCK_BYTES:].numpy()).cast("q")  # type: ignore[arg-type]
        # What ends at once keeps Python's lock; what waits gives it up.
        at_once, waiting = ctypes.PyDLL(None), ctypes.CDLL(None)
        self._try, self._unlock = at_once.pthread_mutex_trylock, at_once.pthread_mutex_unlock
        self._consistent, self._wait = at_once.pthread_mutex_consistent, waiting.pthread_mutex_timedlock
        if owner == rank:
            attributes = ctypes.create_string_buffer(64)
            failed = (
                at_once.pthread_mutexattr_init(attributes)
                or at_once.pthread_mutexattr_setpshared(attributes, _SHARED)
                or at_once.pthread_mutexattr_setrobust(attributes, _ROBUST)
                or at_once.pthread_mutex_init(self._address, attributes)
            )
            if failed:
                raise OSError(failed, "The C library made no mutex for shared memory.")
            self.numbers[_HOLDER] = -1

    def __enter__(self) -> None:
        result = self._try(self._address)
        if result:
            self._wait_for(result)
        self.numbers[_HOLDER] = self._rank

    def __exit__(self, *_: object) -> None:
        self._unlock(self._address)

    def _wait_for(self, result: int) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        while result in (errno.EBUSY, errno.ETIMEDOUT) and time.monotonic() < deadline:
            self._check()
            seconds, fraction = divmod(time.time() + _WAIT_SECONDS, 1.0)
            result = self._wait(self._address, ctypes.byref(_Time(int(seconds), int(fraction * 1e9))))
        if result == 0:
            return
        holder = self.numbers[_HOLDER]
        if result == errno.EOWNERDEAD:
            self._consistent(self._address)
            self._unlock(self._address)
        with self._failures((holder,)):
            if result == errno.EOWNERDEAD:
                raise ConnectionError(f"Worker {holder} ended while it changed the parameters of worker {self._owner}.")
            if result == errno.ETIMEDOUT:
                raise TimeoutError(f"Worker {holder} did not give up the parameters of worker {self._owner}.")
            raise OSError(result, f"The lock of worker {self._owner} failed.")


@dataclass(frozen=True, slots=True)
class _Model:
    """A worker's parameters in shared memory, and their parts as the algorithm sees them."""

    lock: ModelLock
    vector: Vector
    parts: tuple[Worker, ...]


class SharedCalls:
    """Lends the parameters of one worker to the others of its host, and calls these in theirs.

    Args:
        rank: this worker.
        world_size: how many workers there are.
        shared: that has met the others.
        algorithm: that answers in parts.
        timeout_seconds: for a lock, and for how long a heart may be silent.
        failures: names whose fault an error is, of these workers or others.
        check: raises what ended the run elsewhere.

    Attributes:
        peers: whom this worker may call so.
        inspector: looks at what comes of calls, once there is one.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        shared: SharedMemory,
        algorithm: AbstractAsynchronousAlgorithm,
        timeout_seconds: float,
        failures: Failures,
        check: Callable[[], None],
    ) -> None:
        self.peers = shared.peers
        self.inspector: Inspector | None = None
        self._rank, self._world_size = rank, world_size
        self._shared = shared
        self._algorithm = algorithm
        self._timeout_seconds, self._failures, self._check = timeout_seconds, failures, check
        self._own: dict[int, _Model] = {}
        self._theirs: dict[tuple[int, int], _Model] = {}
        self._scratch: dict[int, list[Vector]] = {}
        self._counted: dict[int, int] = {}

    def lend(self, index: int, x: Vector) -> Vector:
        """Memory for the ``index``-th model, or for what comes in its place, with the values of ``x``.

        All workers together, in the same order of models.
        """

        def prepare(memory: Tensor) -> None:
            self._own[index] = own = self._model(memory, x, self._rank)
            own.vector.copy_(x)
            self.beat()

        self._counted[index] = 0
        self._shared.lend(index, _HEADER_BYTES + num_bytes_of(x), prepare)
        for peer in sorted(self.peers):
            self._theirs[peer, index] = self._model(self._shared.borrow(peer, index), x, peer)
        room = torch.empty(_PART_BYTES, dtype=torch.uint8)
        self._scratch[index] = [
            Vector(room[: part.num_bytes].view(b.dtype) for b in part.buffers) for part in _parts(x)
        ]
        return self._own[index].vector

    def lock(self, index: int) -> ModelLock:
        """Return what to take before the ``index``-th model of this worker is looked at or changed."""
        return self._own[index].lock

    def answered(self, index: int) -> int:
        """Count how often others have called this worker for its ``index``-th model."""
        return self._own[index].lock.numbers[_ANSWERED]

    def uncounted(self) -> list[int]:
        """Return how many bytes each answer had that was given since this was asked last."""
        sizes: list[int] = []
        for index, own in self._own.items():
            answered = self.answered(index)
            sizes += [own.vector.num_bytes] * (answered - self._counted[index])
            self._counted[index] = answered
        return sizes

    def beat(self) -> None:
        """Show the others that this process runs; several times a second."""
        for own in tuple(self._own.values()):  # on a thread of its own
            own.lock.numbers[_BEAT] = time.monotonic_ns()

    def silent(self) -> tuple[int, ...]:
        """List those whose hearts have not beaten for the time-out: nothing else tells, as nobody waits for them."""
        since = time.monotonic_ns() - int(1e9 * self._timeout_seconds)
        return tuple(peer for (peer, _), theirs in self._theirs.items() if theirs.lock.numbers[_BEAT] < since)

    def call(self, request: Call, index: int, monitor: AbstractContextManager[object], into: Vector | None) -> None:
        """Answer a `Call` of the ``index``-th model: by what the request says, or into ``into``.

        Args:
            request: of one of `peers`.
            index: of the model.
            monitor: this worker's own, which takes `lock`.
            into: where the answer goes if the request does not say what becomes of it.

        Raises:
            PeerLost: if somebody has a lock who does not give it up, or ended with it.
        """
        value, peer = request.value, request.peer
        assert isinstance(value, Vector)
        own, theirs = self._own[index], self._theirs[peer, index]
        # Everybody takes two locks in the same order. Parts are let go of in between: nobody waits for a whole model.
        first, second = (monitor, theirs.lock) if self._rank < peer else (theirs.lock, monitor)
        parts = _parts(value)
        answers = parts if into is None else _parts(into)
        # Who only warns reads some parts of each call, others in each turn.
        turn, turns = None if self.inspector is None else self.inspector.next_turn(), min(len(parts), TURNS)
        work = zip(parts, answers, own.parts, theirs.parts, self._scratch[index], strict=True)
        for number, (part, answer, mine, stand_in, scratch) in enumerate(work):
            whole, there = partial(_whole, own.vector, number), stand_in.x
            assert isinstance(there, Vector)
            with first, second:
                # Before it is averaged into the other's model: whoever met that next would blame the wrong worker.
                looks = self.inspector is not None and self.inspector.looks_first
                refused = looks and not self._admits(part, self._rank, peer, index, whole)
                # What is refused is taken as if it were the same as there: nothing changes.
                given = LentVector(scratch.buffers, there if refused else part)
                reply = answered_at_once(self._algorithm, stand_in, self._rank, given)
                assert isinstance(reply, Vector)
                is_read = self.inspector is not None and (turn is None or number % turns == turn % turns)
                if is_read and not is_finite(reply):  # because one of them is not, or both
                    admits = self._admits(part, self._rank, peer, index, whole)
                    if not (self._admits(there, peer, self._rank, index, whole) and admits):
                        continue
                if request.then is not None:
                    request.then(mine, reply)
                elif into is not None:
                    answer.copy_(reply)
        with theirs.lock:
            theirs.lock.numbers[_ANSWERED] += 1

    def _admits(self, part: Vector, source: int, receiver: int, index: int, whole: Callable[[Vector], Vector]) -> bool:
        assert self.inspector is not None
        return self.inspector.admits(part, source, index, partial(whole, part), receiver)

    def _model(self, memory: Tensor, like: Vector, owner: int) -> _Model:
        header = memory[:_HEADER_BYTES]
        lock = ModelLock(header, owner, self._rank, self._timeout_seconds, self._failures, self._check)
        vector = Vector(views_of(memory, _HEADER_BYTES, like))
        return _Model(lock, vector, tuple(Worker(owner, self._world_size, part, part) for part in _parts(vector)))


def _parts(vector: Vector) -> list[Vector]:
    return vector.parts(_PART_BYTES)


def _whole(like: Vector, number: int, part: Vector) -> Vector:
    """Make a vector with one part, and zeros for the rest."""
    whole = like.empty_like()
    for buffer in whole.buffers:
        buffer.zero_()
    _parts(whole)[number].copy_(part)
    return whole
