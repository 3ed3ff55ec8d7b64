"""Room for a few answers that are sent at a time, each of which has a copy of a model."""

from __future__ import annotations

import threading
from collections import deque

_MOST = 3  # they keep a link busy
_PATIENCE = 4  # times what the quickest of the last ones took
_FIRST_PATIENCE_SECONDS = 1.0
_REMEMBERED = 8


class Sending:
    """Counts the answers that are being sent; whoever has the next one waits while there are many.

    An answer is made when there is room for it, so that it says what holds then, and the memory of a worker that many
    call does not grow with their number. Nobody waits for long: where those that are being sent go to slow workers, the
    others are held up once, until these are done.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)  # that the last ones took
        self._waited_in_vain = False

    def begin(self) -> None:
        """Wait for room, and take it."""
        with self._changed:
            if not self._waited_in_vain:
                patience = _PATIENCE * min(self._seconds) if self._seconds else _FIRST_PATIENCE_SECONDS
                self._waited_in_vain = not self._changed.wait_for(lambda: self._under_way < _MOST, patience)
            self._under_way += 1

    def end(self, seconds: float | None = None) -> None:
        """Give the room back.

        Args:
            seconds: that sending took; none if nothing was sent.
        """
        with self._changed:
            self._under_way -= 1
            if seconds is not None:
                self._seconds.append(seconds)
            if self._under_way < _MOST:
                self._waited_in_vain = False
                self._changed.notify()
