"""Lanes: threads that do one thing after the other, and a relay that carries coroutines from lane to lane.

A worker's exchanges must be begun in the same order as everybody else's, and waited for beside the computation. A lane
gives both. The communicator of gossip has one; the exchange of DDP's gradients has several, so that one message is on
its way while others are made and read.

Work that may have to wait for other workers is a generator, which says so before it does (`Pausing`). So a thread can
do it as far as nothing has to be waited for (`Paused`), and leave the rest to a lane.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_Item = tuple["Future[Any]", Callable[[], Any], "torch.cuda.Event | None"]
Pause = Callable[[float], bool] | None
"""What some work waits for: called with seconds, it waits so long at most, and tells whether the work can go on. None:
only the work itself can wait, on a lane."""
Pausing = Generator[Pause, None, T]
"""Work that yields before it waits for other workers."""


def beside(function: Callable[[], T], name: str, seconds: float, look: Callable[[], None]) -> T:
    """Return the result of something that may wait for ever, done on a thread that is left to itself if need be.

    Args:
        function: to be called there.
        name: of the thread.
        seconds: between two looks.
        look: called now and then meanwhile; raises where it is no use to wait any longer.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    while True:
        try:
            return future.result(timeout=seconds)
        except FutureTimeoutError:
            if future.done():  # the error is of the function
                raise
        look()


def finished(work: Pausing[T]) -> T:
    """Do all of some work, waiting where it has to; returns its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


class Paused(Future[T]):
    """Work that the thread which has asked for it does itself: until its first pause now, the rest later.

    Args:
        work: what.

    Attributes:
        pause: what it waits for now, if it is not done.
    """

    def __init__(self, work: Pausing[T]) -> None:
        super().__init__()
        self._work = work
        self.pause: Pause = None
        self._do(partial(next, work))

    def go_on(self, seconds: float) -> bool:
        """Go on; returns whether all is done, well or not, before a pause is longer than so many seconds."""
        while not self.done():
            try:
                if self.pause is None or not self.pause(seconds):
                    return False
            except BaseException as error:
                self.fail(error)
            else:
                self._do(partial(next, self._work))
        return True

    def fail(self, error: BaseException) -> None:
        """Let an error end the work where it waits."""
        self._do(partial(self._work.throw, error))

    def finish(self) -> None:
        """Do the rest, waiting where it has to; on any thread."""
        try:
            self.set_result(finished(self._work))
        except BaseException as error:
            self.set_exception(error)

    def _do(self, part: Callable[[], Pause]) -> None:
        try:
            self.pause = part()
        except StopIteration as end:
            self.set_result(end.value)
        except BaseException as error:
            self.set_exception(error)


class Lane:
    """A thread that does what it is given, in that order.

    On a GPU all of it runs on one stream, behind what the thread that gave it had submitted to its own stream by then.

    Args:
        name: of the thread.
        stream: on which everything runs; ``None`` on a CPU.

    Example:
        >>> lane = Lane("lane")
        >>> lane.submit(lambda: 6 * 7).result()
        42
        >>> lane.close()
        True
    """

    def __init__(self, name: str, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._last: weakref.ref[Future[Any]] | None = None  # of what was submitted; kept by the queue until it is done
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Do something after all that was submitted before.

        Returns:
            What tells the result, or the error.
        """
        future: Future[T] = Future()
        self._last = weakref.ref(future)
        event = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._queue.put((future, function, event))
        return future

    @property
    def idle(self) -> bool:
        """Whether everything that was submitted is done."""
        last = None if self._last is None else self._last()
        return last is None or last.done()

    def close(self, timeout_seconds: float | None = None) -> bool:
        """End the thread once it has done what it was given.

        Args:
            timeout_seconds: for how long to wait for that; ``None``: as long as it takes.

        Returns:
            Whether it has ended. Ask again to go on waiting.
        """
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP counts threads per calling thread
        if self._stream is not None:
            torch.cuda.set_device(self._stream.device)  # a new thread begins on device 0
            torch.cuda.set_stream(self._stream)
        while (item := self._queue.get()) is not None:
            future, function, event = item
            try:
                if event is not None and self._stream is not None:
                    self._stream.wait_event(event)
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del item, future, function, event  # or the result would stay until there is something else to do


class Relay:
    """Carries coroutines over several lanes, so that each works on one while the messages of others are on their way.

    A coroutine awaits *requests*. One that it makes on a lane is begun there; the next lane waits for the answer, and
    goes on with the coroutine until its next request::

        lane 0    compress 1 | compress 2 | compress 3 |
        lane 1               | average 1  | average 2  | average 3 |
        lane 2                            | decode 1   | decode 2  | decode 3

    Every lane takes coroutines in the order in which they were started. So if all workers start the same ones in the
    same order, all begin the same requests on each lane in the same order: a process group for each lane is enough to
    match them. A coroutine moves on with at most one request fewer than there are lanes; there may be others, for which
    the lane waits itself, so that nothing else is begun on it meanwhile.

    Args:
        lanes: at least one.
        begin: begins a request on the lane with this number; returns what waits for its answer, and whether the lane
            waits itself.
    """

    def __init__(self, lanes: Sequence[Lane], begin: Callable[[Any, int], tuple[Callable[[], Any], bool]]) -> None:
        self._lanes = lanes
        self._begin = begin

    def start(
        self,
        coroutines: Callable[[], Iterable[Coroutine[Any, Any, None]]],
        failures: list[BaseException],
        done: Callable[[], None],
    ) -> None:
        """Start several coroutines on the first lane, one after the other, and return at once.

        Args:
            coroutines: makes them, on that lane; the next one when the one before it has made its first request.
            failures: gets what any of them raises. As soon as there is something in it nothing of them is run any more,
                nor of others with the same list.
            done: is called once when all have ended, on the lane where the last one did, with failures or without; it
                must not raise.
        """
        party = _Party(failures, done)

        def begin() -> None:
            with torch.no_grad():
                try:
                    if not failures:
                        for coroutine in coroutines():
                            party.enter()
                            self._advance(0, coroutine, None, party)
                            if failures:
                                break
                except BaseException as error:
                    failures.append(error)
                finally:
                    party.leave()

        self._lanes[0].submit(begin)

    def _advance(self, number: int, coroutine: Coroutine[Any, Any, None], answer: Any, party: _Party) -> None:
        """Run a coroutine on this lane until its next request, begin that, and let the next lane wait for it."""
        try:
            stays = True
            while stays:
                request = coroutine.send(answer)
                if number + 1 == len(self._lanes):
                    raise RuntimeError(
                        f"Got a request on lane {number} ({request}), need none there: it is the last. Make at most "
                        f"{number} requests."
                    )
                wait, stays = self._begin(request, number)
                answer = wait() if stays else None
        except BaseException as error:
            if not isinstance(error, StopIteration):
                party.failures.append(error)
            self._end(coroutine, party)
            return

        def go_on() -> None:
            with torch.no_grad():
                try:
                    received = None if party.failures else wait()
                except BaseException as error:
                    party.failures.append(error)
                if party.failures:
                    self._end(coroutine, party)
                else:
                    self._advance(number + 1, coroutine, received, party)

        self._lanes[number + 1].submit(go_on)

    def _end(self, coroutine: Coroutine[Any, Any, None], party: _Party) -> None:
        coroutine.close()
        party.leave()


class _Party:
    """Coroutines that were started together, and whoever starts them: the last one to leave says so."""

    def __init__(self, failures: list[BaseException], done: Callable[[], None]) -> None:
        self.failures = failures
        self._done = done
        self._present = 1
        self._lock = threading.Lock()

    def enter(self) -> None:
        with self._lock:
            self._present += 1

    def leave(self) -> None:
        with self._lock:
            self._present -= 1
            last = self._present == 0
        if last:
            self._done()
