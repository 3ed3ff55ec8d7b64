"""What all that moves bytes has in common: process groups, shared memory, a lane, and who was lost when one fails.

Two workers that send to each other at once on one gloo group reach two thirds of the line rate; with a group for each
direction they reach it all. gloo moves CPU tensors only between two workers: GPU tensors go through pinned memory.
Workers of one host exchange through memory that they share (`shared_memory`).
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lightning_decentral.errors import ConfigurationError, ProtocolError
from lightning_decentral.flat import Vector
from lightning_decentral.traffic import Traffic
from lightning_decentral.transport.edges import break_connection
from lightning_decentral.transport.gathering import gather_objects
from lightning_decentral.transport.lagging import Lagging
from lightning_decentral.transport.lanes import Lane, Paused, Pausing, beside, finished
from lightning_decentral.transport.leases import Leases
from lightning_decentral.transport.liveness import Watch, meet
from lightning_decentral.transport.poison import Inspector
from lightning_decentral.transport.shared_memory import SharedMemory

FAILED_SECONDS = 3.0  # how long a failing worker waits for its threads, which end when the others' connections close
_POLL_SECONDS = 0.2
_STILL_SECONDS, _LOOK_SECONDS = 3.0, 0.5  # a heart that stands still for so long is lost; how often it is looked at


@dataclass(frozen=True)
class ConnectionSettings:
    """How the workers of a run reach each other, and how long they wait.

    Args:
        device: where the vectors are.
        main_address: where worker 0 can be reached.
        exchange_timeout_seconds: after which an exchange has failed.
        meeting_timeout: for what all workers do together at the end of an epoch, waiting for the slowest included.
        shared_memory: whether workers of one host exchange with and call each other through shared memory where they
            can.
        watch: what `meet` has given, if the workers have met already.
    """

    device: torch.device
    main_address: str
    exchange_timeout_seconds: float
    meeting_timeout: timedelta
    shared_memory: bool
    watch: Watch | None = None


class AbstractConnections(ABC):
    """The connections of one worker with all others, and the lane on which it waits for them.

    Args:
        settings: how they reach each other.
        place: the rank and the largest number of workers at the start, of a run whose workers come and go; none of them
            is connected with others here, then.

    Attributes:
        watch: who is alive.
        inspector: looks at the models that are received, once there is one.
        leases: the memory of what is received.
        shared: the memory that is shared with other workers of the host.
        groups: of all workers: one for each direction of exchanges, one for meetings; the same one thrice if all share
            memory, since each has a thread of its own; none of a worker alone.
        crowded: whether the workers of this host have no core to spare: then a second thread only takes turns.
        native: whether the device's own back end moves its vectors.
        sent: what this worker sent and waited for, but for calls that callers have answered themselves.
        silent: tells who shows no sign of life, of workers that nothing else would tell about.
        late: whether somebody had to wait for what was waited for last.
        lagging: looks for workers that have begun fewer exchanges, where these must be equally many on all.

    Must be made by all workers together, after `torch.distributed` has been initialized.
    """

    def __init__(self, settings: ConnectionSettings, place: tuple[int, int] | None = None) -> None:
        self.rank, self.world_size = place or (dist.get_rank(), dist.get_world_size())
        self.device = device = settings.device
        self.timeout_seconds = settings.exchange_timeout_seconds
        self.timeout = timedelta(seconds=settings.exchange_timeout_seconds)
        self.meeting_timeout = settings.meeting_timeout
        self.native = place is None and device.type == "cuda" and "nccl" in dist.get_backend()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leases = Leases(device)
        self.watch = settings.watch
        self.groups: list[Any] = []
        self.inspector: Inspector | None = None
        self.silent: Callable[[], tuple[int, ...]] = tuple
        self.late = True
        self.lagging: Lagging | None = None
        self.shared = SharedMemory(self.rank, self.timeout_seconds)
        self.sent = Traffic()
        self._counting = threading.Lock()  # the lane and the edges' threads count
        self._buffers: dict[object, Vector] = {}
        self.crowded = False
        self._lane: Lane | None = None
        self._paused: Paused[Any] | None = None  # what was begun last, if it is not done and not the lane's
        self._beside: dict[int, Lane] = {}  # that work beside that one, by their keys
        self._looked = 0.0  # when hearts were looked at last
        if place is not None:
            self._lane = Lane(f"decentral-lane-{self.rank}", self.stream)
        elif self.world_size > 1:
            if self.watch is None:
                self.watch = meet(settings.main_address, self.rank, self.world_size, self.timeout_seconds)
            backend = "nccl" if self.native else "gloo"
            if settings.shared_memory and not self.native:
                self.connecting(self._meet_in_shared_memory)
            timeouts = (self.timeout, self.timeout, settings.meeting_timeout)
            near = self.shared.connects(range(self.world_size))
            for timeout in timeouts[-1:] if near else timeouts:
                self.groups.append(self.connecting(partial(dist.new_group, backend=backend, timeout=timeout)))
            if near:
                self.groups *= len(timeouts)
            if self.shared.peers and device.type == "cpu":
                threads = (len(self.shared.peers) + 1) * torch.get_num_threads()
                self.crowded = threads >= len(os.sched_getaffinity(0))
            self._lane = Lane(f"decentral-lane-{self.rank}", self.stream)

    def _meet_in_shared_memory(self) -> None:
        self.shared.accept(gather_objects(self.shared.connect(gather_objects(self.shared.listen()))))

    def connecting(self, function: Callable[[], Any]) -> Any:
        """Return the result of something that connects workers; raises soon when one of them is lost, though it would
        wait."""

        def connect() -> Any:
            if self.stream is not None:
                torch.cuda.set_device(self.device)
            return function()

        def look() -> None:
            self.check()
            if self.watch is not None and (lost := self.watch.standing_still()):
                raise RuntimeError(f"Workers {list(lost)} stood still while all were connecting.")

        with self.failures(self.others):
            return beside(connect, f"connecting-{self.rank}", _POLL_SECONDS, look)

    @property
    def store(self) -> dist.Store:
        """A key-value store that all workers share."""
        if self.watch is None:
            raise ConfigurationError("One worker alone has no store: make sure that world_size > 1 before asking.")
        return self.watch.store

    @property
    def meeting_device(self) -> torch.device:
        """Where what all workers gather lies: the device of the back end that moves it."""
        return self.device if self.native else torch.device("cpu")

    # -- the lane -----------------------------------------------------------------------------------------------------

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Do something on the lane, after what was submitted or started before."""
        self.hand_over()
        if self._lane is not None:
            return self._lane.submit(function)
        future: Future[Any] = Future()  # alone: nothing to wait for
        future.set_result(function())
        return future

    def start(self, work: Pausing[Any]) -> Future[Any]:
        """Begin something, after what was submitted or started before.

        Where cores are `crowded` this thread does it: now what need not wait, and the rest when it is waited for. The
        lane does what only a lane can wait for, and whatever is not done when something else is asked for.
        """
        if not (self.crowded and self.idle):
            return self.submit(partial(finished, work))
        paused = Paused(work)
        if not paused.done():
            self._paused = paused
            if paused.pause is None:
                self.hand_over()
        return paused

    def start_beside(self, key: int, work: Pausing[Any]) -> Future[Any]:
        """Begin something beside all else, but for what was begun so with the same key."""
        self.hand_over()
        if key not in self._beside:
            self._beside[key] = Lane(f"decentral-lane-{self.rank}-{key}", self.stream)
        return self._beside[key].submit(partial(finished, work))

    def hand_over(self) -> None:
        """Let the lane do what this thread has begun and has not waited for yet."""
        paused, self._paused = self._paused, None
        if paused is not None and self._lane is not None:
            self._lane.submit(paused.finish)

    @property
    def idle(self) -> bool:
        """Whether all is done that was submitted or started."""
        lanes = (self._lane, *self._beside.values())
        return self._paused is None and all(lane is None or lane.idle for lane in lanes)

    def wait(self, future: Future[Any]) -> Any:
        """Return the result of something submitted or started; raises at once when another worker has failed."""
        if self._paused is not None:
            if self._paused is future:
                self._finish(self._paused)
            self.hand_over()
        self.late, since = not future.done(), time.monotonic()
        while True:
            try:
                answer = future.result(timeout=_POLL_SECONDS if self.watch is not None else None)
            except FutureTimeoutError:
                self.check()
                if self.lagging is not None:
                    self.lagging.look(since)
                continue
            if self.stream is not None:
                torch.cuda.current_stream().wait_stream(self.stream)
            return answer

    def _finish(self, paused: Paused[Any]) -> None:
        """Do the rest of what was started, or as much as needs no lane."""
        deadline, since = 0.0, time.monotonic()
        while not paused.go_on(_POLL_SECONDS):
            if paused.pause is None:
                return
            self.check()
            if self.lagging is not None:
                self.lagging.look(since)
            deadline = deadline or time.monotonic() + self.timeout_seconds
            if time.monotonic() > deadline:
                paused.fail(TimeoutError(f"Nothing has come for {self.timeout_seconds:g} s."))
        self._paused = None

    def check(self) -> None:
        """Raise what ended the run elsewhere, if anything did."""
        if self.watch is not None and (failure := self.watch.failure) is not None:
            raise failure
        if silent := self.silent():
            with self.failures(silent):
                raise TimeoutError(f"Workers {silent} have shown no sign of life for {self.timeout_seconds:g} s.")

    def check_waiting(self, since: float) -> None:
        """Raise what ended the run elsewhere, or who is lost, for somebody who waits for no connection.

        Args:
            since: when it began to wait, by ``time.monotonic``.
        """
        self.check()
        now = time.monotonic()
        if self.watch is None or now - since < _LOOK_SECONDS or now < self._looked + _LOOK_SECONDS:
            return
        self._looked = now
        if lost := self.watch.standing_still(_STILL_SECONDS):
            with self.failures(lost):
                raise TimeoutError(f"Workers {list(lost)} have shown no sign of life for {_STILL_SECONDS:g} s.")

    def drain(self) -> None:
        """Wait until everything submitted so far is done."""
        self.wait(self.submit(lambda: None))
        for lane in self._beside.values():
            self.wait(lane.submit(lambda: None))

    # -- failures and the end -----------------------------------------------------------------------------------------

    @contextmanager
    def failures(self, peers: tuple[int, ...]) -> Iterator[None]:
        """Turn a transport's error into who was lost, and tell the others."""
        try:
            yield
        except ProtocolError:  # the method is wrong, and no connection
            raise
        except (RuntimeError, OSError) as error:
            if self.watch is None:
                raise
            failure = self.watch.diagnose(error, peers)
            self.watch.publish(failure)
            raise failure from error

    @property
    def others(self) -> tuple[int, ...]:
        """All ranks but this one."""
        return tuple(rank for rank in range(self.world_size) if rank != self.rank)

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """End the threads and connections; all workers together unless ``failed``."""

    def _disconnect(self, failed: bool) -> None:
        """End what is opened here."""
        if failed:
            self._paused = None
            self.shared.interrupt()  # the lane may be waiting there
        self.hand_over()
        if self._lane is not None:
            ended = self._lane.close(FAILED_SECONDS if failed else self.timeout_seconds)
            if failed and not ended:  # it meets the others, one of whom has stopped
                self._break_groups()
                self._lane.close(FAILED_SECONDS)
            self._lane = None
        for lane in self._beside.values():
            lane.close(FAILED_SECONDS if failed else self.timeout_seconds)
        self._beside.clear()
        self.shared.close()
        for group in dict.fromkeys(self.groups):
            if not failed or self.device.type == "cpu":
                dist.destroy_process_group(group)
        self.groups = []
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        self._buffers.clear()
        self.leases.clear()

    def _break_groups(self) -> None:
        for group in dict.fromkeys(self.groups):
            backend = group._get_backend(torch.device("cpu"))
            if isinstance(backend, dist.ProcessGroupGloo):
                for peer in self.others:
                    break_connection(backend, peer)

    # -- memory -------------------------------------------------------------------------------------------------------

    def buffer(self, key: object, like: Vector, pinned: bool = False) -> Vector:
        """Return the buffer of this name, of the shape of ``like``, made when it is first needed."""
        kept = self._buffers.get(key)
        if kept is None or [(b.shape, b.dtype) for b in kept.buffers] != [(b.shape, b.dtype) for b in like.buffers]:
            device = torch.device("cpu") if pinned else self.device
            kept = self._buffers[key] = Vector(
                torch.empty(b.shape, dtype=b.dtype, device=device, pin_memory=pinned) for b in like.buffers
            )
        return kept

    def staged(self, key: object, vector: Vector, stage: bool, copy: bool = False) -> Vector:
        """Return ``vector`` itself, or a pinned CPU buffer in its place where the transport cannot read the device."""
        if not stage:
            return vector
        pinned = self.buffer(key, vector, pinned=True)
        return pinned.copy_(vector) if copy else pinned

    # -- traffic ------------------------------------------------------------------------------------------------------

    def count(self, num_bytes: int, messages: int, exchanges: int = 0, calls_answered: int = 0) -> None:
        """Count what was sent."""
        with self._counting:
            self.sent.bytes_sent += num_bytes
            self.sent.messages += messages
            self.sent.exchanges += exchanges
            self.sent.calls_answered += calls_answered
