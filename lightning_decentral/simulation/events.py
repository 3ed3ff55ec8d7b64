"""Virtual time: what happens when, in order."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

Event = tuple[float, int, Callable[..., None], Any, Any]
"""When, its number, and what happens: a function of two arguments."""


class Clock:
    """A virtual clock, and what is to happen later; at one time in the order in which it was said.

    Attributes:
        seconds: the time.
        events: what is to happen, as a heap.
        count: how much has happened; who looks twice knows whether anything has.
    """

    __slots__ = ("_order", "count", "events", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: list[Event] = []
        self.count = 0
        self._order = itertools.count()

    def at(self, second: float, action: Callable[..., None], first: Any, other: Any) -> None:
        """Call ``action(first, other)`` at a time."""
        heapq.heappush(self.events, (second, next(self._order), action, first, other))

    def advance(self) -> None:
        """Go on to what happens next."""
        self.seconds, _, action, first, other = heapq.heappop(self.events)
        self.count += 1
        action(first, other)

    def keep(self, wanted: Callable[[Event], bool]) -> None:
        """Drop what is to happen, but for some of it."""
        self.events = [event for event in self.events if wanted(event)]
        heapq.heapify(self.events)
