"""Connections for calls: a caller, a responder, and a thread that answers.

Between two neighbours there is a process group of two for each direction, made directly on the store, so that the loss
of one worker ends its own edges and no other. A call is a header and the caller's vector in parts, each of which is
answered as soon as it is there: the answer travels back while the call is still coming, so a call takes hardly longer
than one message, and its responder needs memory for some parts only. An answer never waits for the training thread.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.traffic import CALL_AHEAD

_CALL, _GOODBYE = 1, 0
_REQUEST, _REPLY = 0, 1  # tags: what a worker sends to a neighbour is its own calls, and answers to the neighbour's
_FOREVER = timedelta(days=365)  # an idle edge waits for the next call; a peer that dies closes it


class AbstractAnswer(ABC):
    """The answer of a worker to one call; entered while the call lasts.

    Attributes:
        parts: in how many parts the call comes, and is answered.
        slots: in how many buffers they are received, in turns.
        whole: whether all parts must be there before the first of them is answered.
    """

    parts: int
    slots: int
    whole: bool

    @abstractmethod
    def __enter__(self) -> AbstractAnswer: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def buffer(self, part: int) -> Tensor:
        """Where a part is received: bytes, on the CPU; the same for each ``slots``-th part."""

    @abstractmethod
    def reply(self, part: int) -> Tensor:
        """What is sent back for a part that has been received; may lie in its buffer."""


class Edges:
    """The calls of one worker.

    Args:
        rank: this worker.
        callees: whom it may call.
        callers: who may call it.
        store: where the two ends of an edge meet.
        timeout_seconds: for one call.
        answer: makes the answers to one call of ``source`` for the ``index``-th model.
        on_failure: told when an edge breaks that should be there.
    """

    def __init__(
        self,
        rank: int,
        callees: Sequence[int],
        callers: Sequence[int],
        store: dist.Store,
        timeout_seconds: float,
        answer: Callable[[int, int], AbstractAnswer],
        on_failure: Callable[[int, Exception], None],
    ) -> None:
        self._timeout = timedelta(seconds=timeout_seconds)
        self._answer = answer
        self._on_failure = on_failure
        self._closing = threading.Event()
        self._callees = tuple(callees)
        self._outward: dict[int, dist.ProcessGroupGloo] = {}
        self._inward: dict[int, dist.ProcessGroupGloo] = {}
        # Both ends must meet: everybody makes its edges in the same global order, so the first missing one is being
        # made.
        neighbors = sorted({*callees, *callers})
        options = _options(self._timeout)
        for source, target in sorted([(rank, peer) for peer in neighbors] + [(peer, rank) for peer in neighbors]):
            group = dist.ProcessGroupGloo(
                dist.PrefixStore(f"edge/{source}-{target}", store), int(target == rank), 2, options
            )
            if source == rank:
                self._outward[target] = group
            else:
                self._inward[source] = group
        self._threads = [
            threading.Thread(target=self._respond, args=(peer,), name=f"decentral-answer-{peer}", daemon=True)
            for peer in callers
        ]
        for thread in self._threads:
            thread.start()

    def call(self, peer: int, index: int, parts: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Send a vector to a peer, part by part, and receive its answer as the parts come back."""
        outward, inward = self._outward[peer], self._inward[peer]
        works = [outward.send([torch.tensor([_CALL, index])], 1, _REQUEST)]
        works += [inward.recv([part], 0, _REPLY) for part in into]
        works += [outward.send([part], 1, _REQUEST) for part in parts]
        for work in works:
            work.wait(self._timeout)

    def close(self, wait_seconds: float, failed: bool = False) -> None:
        """Take leave of every peer, and wait for theirs; or break all connections, if the run has failed."""
        if self._closing.is_set():
            return
        self._closing.set()
        if failed:
            for group in (*self._outward.values(), *self._inward.values()):
                break_connection(group, 1 - group.rank())
        else:
            for peer in self._callees:
                try:
                    goodbye = torch.tensor([_GOODBYE, 0])
                    self._outward[peer].send([goodbye], 1, _REQUEST).wait(timedelta(seconds=wait_seconds))
                except RuntimeError:  # the peer is gone already
                    continue
        deadline = time.monotonic() + wait_seconds
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._outward.clear()
        self._inward.clear()

    def _respond(self, source: int) -> None:
        inward, outward = self._inward[source], self._outward[source]
        header = torch.zeros(2, dtype=torch.int64)
        try:
            while True:
                inward.recv([header], 0, _REQUEST).wait(_FOREVER)
                kind, index = header.tolist()
                if kind == _GOODBYE:
                    return
                with self._answer(source, index) as answer:
                    self._exchange(answer, inward, outward)
        except Exception as error:
            if not self._closing.is_set():
                self._on_failure(source, error)

    def _exchange(self, answer: AbstractAnswer, inward: dist.ProcessGroupGloo, outward: dist.ProcessGroupGloo) -> None:
        """Receive some parts ahead, while the answers to earlier ones are on their way back."""
        receiving: deque[Any] = deque()
        sending: deque[Any] = deque()
        asked = arrived = 0
        for part in range(answer.parts):
            while asked < (answer.parts if answer.whole else min(answer.parts, part + CALL_AHEAD)):
                if asked >= answer.slots:  # its memory holds an earlier answer, which must have left
                    sending.popleft().wait(self._timeout)
                receiving.append(inward.recv([answer.buffer(asked)], 0, _REQUEST))
                asked += 1
            while arrived < (answer.parts if answer.whole else part + 1):
                receiving.popleft().wait(self._timeout)
                arrived += 1
            sending.append(outward.send([answer.reply(part)], 1, _REPLY))
        for work in sending:
            work.wait(self._timeout)


def _options(timeout: timedelta) -> Any:
    """One socket that listens and one thread that moves bytes, for all edges: by default each has three threads."""
    options = dist.ProcessGroupGloo._Options()
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    gloo = dist.ProcessGroupGloo
    options._devices = [gloo.create_device(interface=interface) if interface else gloo.create_default_device()]
    options._threads = 1
    options._timeout = timeout
    return options


def break_connection(group: dist.ProcessGroupGloo, peer: int) -> None:
    """Close a connection on which a thread may be waiting for a peer that will never send.

    gloo has no other way: a receive that times out closes its connection, which ends every other wait on it.
    """
    try:
        group.recv([torch.zeros(1, dtype=torch.uint8)], peer, 1).wait(timedelta(milliseconds=1))
    except RuntimeError:  # always: nobody sends with this tag
        return
