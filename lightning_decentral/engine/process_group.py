"""The process-group interpreter: one real worker per process, on `torch.distributed`.

`Communicator` moves vectors; its exchanges end on one background thread (the *lane*), in the order in which they were
begun, so that a worker can compute meanwhile. `Stepper` drives one algorithm's coroutine for one optimizer's
parameters and stops where the training loop has to compute the gradient or apply the update.

Two workers that send to each other at once on one gloo group reach two thirds of the line rate; with a group for each
direction they reach it all. gloo moves CPU tensors only between two workers: GPU tensors go through pinned memory.
Workers of one host exchange through memory that they share (`shared_memory`).
"""

from __future__ import annotations

import dataclasses
import queue
import struct
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.conduct import Conduct, UnderWay
from lightning_decentral.engine.tensors import give
from lightning_decentral.errors import ConfigurationError, PoisonedMessage, ProtocolError
from lightning_decentral.flat import FlatParameters, Vector
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
from lightning_decentral.simulation.cluster import Traffic, all_reduce_bytes, call_part_bytes
from lightning_decentral.transport.edges import AbstractAnswer, Edges, break_connection
from lightning_decentral.transport.leases import Leases
from lightning_decentral.transport.liveness import Watch, meet
from lightning_decentral.transport.poison import Inspector, is_finite
from lightning_decentral.transport.shared_calls import SharedCalls
from lightning_decentral.transport.shared_memory import SharedMemory
from lightning_decentral.worker import Worker

MEETING_NUMBERS = 12  # that every worker may bring to a meeting of all
_MEETING_NAME = 40  # bytes of what a meeting is for
_POLL_SECONDS = 0.2
_FAILED_SECONDS = 3.0  # how long a failing worker waits for its threads, which end when the others' connections close
_PART_SLOTS = 3  # buffers for each caller: two receive, while the answer in another leaves
_PROBED_FIRST, _PROBED_EVERY = 8, 64  # steps in which changes are looked for that autograd does not count
_REDUCE_CHUNK = 1 << 23  # elements of half precision that are reduced in float32 at a time


_STOP = object()  # a handler's answer that the training loop has to give
_NOTHING: Future[Any] = Future()  # an answer that was used
_NOTHING.set_result(None)


class _FutureTicket(Ticket[Any]):
    __slots__ = ("future", "work")

    def __init__(self, work: AbstractRequest[Any] | Steps[Any]) -> None:
        self.future: Future[Any] = Future()
        self.work: AbstractRequest[Any] | Steps[Any] | None = work  # none once it is an average that was applied


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

    @property
    def peers(self) -> tuple[int, ...]:
        """Who takes part."""
        return (*self.request.receive_from, *self.request.send_to)


class Monitor:
    """A lock around a worker that also orders the CUDA streams of the threads that take turns.

    Attributes:
        outer: a second lock, which other processes take too, that is held with it.
    """

    def __init__(self, device: torch.device) -> None:
        self.outer: AbstractContextManager[object] = nullcontext()
        self._lock = threading.RLock()
        self._entered = 0
        self._cuda = device.type == "cuda"
        self._event: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._entered == 0:
            try:
                self.outer.__enter__()
            except BaseException:
                self._lock.release()
                raise
        self._entered += 1
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._event = torch.cuda.current_stream().record_event()
        self._entered -= 1
        if self._entered == 0:
            self.outer.__exit__(None, None, None)
        self._lock.release()


class Communicator:
    """Moves vectors between the workers of a run, on a thread of its own.

    Args:
        device: where the vectors are.
        main_address: where worker 0 can be reached.
        exchange_timeout_seconds: after which an exchange has failed.
        meeting_timeout: for what all workers do together at the end of an epoch, waiting for the slowest included.
        shared_memory: whether workers of one host exchange with and call each other through shared memory where they
            can.
        watch: what `meet` has given, if the workers have met already.

    Attributes:
        watch: who is alive.
        inspector: looks at the models that are received, once there is one.

    Must be made by all workers together, after `torch.distributed` has been initialized.
    """

    def __init__(
        self,
        device: torch.device,
        main_address: str,
        exchange_timeout_seconds: float,
        meeting_timeout: timedelta,
        shared_memory: bool,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self._traffic = Traffic()
        self._timeout_seconds = exchange_timeout_seconds
        self._timeout = timedelta(seconds=exchange_timeout_seconds)
        self._native = device.type == "cuda" and "nccl" in dist.get_backend()
        self._stage_exchanges = device.type == "cuda" and not self._native
        self._stage_calls = device.type == "cuda"  # the edges are gloo's, whatever the back end
        self._counting = threading.Lock()  # the lane and the edges' threads count
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[object, Vector] = {}
        self.leases = Leases(device)
        self._busy: Counter[int] = Counter()  # exchanges under way, by model
        self._part_buffers: dict[int, list[Tensor]] = {}
        self.serving = threading.Lock()  # held while a call is answered at once, in the one buffer for that
        self._edges: Edges | None = None
        self._calls: SharedCalls | None = None
        self._queue: queue.SimpleQueue[tuple[Future[Any], Any, Any] | None] = queue.SimpleQueue()
        self.watch = watch
        self._groups: list[Any] = []
        self._lane: threading.Thread | None = None
        self.inspector: Inspector | None = None
        self._late = True  # whether somebody had to wait for what was waited for last
        self._last: weakref.ref[Future[Any]] | None = None  # of what was submitted; the lane keeps it until it is done
        self._shared = SharedMemory(self.rank, exchange_timeout_seconds)
        if self.world_size > 1:
            if watch is None:
                self.watch = meet(main_address, self.rank, self.world_size, exchange_timeout_seconds)
            backend = "nccl" if self._native else "gloo"
            for timeout in (self._timeout, self._timeout, meeting_timeout):
                self._groups.append(self._connecting(partial(dist.new_group, backend=backend, timeout=timeout)))
            if shared_memory and not self._native:
                self._connecting(self._meet_in_shared_memory)
            self._lane = threading.Thread(target=self._work, name=f"decentral-lane-{self.rank}", daemon=True)
            self._lane.start()

    def _meet_in_shared_memory(self) -> None:
        self._shared.accept(gather_objects(self._shared.connect(gather_objects(self._shared.listen()))))

    def _connecting(self, function: Callable[[], Any]) -> Any:
        """The result of something that connects workers; raises soon when one of them is lost, though it would wait."""
        future: Future[Any] = Future()

        def connect() -> None:
            try:
                if self._stream is not None:
                    torch.cuda.set_device(self.device)
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=connect, name=f"connecting-{self.rank}", daemon=True).start()
        with self._failures(self._others()):
            while True:
                try:
                    return future.result(timeout=_POLL_SECONDS)
                except FutureTimeoutError:
                    if future.done():  # the error is of the function
                        raise
                    self.check()
                    if self.watch is not None and (lost := self.watch.standing_still()):
                        raise RuntimeError(f"Workers {list(lost)} stood still while all were connecting.") from None

    @property
    def store(self) -> dist.Store:
        """A key-value store that all workers share."""
        if self.watch is None:
            raise ConfigurationError("One worker alone has no store: make sure that world_size > 1 before asking.")
        return self.watch.store

    @property
    def traffic(self) -> Traffic:
        """What this worker sent and waited for."""
        self._count_answers()
        return self._traffic

    def _count_answers(self) -> None:
        if self._calls is not None:  # by which callers have answered themselves
            for num_bytes in self._calls.uncounted():
                self.count_answer(num_bytes)

    def lend(self, stepper: Stepper) -> None:
        """Let the parameters lie where calls need them. Between two steps, all workers together."""
        if self._calls is not None:
            self._count_answers()  # of the model in whose place this one comes
            with self._failures(tuple(self._calls.peers)):
                stepper.lend(self._calls)

    # -- the lane -----------------------------------------------------------------------------------------------------

    def submit(self, function: Any) -> Future[Any]:
        """Run ``function()`` on the lane, after what was submitted before."""
        future: Future[Any] = Future()
        self._last = weakref.ref(future)
        event = torch.cuda.current_stream().record_event() if self._stream is not None else None
        if self._lane is None:  # alone: nothing to wait for
            future.set_result(function())
        else:
            self._queue.put((future, function, event))
        return future

    def begin(
        self, request: NeighborExchange, index: int, average: NeighborAverage | None = None, number: int = 0
    ) -> Future[dict[int, Vector] | Vector]:
        """Begin a `NeighborExchange` of the ``index``-th model.

        Its answer is what was received; or, if the value is that model's parameters and ``average`` says what shall
        become of them, that average, where it needs no memory but what is there anyway.

        If nothing is under way, and the last exchange was waited for, the first bytes leave before this returns, as
        many as the connection takes at once: the lane would have to wait for Python's lock first, while the link is
        idle. Exchanges that end in time anyway are handed over by the lane, beside the gradient.
        """
        if self.device.type == "cpu" and self._late and self._idle:
            exchange = self._post(request, index, average, number)
            return self.submit(lambda: self._complete(exchange))
        self._note_busy(index, 1)  # from now on, and not only when the lane comes to it
        return self.submit(lambda: self.exchange(request, index, average, number, noted=True))

    @property
    def _idle(self) -> bool:
        """Whether the lane has done all that it was given."""
        last = None if self._last is None else self._last()
        return last is None or last.done()

    def wait(self, future: Future[Any]) -> Any:
        """The result of something submitted; raises at once when another worker has failed."""
        self._late = not future.done()
        while True:
            try:
                answer = future.result(timeout=_POLL_SECONDS if self.watch is not None else None)
            except FutureTimeoutError:
                self.check()
                continue
            if self._stream is not None:
                torch.cuda.current_stream().wait_stream(self._stream)
            return answer

    def check(self) -> None:
        """Raise what ended the run elsewhere, if anything did."""
        if self.watch is not None and (failure := self.watch.failure) is not None:
            raise failure
        if self._calls is not None and (silent := self._calls.silent()):
            with self._failures(silent):
                raise TimeoutError(f"Workers {silent} have shown no sign of life for {self._timeout_seconds:g} s.")

    def drain(self) -> None:
        """Wait until everything submitted so far is done."""
        self.wait(self.submit(lambda: None))

    def _work(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP counts threads per calling thread
        if self._stream is not None:
            torch.cuda.set_device(self.device)  # a new thread begins on device 0
            torch.cuda.set_stream(self._stream)
        while (item := self._queue.get()) is not None:
            future, function, event = item
            try:
                if event is not None and self._stream is not None:
                    self._stream.wait_event(event)
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del item, future, function, event  # or the answer would stay until there is something else to do

    # -- what runs on the lane ----------------------------------------------------------------------------------------

    def exchange(
        self,
        request: NeighborExchange,
        index: int,
        average: NeighborAverage | None = None,
        number: int = 0,
        noted: bool = False,
    ) -> dict[int, Vector] | Vector:
        """Answer a `NeighborExchange` of the ``index``-th model, as `begin` does."""
        exchange = self._post(request, index, average, number)
        if noted:
            self._note_busy(index, -1)
        return self._complete(exchange)

    def _note_busy(self, index: int, change: int) -> None:
        with self._counting:
            self._busy[index] += change

    def _post(self, request: NeighborExchange, index: int, average: NeighborAverage | None, number: int) -> _Exchange:
        """Hand gloo what goes to other hosts and comes from them; it moves the bytes on a thread of its own."""
        self._note_busy(index, 1)
        value, near = request.value, self._shared.peers
        assert isinstance(value, Vector)
        received = {source: value if source in near else self.leases.new(value) for source in request.receive_from}
        exchange = _Exchange(request, value, average if self.device.type == "cpu" else None, index, number, received)
        if self._native:
            return exchange
        with self._failures(exchange.peers):
            stage = self._stage_exchanges
            targets = [target for target in request.send_to if target not in near]
            outgoing = self._staged((index, "out"), value, stage, copy=True) if targets else value
            exchange.far = {source: vector for source, vector in received.items() if source not in near}
            for slot, (source, vector) in enumerate(exchange.far.items()):
                exchange.incoming[source] = self._staged((index, "stage", slot), vector, stage)
            works = exchange.works
            for source, vector in exchange.incoming.items():
                group = self._groups[source < self.rank]
                works += [group.recv([buffer.view(torch.uint8)], source, 0) for buffer in vector.buffers]
            for target in targets:
                group = self._groups[self.rank < target]
                works += [group.send([buffer.view(torch.uint8)], target, 0) for buffer in outgoing.buffers]
        return exchange

    def _complete(self, exchange: _Exchange) -> dict[int, Vector] | Vector:
        """Exchange with the workers of this host, wait for the others, and average."""
        try:
            return self._answer(exchange)
        finally:
            self._note_busy(exchange.index, -1)

    def _answer(self, exchange: _Exchange) -> dict[int, Vector] | Vector:
        request, value, index, received = exchange.request, exchange.value, exchange.index, exchange.received
        if not exchange.peers:
            return {}
        near = self._shared.peers
        lies_there = exchange.average is not None and bool(near)
        memory = 2 * index + lies_there  # of the parameters, or of messages
        answer: dict[int, Vector] | Vector = received
        with self._failures(exchange.peers):
            if self._native:
                self._exchange_nccl(value, request, received)
                self._inspect(exchange)
            else:
                self._release(index)  # what came before in this step
                near_targets = near.intersection(request.send_to)
                if near_targets or lies_there:
                    self._shared.send(value, memory, near_targets, lies_there)
                for source in near.intersection(request.receive_from):
                    shared = self._shared.receive(source, memory, value)
                    if self._stage_exchanges:
                        received[source] = self.leases.new(value).copy_(shared)
                    elif exchange.average is not None:  # used at once
                        received[source] = shared
                    else:
                        received[source] = self.leases.borrow(shared, index, exchange.number)
                for work in exchange.works:
                    work.wait(self._timeout)
                _unstage(exchange.incoming, exchange.far)
                self._inspect(exchange)
                if exchange.average is not None and (lies_there or received):
                    # What was received from another host has memory of its own, to which the average may go.
                    answer = self._shared.room(memory) if lies_there else next(iter(received.values()))
                    exchange.average.apply(received, into=answer)
                    self._release(index)
        self._count(value.num_bytes * len(request.send_to), len(request.send_to), exchanges=1)
        return answer

    def _inspect(self, exchange: _Exchange) -> None:
        """Put this worker's own value in the place of what is not finite, if that is refused."""
        if self.inspector is not None:
            for source, message in exchange.received.items():
                if not self.inspector.admits(message, source, exchange.index):
                    # What another worker shares must not be written to.
                    room = message if source in exchange.far else message.empty_like()
                    exchange.received[source] = room.copy_(exchange.value)

    def release(self, index: int) -> None:
        """A step of the ``index``-th model is over: what it has received, its senders need not keep any longer."""
        if not self._busy[index]:  # or the lane does it, with the next exchange
            self._release(index)

    def _release(self, index: int) -> None:
        self.leases.secure(index)
        self._shared.done(2 * index)
        self._shared.done(2 * index + 1)

    def _exchange_nccl(self, value: Vector, request: NeighborExchange, received: dict[int, Vector]) -> None:
        group = self._groups[0]
        operations = [
            dist.P2POp(dist.irecv, buffer, source, group) for source, v in received.items() for buffer in v.buffers
        ]
        operations += [
            dist.P2POp(dist.isend, buffer, target, group) for target in request.send_to for buffer in value.buffers
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        # The host waits too: a stream that waits for a lost peer can be neither interrupted nor named.
        done, deadline = torch.cuda.current_stream().record_event(), time.monotonic() + self._timeout_seconds
        while not done.query():
            if time.monotonic() > deadline:
                raise RuntimeError(f"The exchange was not done after {self._timeout_seconds} s.")
            time.sleep(1e-4)

    def all_reduce(self, value: Vector) -> Vector:
        """Replace ``value`` by the mean over all workers, in its own precision."""
        if self.world_size == 1:
            return value
        with self._failures(self._others()):
            for buffer in value.buffers:
                # Dividing first keeps half precision from overflowing; torch's DDP does the same.
                dist.all_reduce(buffer.mul_(1.0 / self.world_size), group=self._groups[0])
        self._count(all_reduce_bytes(value.num_bytes, self.world_size), 1, exchanges=1)
        return value

    def consensus_(self, value: Vector) -> Vector:
        """Replace ``value`` by the mean over all workers, summed in float32 at least. Not counted as traffic."""
        if self.world_size == 1:
            return value
        with self._failures(self._others()):
            takes_part, count = True, self.world_size
            if self.inspector is not None and self.inspector.refuses:
                takes_part = is_finite(value)
                finite = torch.tensor([float(takes_part)], device=self.device if self._native else "cpu")
                dist.all_reduce(finite, group=self._groups[2])
                count = int(finite)
                takes_part = takes_part or count == 0  # the mean of nothing but NaN is NaN
                count = count or self.world_size
            # A power of two: a sum of large values does not overflow, and all others have the same bits.
            share = 0.5 ** (self.world_size - 1).bit_length()
            for buffer in value.buffers:
                if not takes_part:
                    buffer.zero_()
                if buffer.dtype not in (torch.float16, torch.bfloat16):
                    dist.all_reduce(buffer.mul_(share), group=self._groups[2])
                    buffer.div_(count * share)
                    continue
                for chunk in buffer.split(_REDUCE_CHUNK):
                    total = chunk.float().mul_(share)
                    dist.all_reduce(total, group=self._groups[2])
                    chunk.copy_(total.div_(count * share))
        return value

    def call(self, request: Call, stepper: Stepper) -> Vector | None:
        """Answer a `Call`."""
        value, index = request.value, stepper.index
        assert isinstance(value, Vector)
        assert self._edges is not None
        calls = self._calls
        if calls is not None and request.peer in calls.peers:
            shared = self.leases.new(value) if request.then is None else None
            calls.call(request, index, stepper.monitor, shared)
            self._count(value.num_bytes, 1, exchanges=1)
            return shared
        answer = self.leases.new(value)
        with self._failures((request.peer,)):
            incoming = {request.peer: self._staged((index, "answer", "stage"), answer, self._stage_calls)}
            outgoing = self._staged((index, "call"), value, self._stage_calls, copy=True)
            self._edges.call(request.peer, index, _bytes(outgoing), _bytes(incoming[request.peer]))
            _unstage(incoming, {request.peer: answer})
        self._count(value.num_bytes, 1, exchanges=1)
        admitted = self.inspector is None or self.inspector.admits(answer, request.peer, index)
        if request.then is None:
            return answer if admitted else answer.copy_(value)
        if not admitted:
            return None
        with stepper.monitor:
            request.then(stepper.worker, answer)
        return None

    def agree(self, value: float, operation: str = "mean", what: str = "a meeting of all workers") -> float:
        """One number of every worker, reduced: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``; see `meet` for ``what``.

        Raises:
            ConfigurationError: on all workers, if one of them is at another kind of meeting.
        """
        values: list[float] = [struct.unpack("d", struct.pack("q", row[0]))[0] for row in self.meet(what, _bits(value))]
        if operation == "mean":
            return sum(values) / len(values)
        if operation == "sum":
            return sum(values)
        return min(values) if operation == "min" else max(values)

    def meet(self, what: str, *numbers: int) -> list[list[int]]:
        """Wait for everybody; a few integers of every worker, by rank, of equally many on all.

        Workers that would meet for different things, because one has done something that another has not, would read
        each other's bytes as something else, or wait. Here they notice.

        Args:
            what: the workers meet for, as it is named in messages.
            numbers: at most `MEETING_NUMBERS`.

        Raises:
            ConfigurationError: on all workers, if one of them is at another kind of meeting.
        """
        if self.world_size == 1:
            return [list(numbers)]
        text = what.encode()[:_MEETING_NAME].ljust(_MEETING_NAME)
        own = [*struct.unpack(f"{_MEETING_NAME // 8}q", text), *numbers]
        own += [0] * (_MEETING_NAME // 8 + MEETING_NUMBERS - len(own))

        def gather() -> list[list[int]]:
            with self._failures(self._others()):
                return gather_numbers(own, self.device if self._native else torch.device("cpu"), self._groups[2])

        rows: list[list[int]] = self.wait(self.submit(gather))
        names = [struct.pack(f"{_MEETING_NAME // 8}q", *row[: _MEETING_NAME // 8]).decode().strip() for row in rows]
        if len(set(names)) > 1:
            where = "; ".join(
                f"worker{'s' * (names.count(name) > 1)} "
                f"{', '.join(str(rank) for rank, other in enumerate(names) if other == name)} at {name}"
                for name in dict.fromkeys(names)
            )
            raise ConfigurationError(
                f"The workers do not do the same: {where}. What all workers do together, they must do equally often "
                "and in the same order. Look for a gathered list that is longer on some workers (stack or concatenate "
                "it first), a value logged with sync_dist=True, a checkpoint or a collective on some workers only."
            )
        return [row[_MEETING_NAME // 8 :][: len(numbers)] for row in rows]

    def gather(self, value: bytes) -> list[bytes]:
        """What every worker passed, by rank. All workers together; not counted as traffic."""
        if self.world_size == 1:
            return [value]
        device = self.device if self._native else torch.device("cpu")
        lengths = [row[0] for row in self.meet("a gathering of values", len(value))]

        def gather_padded() -> list[bytes]:
            with self._failures(self._others()):
                padded = torch.frombuffer(bytearray(value.ljust(max(lengths) or 1)), dtype=torch.uint8)
                rows = list(torch.empty(self.world_size, len(padded), dtype=torch.uint8, device=device))
                dist.all_gather(rows, padded.to(device), group=self._groups[2])
            return [row.cpu().numpy().tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]

        answer: list[bytes] = self.wait(self.submit(gather_padded))
        return answer

    def average_floating(self, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous floating-point and complex tensors by their mean over all workers, at any device.

        All workers together, with the same shapes and types; one reduction per type. Not counted as traffic.
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            dtype = torch.float32 if real.element_size() == 1 else real.dtype  # there is no sum of float8
            by_dtype.setdefault(dtype, []).append(real)
        if not tensors or self.world_size == 1:
            return
        packed = Vector(
            torch.cat([real.reshape(-1).to(self.device, dtype) for real in group]) for dtype, group in by_dtype.items()
        )
        self.wait(self.submit(lambda: self.consensus_(packed)))
        for buffer, group in zip(packed.buffers, by_dtype.values(), strict=True):
            for real, part in zip(group, buffer.split([real.numel() for real in group]), strict=True):
                real.copy_(part.view(real.shape))

    def take_from_zero(self, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous tensors by those of worker 0. All workers together; not counted as traffic."""
        if not tensors or self.world_size == 1:
            return
        device = self.device if self._native else torch.device("cpu")
        packed = torch.cat([tensor.reshape(-1).view(torch.uint8).to(device) for tensor in tensors])

        def broadcast() -> None:
            with self._failures(self._others()):
                dist.broadcast(packed, 0, group=self._groups[2])

        self.wait(self.submit(broadcast))
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        for tensor, part in zip(tensors, packed.split(sizes), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # a part may begin at an odd byte

    def barrier(self, what: str = "a meeting of all workers") -> None:
        """Wait for everybody; raises when another worker fails meanwhile, or is at another kind of meeting."""
        self.meet(what)

    # -- calls --------------------------------------------------------------------------------------------------------

    def open_edges(self, algorithm: AbstractAsynchronousAlgorithm, steppers: Sequence[Stepper]) -> None:
        """Connect to those that this worker may call and that may call it. All workers together."""
        if self.world_size == 1:
            return
        callees = algorithm.peers(self.rank)
        callers = [rank for rank in range(self.world_size) if self.rank in algorithm.peers(rank)]

        def answer(source: int, index: int) -> AbstractAnswer:
            if self._stream is not None:
                torch.cuda.set_device(self.device)
                torch.cuda.set_stream(self._stream)
            if algorithm.answers_in_parts:
                return _AnswerInParts(self, steppers[index], source)
            return _AnswerAtOnce(self, steppers[index], source)

        if algorithm.answers_in_parts and self.device.type == "cpu" and self._shared.peers:
            self._calls = SharedCalls(
                *(self.rank, self.world_size, self._shared, algorithm),
                *(self._timeout_seconds, self._failures, self.check),
            )
            self._calls.inspector = self.inspector
            for stepper in steppers:
                self.lend(stepper)
            assert self.watch is not None
            self.watch.on_beat = self._calls.beat
        edges = (self.rank, callees, callers, self.store, self._timeout_seconds, answer, self._edge_failed)
        self._edges = self._connecting(lambda: Edges(*edges))

    def _edge_failed(self, peer: int, error: Exception) -> None:
        assert self.watch is not None
        if self.watch.failure is None:
            poisoned = isinstance(error, PoisonedMessage)
            self.watch.publish(error if poisoned else self.watch.diagnose(error, (peer,)))

    def close(self, failed: bool = False) -> None:
        """End the threads and connections; all workers together unless ``failed``."""
        if self._edges is not None:
            self._edges.close(_FAILED_SECONDS if failed else self._timeout_seconds, failed)
            self._edges = None
        if failed:
            self._shared.interrupt()  # the lane may be waiting there
        if self._lane is not None:
            self._queue.put(None)
            self._lane.join(timeout=_FAILED_SECONDS if failed else self._timeout_seconds)
            if failed and self._lane.is_alive():  # it meets the others, one of whom has stopped
                self._break_groups()
                self._lane.join(timeout=_FAILED_SECONDS)
            self._lane = None
        self._shared.close()
        for group in self._groups:
            if not failed or self.device.type == "cpu":
                dist.destroy_process_group(group)
        self._groups = []
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        self._calls = None
        self._buffers.clear()
        self.leases.clear()
        self._part_buffers.clear()

    def _break_groups(self) -> None:
        for group in self._groups:
            backend = group._get_backend(torch.device("cpu"))
            if isinstance(backend, dist.ProcessGroupGloo):
                for peer in self._others():
                    break_connection(backend, peer)

    # -- memory -------------------------------------------------------------------------------------------------------

    def _buffer(self, key: object, like: Vector, pinned: bool = False) -> Vector:
        """The buffer of this name, of the shape of ``like``, made when it is first needed."""
        kept = self._buffers.get(key)
        if kept is None or [(b.shape, b.dtype) for b in kept.buffers] != [(b.shape, b.dtype) for b in like.buffers]:
            device = torch.device("cpu") if pinned else self.device
            kept = self._buffers[key] = Vector(
                torch.empty(b.shape, dtype=b.dtype, device=device, pin_memory=pinned) for b in like.buffers
            )
        return kept

    def _staged(self, key: object, vector: Vector, stage: bool, copy: bool = False) -> Vector:
        """``vector`` itself, or a pinned CPU buffer in its place where the transport cannot read the device."""
        if not stage:
            return vector
        pinned = self._buffer(key, vector, pinned=True)
        return pinned.copy_(vector) if copy else pinned

    def serving_buffers(self, stepper: Stepper) -> tuple[Vector, Vector]:
        """Where the call that is being answered is received: on the device, and where the transport writes it."""
        own = self._buffer((stepper.index, "serve"), stepper.x)
        return own, self._staged((stepper.index, "serve", "stage"), own, self._stage_calls)

    def part_buffers(self, source: int, count: int, num_bytes: int) -> list[Tensor]:
        """Some buffers for the parts of a caller's calls, of at least so many bytes each."""
        kept = self._part_buffers.setdefault(source, [])
        if len(kept) < count or kept[0].numel() < num_bytes:
            pin = self._stage_calls
            kept[:] = [torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pin) for _ in range(count)]
        return kept[:count]

    def count_answer(self, num_bytes: int) -> None:
        """A call was answered with so many bytes."""
        self._count(num_bytes, 1, calls_answered=1)

    def _count(self, num_bytes: int, messages: int, exchanges: int = 0, calls_answered: int = 0) -> None:
        with self._counting:
            self._traffic.bytes_sent += num_bytes
            self._traffic.messages += messages
            self._traffic.exchanges += exchanges
            self._traffic.calls_answered += calls_answered

    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.world_size) if rank != self.rank)

    @contextmanager
    def _failures(self, peers: tuple[int, ...]) -> Iterator[None]:
        """Turn a transport's error into who was lost, and tell the others."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            if self.watch is None:
                raise
            failure = self.watch.diagnose(error, peers)
            self.watch.publish(failure)
            raise failure from error


class Stepper:
    """Drives one algorithm for the parameters of one optimizer.

    The training loop calls, for each step: `begin` (exchanges start), the forward and backward passes,
    `after_gradient` (whatever the algorithm does with the gradient), the update inside `updating`, and `finish`.

    User code may change parameters while they are exchanged: in a forward pass, by a step of an optimizer of its own,
    by ``weight.data = ...``. A *guarded* stepper shows it a copy then, and adds by how much it was changed to the
    model; an unguarded one lets the values count that user code has set, and is guarded from then on.

    Args:
        algorithm: resolved for this world size.
        parameters: the optimizer's parameters.
        communicator: moves the vectors.
        index: the optimizer's number.
        seed: that all workers share.
        guarded: whether user code is expected to change parameters in the middle of a step. Costs a copy of the model,
            and three passes over it in each step.

    Attributes:
        worker: what the algorithm sees.
        flat: the parameters.
        x: this worker's own model.
        snapshot: the model at which the gradient is taken; the same object as ``x`` for most synchronous algorithms.
        guarded: whether user code sees a copy.
        updated: whether an update was made in this step.
        reads_gradients: whether the algorithm exchanges gradients.
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        parameters: Sequence[torch.nn.Parameter],
        communicator: Communicator,
        index: int,
        seed: int,
        guarded: bool = False,
    ) -> None:
        self.algorithm = algorithm
        self.communicator = communicator
        self.index = index
        self.flat = FlatParameters(parameters)
        self.monitor = Monitor(communicator.device)
        self.x = self.flat.x
        self._separate = isinstance(algorithm, AbstractAsynchronousAlgorithm) and communicator.world_size > 1
        self.snapshot = self.x.clone() if self._separate else self.x
        self.worker = Worker(communicator.rank, communicator.world_size, self.x, self.snapshot)
        self.worker.read_gradient = self._read_gradient
        self._seed = seed + 1_000_003 * index
        self.worker.seed(self._seed)
        self.guarded = guarded
        self.updated = False
        self.reads_gradients = algorithm.exchanges_gradients
        self._gradient: Vector | None = None
        self._coroutine: Steps[None] | None = None
        self._reached: AbstractRequest[Any] | None = None
        self._copy: Vector | None = None  # that user code sees, if guarded
        self._copied: Vector | None = None  # of what, while it does
        self._shown = self.x  # what the parameters are views of, but for evaluation
        self._versions = self.flat.versions()
        self._fingerprint: list[int] | None = None
        self._calls: SharedCalls | None = None  # by which others change the parameters
        self._answered = 0  # calls, by their callers, that the worker's version counts
        self.conduct = Conduct(algorithm, self.worker)
        self._handlers: dict[type, Callable[[Any], Any]] = {
            Gradient: self._stop_at,
            LocalStep: self._stop_at,
            NeighborExchange: self._answer,
            NeighborAverage: self._answer,
            AllReduce: self._answer,
            Call: self._answer,
            Until: self._not_yet,
            Send: self._not_yet,
            Receive: self._not_yet,
            Start: self._start,
            Ticket: self._take,
        }
        algorithm.init(self.worker)
        # An algorithm may take its gradients at a vector of its own, which its steps set.
        self._ahead = self.worker.snapshot is not self.snapshot
        assert isinstance(self.worker.snapshot, Vector)
        self.snapshot = self.worker.snapshot

    def lend(self, calls: SharedCalls) -> None:
        """Let the parameters lie where other workers of this host reach them; between steps, all workers together."""
        self.flat.swap(self.x, calls.lend(self.index, self.x))
        self.flat.lent = self.x
        self.monitor.outer = calls.lock(self.index)
        self._calls = calls

    @property
    def active(self) -> bool:
        """Whether a step has begun and not finished."""
        return self._coroutine is not None

    @property
    def awaits_gradient(self) -> bool:
        """Whether a step has begun, and its gradient is not there yet."""
        return isinstance(self._reached, Gradient)

    def begin(self, gradient_is_there: bool = False) -> None:
        """Begin a step: the parameters are the snapshot from here to the update.

        Args:
            gradient_is_there: whether the gradient was computed already, at what user code sees now.
        """
        if not gradient_is_there:
            self.settle(show=False)
            self._take_snapshot()
        self.conduct.begin()
        self._coroutine = self.algorithm.step(self.worker)
        self._reached = self._advance(None)
        if self._reached is None:
            self.conduct.end()  # refuses a step without a gradient
        self.updated = False
        if not gradient_is_there:
            self._show(self.snapshot, copy=self.guarded)
            self._fingerprint = self._shown.fingerprint() if self._is_probed else None

    def after_gradient(self) -> None:
        """The gradient is there: go on to the update."""
        set_by_user = [] if self.guarded or self.reads_gradients else self._set_by_user()
        apart = self._stays_apart
        changes = self._take_changes()
        self.updated |= changes is not None or bool(set_by_user)
        self.conduct.gradient_is_there()
        self._reached = self._advance(None)
        if apart:
            self._measure_staleness()
            self._take_snapshot()  # with what has been averaged meanwhile
            assert self._copy is not None
            self._copy.add_(self.snapshot)  # it held the changes
            self._copied = self.snapshot
            return
        target = self._target
        with self.monitor:
            if changes is not None:
                target.add_(changes)
            if set_by_user:
                views = self.flat.layout.views(target)
                for position, value in set_by_user:
                    views[position].copy_(value)
                self.guarded = True

    @contextmanager
    def updating(self) -> Iterator[bool]:
        """Holds the worker still while the optimizer updates ``x``; yields whether the algorithm wants an update.

        May be entered again in the same step: what follows the first update is this worker's own affair.
        """
        if self._stays_apart:
            self.flat.bind(self._shown)
            self.flat.sparsify_gradients()
            yield not self.active or isinstance(self._reached, LocalStep)
            return
        with self.monitor:
            changes = self._take_changes()
            target = self._target
            if changes is not None:
                target.add_(changes)
            self.flat.bind(target)
            if not self.updated:
                self._measure_staleness()
            self.flat.sparsify_gradients()
            yield not self.active or isinstance(self._reached, LocalStep)

    def show_updated(self) -> None:
        """Let the parameters be the updated model, for what user code does in the rest of the batch."""
        if self._stays_apart:
            return
        if self._separate:
            self._take_snapshot()
            self._show(self.snapshot)
        else:
            self._show(self._target)

    def show_gradient(self) -> bool:
        """Let parameters have the gradient that the algorithm has made, where it is not zero; tell if there is any."""
        assert self._gradient is not None
        found = False
        for parameter, view in zip(self.flat.parameters, self.flat.layout.views(self._gradient), strict=True):
            shown = bool(view.any())
            parameter.grad = view if shown else None
            found |= shown
        self.flat.sparsify_gradients()
        return found

    def finish(self, updated: bool) -> None:
        """The update was made (or skipped): run the rest of the step."""
        apart = self._stays_apart
        if not apart:
            with self.monitor:
                changes = self._take_changes()
                if changes is not None:
                    self._target.add_(changes)
                self.worker.version += int(updated or changes is not None)
        if isinstance(self._reached, LocalStep):
            self._reached = self._advance(updated)
        self.conduct.end()
        self._coroutine = None
        self.communicator.release(self.index)
        self.worker.step += 1
        if not apart:
            self._show_idle()

    @property
    def changed_in_place(self) -> bool:
        """Whether user code has changed parameters in place since they were shown to it (not through ``.data``)."""
        return self._versions != self.flat.versions()

    def settle(self, show: bool = True) -> None:
        """Let ``x`` have what user code has changed since the last step.

        Args:
            show: whether user code sees parameters after this, before the next step begins.
        """
        if self.active:
            return
        with self.monitor:
            sees_copy = self._copied is not None
            changes = self._take_changes()
            if changes is not None:
                self.x.add_(changes)
                self.worker.version += 1
            replaced = bool(self.flat.collect())
            if self._separate and (replaced or self.changed_in_place):
                self.guarded = True  # calls of others change x while it does so
        if sees_copy and show:
            self.show_apart()

    def show_apart(self) -> None:
        """Let user code see a copy of an asynchronous worker's model, until a step begins.

        What it puts in the place of parameters, and takes out again, does not get into the memory that others read.
        """
        if self._separate and not self.active and self._copied is None:  # or it would lose what has changed
            self._take_snapshot()
            self._show(self.snapshot, copy=True)

    @property
    def _is_probed(self) -> bool:
        """Whether this step looks for changes that autograd does not count: two passes over the model."""
        step = self.worker.step
        may_be_lost = not (self.guarded or self.reads_gradients)
        return may_be_lost and (step < _PROBED_FIRST or step % _PROBED_EVERY == 0)

    @property
    def _target(self) -> Vector:
        """What the optimizer changes."""
        at = self._reached.at if isinstance(self._reached, LocalStep) else None
        assert at is None or at is self.snapshot
        return self.x if at is None else self.snapshot

    @property
    def _stays_apart(self) -> bool:
        """Whether user code and optimizer have a copy to themselves, and others see what they have made of it at once.

        Who calls must not meet a model that the optimizer has changed, and a constraint has not been put on yet.
        """
        return self._separate and self.guarded and self._copied is not None

    def _measure_staleness(self) -> None:
        self._note_answers()
        self.worker.staleness = self.worker.version - self.worker.snapshot_version

    def _take_snapshot(self) -> None:
        with self.monitor:
            if self._separate:
                self.snapshot.copy_(self.x)
            self._note_answers()
            self.worker.snapshot_version = self.worker.version

    def _show_idle(self) -> None:
        """Let the parameters be the model between two steps: a copy of a guarded one that calls may change."""
        if self._separate and self.guarded:
            self.show_apart()
        else:
            self._show(self.x)

    def _show(self, vector: Vector, copy: bool = False) -> None:
        """Let the parameters be views of a vector, or of a copy of it."""
        self._copied = vector if copy else None
        if copy:
            if self._copy is None:
                self._copy = self.x.empty_like()
            vector = self._copy.copy_(vector)
        self._shown = vector
        self.flat.bind(vector)
        self._versions = self.flat.versions()

    def _take_changes(self) -> Vector | None:
        """By how much user code has changed the copy that it saw, if it has; the copy is used up."""
        copied, self._copied = self._copied, None
        if copied is None:
            return None
        self.flat.collect()
        assert self._copy is not None
        changes = self._copy.add_(copied, alpha=-1.0)
        return changes if any(bool(buffer.any()) for buffer in changes.buffers) else None

    def _set_by_user(self) -> list[tuple[int, Tensor]]:
        """Parameters that user code has changed since the step began, with the values that it has given them."""
        replaced = self.flat.collect()
        now = self.flat.versions()
        changed = [i for i, (before, after) in enumerate(zip(self._versions, now, strict=True)) if before != after]
        changed = sorted({*replaced, *changed})
        if not changed and self._fingerprint is not None and self._fingerprint != self._shown.fingerprint():
            changed = list(range(len(now)))  # through ``.data``, which autograd does not count
        return [(i, self.flat.parameters[i].detach().clone()) for i in changed]

    def answer(
        self, source: int, theirs: Vector, part: Vector | None = None, whole: Callable[[], Vector] | None = None
    ) -> Vector:
        """Answer a call of another worker, or a part of it for that part of ``x``; on the thread of its edge.

        Args:
            source: who calls.
            theirs: what it has sent; may be overwritten and returned.
            part: of ``x``, if ``theirs`` is a part.
            whole: makes the model of which ``theirs`` is a part, with zeros for the rest.
        """
        algorithm = self.algorithm
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        inspector = self.communicator.inspector
        if inspector is not None and not inspector.admits(theirs, source, self.index, whole):
            with self.monitor:  # as if the caller had the same: nothing changes here, nor there
                theirs.copy_(self.x if part is None else part)
        with self.monitor:
            worker = self.worker if part is None else dataclasses.replace(self.worker, x=part)
            reply = answered_at_once(algorithm, worker, source, theirs)
            assert isinstance(reply, Vector)
            if reply is not theirs:
                reply = reply.clone()  # as it is now: calls and updates change the worker while it is sent
        return reply

    def answered(self) -> None:
        """A call has been answered to the end."""
        with self.monitor:
            self.worker.version += 1

    def abandon(self) -> None:
        """Drop a step that has begun, so that `x` can be given other values. All workers, with nothing under way."""
        if self._coroutine is not None:
            self._coroutine.close()
            self._coroutine, self._reached = None, None
            self.communicator.release(self.index)
        self._show(self.x)

    def begin_anew(self) -> None:
        """Let the algorithm begin at `x` as it is now, as if there had been no step."""
        worker = self.worker
        with self.monitor:
            worker.state.clear()
            worker.step = worker.version = worker.staleness = worker.snapshot_version = 0
            worker.seed(self._seed)
            self.algorithm.init(worker)
            assert isinstance(worker.snapshot, Vector)
            self.snapshot = worker.snapshot
        self.flat.forget_others(self.snapshot)

    def _note_answers(self) -> None:
        """Count in the worker's version how often callers have changed ``x``."""
        if self._calls is not None:
            with self.monitor:
                answered = self._calls.answered(self.index)
                self.worker.version += answered - self._answered
                self._answered = answered

    def mean(self) -> Vector:
        """The mean of ``x`` over all workers, in new memory. All workers together."""
        self.settle()
        with self.monitor:
            mean = self.x.clone()
        answer: Vector = self.communicator.wait(self.communicator.submit(lambda: self.communicator.consensus_(mean)))
        return answer

    def bind_live(self) -> None:
        """Let the parameters be what training uses, after they were something else."""
        self.flat.bind(self._shown)

    def _read_gradient(self) -> Vector:
        self.reads_gradients = True
        if self._gradient is None:
            self._gradient = self.x.clone()
        return self.flat.gather_gradient(self._gradient)

    # -- the coroutine ------------------------------------------------------------------------------------------------

    def _advance(self, answer: Any) -> AbstractRequest[Any] | None:
        """Run the step until it asks for what the training loop has to do; or to its end."""
        assert self._coroutine is not None
        while True:
            try:
                with self.monitor:
                    request = self._coroutine.send(answer)
            except StopIteration:
                return None
            answer = None  # or what was received would stay in use while the next exchange receives
            self.conduct.ask(request)
            began = time.perf_counter()
            answer = self._handlers[Ticket if isinstance(request, Ticket) else type(request)](request)
            if answer is _STOP:
                reached: AbstractRequest[Any] = request
                return reached
            self.communicator.traffic.exposed_seconds += time.perf_counter() - began

    def _stop_at(self, request: Gradient | LocalStep) -> Any:
        if isinstance(request, LocalStep) and (request.gradient is not None or request.at not in (None, self.snapshot)):
            self._not_yet(request)
        return _STOP

    def _not_yet(self, request: AbstractRequest[Any]) -> NoReturn:
        """Refuse a word that only the simulator answers so far."""
        worker = self.worker
        raise ProtocolError(
            f"{type(self.algorithm).__name__} got, in step {worker.step} of worker {worker.rank}, "
            f"{type(request).__name__}, in a form that real workers do not answer yet; they need a method without it. "
            "Use the simulator, or SimulatedStrategy, for it."
        )

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
        number = self.communicator.leases.submitted(self.index)
        if isinstance(work, NeighborExchange):
            ticket.future = self.communicator.begin(work, self.index, None, number)
        elif isinstance(work, NeighborAverage):
            own = work.exchange.value is self.x and self._calls is None  # others know where it lies
            ticket.future = self.communicator.begin(work.exchange, self.index, work if own else None, number)
        elif isinstance(work, AbstractRequest):
            ticket.future = self.communicator.submit(lambda: self._perform(work, number))
        elif work is not None and under_way is not None:
            ticket.future = self.communicator.submit(lambda: self._run(work, under_way, number))

    def _take(self, ticket: _FutureTicket) -> Any:
        """Wait for an answer; an average becomes the value now."""
        answer = self.communicator.wait(ticket.future)
        self.conduct.take(ticket)
        if not isinstance(ticket.work, NeighborAverage):
            return answer
        average, ticket.work, ticket.future = ticket.work, None, _NOTHING
        if isinstance(answer, Vector):  # the average of the parameters
            self.flat.swap(self.x, answer)
        else:
            average.apply(answer)
        return None

    def _run(self, coroutine: Steps[Any], started: UnderWay, number: int) -> Any:
        """Run a started coroutine, on the lane."""
        answer: Any = None
        while True:
            try:
                with self.monitor:
                    request = coroutine.send(answer)
            except StopIteration as finished:
                return finished.value
            answer = None
            answer = self._perform(request, number, self.conduct.ask_inside(started, request))

    def _perform(self, request: AbstractRequest[Any], number: int, inside: UnderWay | None = None) -> Any:
        """Answer one request of communication, on the lane; ``inside`` a started coroutine."""
        answer: Any
        if isinstance(request, NeighborExchange | NeighborAverage):
            exchange = request.exchange if isinstance(request, NeighborAverage) else request
            answer = self.communicator.exchange(exchange, self.index, None, number)
        elif isinstance(request, AllReduce):
            assert isinstance(request.value, Vector)
            if request.among is not None or request.weight != 1.0:
                self._not_yet(request)
            answer = self.communicator.all_reduce(request.value)
        elif isinstance(request, Send | Receive):
            self._not_yet(request)
        else:
            assert isinstance(request, Call)
            answer = self.communicator.call(request, self)
        if inside is not None:
            self.conduct.answered_inside(inside)
        return request.apply(answer) if isinstance(request, NeighborAverage) else answer


class _AnswerAtOnce(AbstractAnswer):
    """Receives all of a call, then answers it; one at a time, so that all callers share one buffer."""

    whole = True

    def __init__(self, communicator: Communicator, stepper: Stepper, source: int) -> None:
        self._communicator, self._stepper, self._source = communicator, stepper, source

    def __enter__(self) -> AbstractAnswer:
        self._communicator.serving.acquire()
        self._theirs, self._received = self._communicator.serving_buffers(self._stepper)
        self._incoming = _bytes(self._received)
        self._outgoing: list[Tensor] = []
        self.parts = self.slots = len(self._incoming)
        return self

    def __exit__(self, *_: object) -> None:
        self._communicator.serving.release()

    def buffer(self, part: int) -> Tensor:
        return self._incoming[part]

    def reply(self, part: int) -> Tensor:
        if part == 0:
            if self._received is not self._theirs:
                self._theirs.copy_(self._received)
            reply = self._stepper.answer(self._source, self._theirs)
            self._stepper.answered()
            self._communicator.count_answer(reply.num_bytes)
            if self._received is not self._theirs:
                reply = self._received.copy_(reply)  # a copy to the CPU waits for the stream
            self._outgoing = _bytes(reply)
        return self._outgoing[part]


class _AnswerInParts(AbstractAnswer):
    """Answers each part as soon as it is there; several callers at a time, each with a few buffers of its own."""

    whole = False

    def __init__(self, communicator: Communicator, stepper: Stepper, source: int) -> None:
        self._communicator, self._stepper, self._source = communicator, stepper, source

    def __enter__(self) -> AbstractAnswer:
        self._own = _parts(self._stepper.x)
        self.parts = len(self._own)
        largest = max(part.num_bytes for part in self._own)
        self._memory = self._communicator.part_buffers(self._source, min(_PART_SLOTS, self.parts), largest)
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
        reply = self._stepper.answer(self._source, theirs, own, partial(self._whole, part, theirs))
        if part == self.parts - 1:
            self._stepper.answered()
            self._communicator.count_answer(self._stepper.x.num_bytes)
        answer = reply.buffers[0].view(torch.uint8)
        return answer if device.type == "cpu" else received.copy_(answer)

    def _whole(self, part: int, theirs: Vector) -> Vector:
        whole = self._stepper.x.empty_like()
        for buffer in whole.buffers:
            buffer.zero_()
        _parts(whole)[part].copy_(theirs)
        return whole


def _parts(vector: Vector) -> list[Vector]:
    """A vector as the pieces in which it travels."""
    size = call_part_bytes(vector.num_bytes)
    return vector.parts(size - size % 16)  # the types of a vector share the buffers of parts


def _bytes(vector: Vector) -> list[Tensor]:
    """A vector on the CPU as the pieces in which it travels, as bytes."""
    return [part.buffers[0].view(torch.uint8) for part in _parts(vector)]


def _bits(value: float) -> int:
    """The bits of a number in double precision, as an integer."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


def _unstage(staged: dict[int, Vector], vectors: dict[int, Vector]) -> None:
    """Copy what arrived in staging buffers to where it belongs."""
    for source, vector in vectors.items():
        if staged[source] is not vector:
            vector.copy_(staged[source])


def broadcast_from_zero(tensors: Sequence[Tensor]) -> None:
    """Give every worker the values that worker 0 has."""
    if dist.get_world_size() > 1:
        for tensor in tensors:
            # As bytes: gloo knows neither int16 nor float8, and copies nothing that is contiguous.
            value = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            dist.broadcast(value, 0)
            if value.data_ptr() != tensor.data_ptr():
                give(tensor, value.view(tensor.dtype).view(tensor.shape))


def gather_objects(value: Any) -> list[Any]:
    """What every worker passed, by rank."""
    gathered: list[Any] = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def gather_numbers(numbers: Sequence[int], device: torch.device, group: Any = None) -> list[list[int]]:
    """The integers of every worker, by rank, of equally many on all; by default on the group of all."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group)
    return [each.tolist() for each in gathered]


def is_transport_error(error: RuntimeError) -> bool:
    """Whether an error comes from a connection, and so may be the trace of another worker's end."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text
