"""Room for a few answers that are sent at a time, each of which has a copy of a model."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import deque

_MOST = 3  # they keep a link busy
_PATIENCE = 8.0  # times what one takes, by the median of the last ones
_FIRST_PATIENCE_SECONDS = 1.0
_REMEMBERED = 9


class Sending:
    """Counts the answers that are being sent; whoever has the next one waits while there are many.

    An answer is made when there is room for it, so that it says what holds then, and the memory of a worker that many
    call does not grow with their number. One that takes much longer than the others do, because it goes to a slow
    worker, is not counted any more: it holds nobody up for long.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._began: dict[int, float] = {}  # when, by the number of the answer
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)  # that the last ones took

    def begin(self) -> int:
        """Wait for room, and take it; returns a number for `end`."""
        with self._changed:
            while len(counted := self._seconds_left()) >= _MOST:
                self._changed.wait(min(counted))
            number = next(self._numbers)
            self._began[number] = time.monotonic()
            return number

    def end(self, number: int, seconds: float | None = None) -> None:
        """Give the room back.

        Args:
            number: that `begin` has returned.
            seconds: that sending took; none if nothing was sent.
        """
        with self._changed:
            del self._began[number]
            if seconds is not None:
                self._seconds.append(seconds)
            self._changed.notify()

    def _seconds_left(self) -> list[float]:
        """Return for how long each answer that is being sent will be counted, of those that are."""
        patience = _PATIENCE * statistics.median(self._seconds) if self._seconds else _FIRST_PATIENCE_SECONDS
        now = time.monotonic()
        return [left for began in self._began.values() if (left := began + patience - now) > 0]
