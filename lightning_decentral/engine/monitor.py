"""A worker's monitor: a lock with a condition that also orders the CUDA streams of the threads that take turns."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import torch


class Monitor:
    """A lock around a worker that also orders the CUDA streams of the threads that take turns.

    Attributes:
        outer: a second lock, if any, which other processes take too, that is held with it.
        turns: how often somebody had the worker to itself; who waits does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.outer: AbstractContextManager[object] | None = None
        self.turns = 0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self._entered = 0
        self._cuda = device.type == "cuda"
        self._event: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self.outer is not None and self._entered == 0:
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
            if self.outer is not None:
                self.outer.__exit__(None, None, None)
            self.turns += 1
            if self._waiting:
                self._changed.notify_all()
        self._lock.release()

    def end_turn(self) -> None:
        """Let all who wait look again; to be called by who has entered, and is about to wait."""
        self.turns += 1
        self._changed.notify_all()

    def wake(self) -> None:
        """Let all who wait look again, unless somebody has the worker, who does so at the end."""
        if self._lock.acquire(blocking=False):
            self._changed.notify_all()
            self._lock.release()

    def wait(self, seconds: float) -> None:
        """Give the worker up until somebody else has had it, or for so long; to be called by who has entered once."""
        assert self._entered == 1
        if self._cuda:
            self._event = torch.cuda.current_stream().record_event()
        self._entered = 0
        if self.outer is not None:
            self.outer.__exit__(None, None, None)
        self._waiting += 1
        try:
            self._changed.wait(seconds)
        finally:
            self._waiting -= 1
            self._entered = 1
            if self.outer is not None:
                self.outer.__enter__()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
