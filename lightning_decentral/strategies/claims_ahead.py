"""Batches of a shared epoch that are claimed before they are needed, where a claim takes long against a step."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_SHORT = 0.02  # of a step: a claim that takes no longer is made when its batch is needed
_MOST = 16  # batches of one claim
_APART = 0.02  # seconds from one claim beside steps to the next: each wakes a thread, which a short step feels
_LATEST = 0.05  # by how much the newest of the times counts in their means
_ENOUGH = 6.0  # steps, so summed, to know how long one takes


class ClaimsAhead:
    """Claims batches for one worker.

    A claim asks a store, which may be far away, or must be woken: milliseconds, in which a short step could be made.
    Where they are more than a fiftieth of a step, claims are made beside the steps, and as many batches at once as are
    used meanwhile, or in a fiftieth of a second. A worker so has batches in hand, which nobody else takes. That may not
    hold up the end of an epoch for the others: none is claimed ahead unless the epoch, at the speed of all workers,
    lasts twice as long as this worker needs for what it has.

    Args:
        claim: claims so many batches of an epoch, and returns their numbers, as they are counted by all workers; a
            number beyond the last one of the epoch says that nothing is left. It is called by one thread at a time, and
            given which batches are in hand.
    """

    def __init__(self, claim: Callable[[int, int, list[int]], list[int]]) -> None:
        self._claim = claim
        self._held: deque[int] = deque()
        self._asked: Future[list[int]] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._claim_seconds = self._busy = self._steps = 0.0  # the last two: sums in which older ones count less
        self._epoch, self._first, self._began, self._given = -1, 0, 0.0, 0.0

    def next(self, epoch: int, total: int) -> int:
        """Return the number of the next batch.

        Args:
            epoch: of which it is.
            total: how many the epoch has, counted as claims are.
        """
        if epoch != self._epoch:
            self._forget()
        else:
            self._busy = (1.0 - _LATEST) * self._busy + time.monotonic() - self._given
            self._steps = (1.0 - _LATEST) * self._steps + 1.0
        if not self._held:
            self._held.extend(self._came() or self._make(epoch, 1, []))
        number, now = self._held.popleft(), time.monotonic()
        if epoch != self._epoch:
            self._epoch, self._first, self._began = epoch, number, now
        elif self._asked is None:
            self._ask(epoch, number, total, now)
        self._given = time.monotonic()
        return number

    def in_hand(self) -> list[int]:
        """Return the numbers that were claimed and not given out; waits for a claim under way."""
        self._held.extend(self._came())
        return list(self._held)

    def close(self) -> None:
        """End the thread, and forget what is in hand."""
        self._forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _ask(self, epoch: int, number: int, total: int, now: float) -> None:
        """Claim ahead, if that pays and holds up nobody."""
        step = self._busy / self._steps
        if self._steps < _ENOUGH or self._claim_seconds <= _SHORT * step or number <= self._first:
            return
        if len(self._held) >= _steps_in(self._claim_seconds, step):
            return
        count = _steps_in(max(self._claim_seconds, _APART), step)
        left = (total - number) * (now - self._began) / (number - self._first)  # seconds of this epoch
        while count and left <= 2 * (len(self._held) + count + 1) * step:
            count -= 1
        if count:
            self._thread = self._thread or ThreadPoolExecutor(1, "decentral-claims")
            self._asked = self._thread.submit(self._make, epoch, count, list(self._held))

    def _came(self) -> list[int]:
        """Return what was claimed ahead; waits for it."""
        asked, self._asked = self._asked, None
        return asked.result() if asked is not None else []

    def _make(self, epoch: int, count: int, held: list[int]) -> list[int]:
        began = time.monotonic()
        numbers = self._claim(epoch, count, held)
        seconds = time.monotonic() - began
        self._claim_seconds += (seconds - self._claim_seconds) * (_LATEST if self._claim_seconds else 1.0)
        return numbers

    def _forget(self) -> None:
        """Drop what is in hand of an epoch that has ended early; a claim under way may fail, as that epoch is over."""
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.exception()  # waits
        self._held.clear()


def _steps_in(seconds: float, step: float) -> int:
    """Count the steps that a worker begins in so many seconds, up to the most that it may claim at once."""
    return _MOST if seconds > _MOST * step else math.ceil(seconds / step)
