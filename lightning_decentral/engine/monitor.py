"""A worker's monitor: a lock that orders the CUDA streams of the threads that take turns as well."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch


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
