"""Where what is received lies, for as long as anybody refers to it.

Each exchange receives into buffers of its own, so that any number may be under way at once. A buffer is free again when
nobody refers to the vector any more: a method with one exchange at a time has no more memory than for that one.

What comes from a worker of the same host lies in *its* memory, and nothing was copied. It stays there until the worker
asks for something more; whoever still refers to it then gets a copy.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.flat import Vector

_LAYOUTS = 4  # of which free buffers are kept


class Received(Vector):
    """A vector that was received.

    Attributes:
        home: where its buffers go when nobody refers to it any more; none if they belong to another worker.
    """

    __slots__ = ("home",)

    def __init__(self, buffers: Iterable[Tensor], home: Leases | None = None) -> None:
        super().__init__(buffers)
        self.home = home

    def __del__(self) -> None:
        if self.home is not None:
            self.home.give_back(self.buffers)


class Leases:
    """The buffers of one worker for what it receives.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: OrderedDict[object, list[tuple[tuple[Tensor, ...], Any]]] = OrderedDict()
        self._lock = threading.RLock()  # a vector may end, and come here, wherever memory is asked for
        self._submitted: Counter[int] = Counter()
        self._borrowed: dict[int, list[weakref.ref[Received]]] = {}

    @property
    def free_bytes(self) -> int:
        """The bytes of the buffers that are kept for the next exchanges."""
        with self._lock:
            return sum(Vector(buffers).num_bytes for free in self._free.values() for buffers, _ in free)

    def new(self, like: Vector) -> Vector:
        """Return a vector of the shape of ``like`` with undefined values."""
        return self._new(like)

    def _new(self, like: Vector) -> Received:
        with self._lock:
            free = self._free.get(_layout(like.buffers))
            buffers, event = free.pop() if free else (None, None)
        if buffers is None:
            buffers = tuple(torch.empty(b.shape, dtype=b.dtype, device=self._device) for b in like.buffers)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        return Received(buffers, self)

    def give_back(self, buffers: tuple[Tensor, ...]) -> None:
        """Take buffers back: whoever used them last has nothing more to do with them but what it has begun."""
        event = torch.cuda.current_stream().record_event() if self._device.type == "cuda" else None
        with self._lock:
            layout = _layout(buffers)
            self._free.setdefault(layout, []).append((buffers, event))
            if layout in self._free:  # another vector may have ended meanwhile
                self._free.move_to_end(layout)
            while len(self._free) > _LAYOUTS:
                self._free.popitem(last=False)

    def submitted(self, index: int) -> int:
        """Return a worker asks for something for the ``index``-th model; gives the number that `borrow` needs.

        What it has borrowed until now, and still refers to, is copied.
        """
        with self._lock:
            self._submitted[index] += 1
            self.secure(index)
            return self._submitted[index]

    def borrow(self, vector: Vector, index: int, number: int) -> Vector:
        """Return a vector in another worker's memory, received for what was submitted as ``number``."""
        received = Received(vector.buffers)
        with self._lock:
            self._borrowed.setdefault(index, []).append(weakref.ref(received))
            if self._submitted[index] > number:  # it may be read while more is received
                self.secure(index)
        return received

    def secure(self, index: int) -> None:
        """Copy what is borrowed and still referred to: its owner may write there again after this."""
        with self._lock:
            for reference in self._borrowed.pop(index, []):
                vector = reference()
                if vector is not None:
                    copy = self._new(vector)
                    copy.copy_(vector)
                    vector.buffers, vector.home, copy.home = copy.buffers, self, None

    def trim(self) -> None:
        """Let go of the memory that nobody uses now."""
        with self._lock:
            self._free.clear()

    def clear(self) -> None:
        """Let go of all memory."""
        with self._lock:
            self._free.clear()
            self._borrowed.clear()


def _layout(buffers: Iterable[Tensor]) -> object:
    return tuple((buffer.dtype, buffer.numel()) for buffer in buffers)
