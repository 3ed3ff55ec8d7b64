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
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.traffic import CALL_AHEAD

_CALL, _GOODBYE = 1, 0
_REQUEST, _REPLY = 0, 1  # tags: what a worker sends to a neighbour is its own calls, and answers to the neighbour's
_FOREVER = timedelta(days=365)  # an idle edge waits for the next call; a peer that dies closes it


class Header(NamedTuple):
    """What a call is.

    Attributes:
        model: its number.
        form: the number of the form that is sent.
        number: of the caller for it.
    """

    model: int
    form: int = 0
    number: int = 0


class AbstractAnswer(ABC):
    """The answer of a worker to one call; entered while the call lasts.

    Attributes:
        parts: in how many parts the call comes, and is answered; of one that is answered whole, is answered from the
            first reply on.
        slots: in how many buffers they are received, in turns.
        whole: whether all parts must be there before the first of them is answered. Then a header tells the form of
            the answer, and comes when there is one.
        form: the number of that form.
    """

    parts: int
    slots: int
    whole: bool
    form: int

    @abstractmethod
    def __enter__(self) -> AbstractAnswer: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def buffer(self, part: int) -> Tensor:
        """Tell where a part is received: bytes, on the CPU; the same for each ``slots``-th part."""

    @abstractmethod
    def reply(self, part: int) -> Tensor:
        """Tell what is sent back for a part that has been received; may lie in its buffer."""

    def abandon(self) -> None:
        """Let go of what others wait for: the connection is broken, and who answers may not know it for a while."""
        return


class Edges:
    """The calls of one worker.

    Args:
        rank: this worker.
        callees: whom it may call.
        callers: who may call it.
        store: where the two ends of an edge meet.
        timeout_seconds: for one call.
        answer: makes the answer to one call of ``source``, from that one's header.
        on_failure: told when an edge breaks that should be there.

    Attributes:
        broken: set once all connections were broken. gloo does not wake who waits for a part of which some has come.
    """

    def __init__(
        self,
        rank: int,
        callees: Sequence[int],
        callers: Sequence[int],
        store: dist.Store,
        timeout_seconds: float,
        answer: Callable[[int, Header], AbstractAnswer],
        on_failure: Callable[[int, Exception], None],
    ) -> None:
        self._timeout = timedelta(seconds=timeout_seconds)
        self._answer = answer
        self._on_failure = on_failure
        self._closing = threading.Event()
        self.broken = threading.Event()
        self._under_way: dict[int, AbstractAnswer] = {}
        self._callees = tuple(callees)
        self._outward: dict[int, dist.ProcessGroupGloo] = {}
        self._inward: dict[int, dist.ProcessGroupGloo] = {}
        # Both ends must meet: everybody makes its edges in the same global order, so the first missing one is being
        # made.
        neighbors = sorted({*callees, *callers})
        options = gloo_options(self._timeout)
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

    def set_timeout(self, seconds: float) -> None:
        """Let calls take another time than making the edges."""
        self._timeout = timedelta(seconds=seconds)

    def call(self, peer: int, header: Header, parts: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Send a vector to a peer, part by part, and receive its answer as the parts come back."""
        outward, inward = self._outward[peer], self._inward[peer]
        works = [outward.send([_as_tensor(_CALL, header)], 1, _REQUEST)]
        works += [inward.recv([part], 0, _REPLY) for part in into]
        works += [outward.send([part], 1, _REQUEST) for part in parts]
        for work in works:
            work.wait(self._timeout)

    def ask(self, peer: int, header: Header, parts: Sequence[Tensor], room: Callable[[int], Sequence[Tensor]]) -> None:
        """Send a vector to a peer, and receive its answer, however much later; a peer that ends closes the edge.

        Args:
            peer: who is called.
            header: of the call.
            parts: what is sent.
            room: where an answer is received that has the form of this number.
        """
        outward, inward = self._outward[peer], self._inward[peer]
        form = torch.zeros(1, dtype=torch.int64)
        coming = inward.recv([form], 0, _REPLY)
        works = [outward.send([_as_tensor(_CALL, header)], 1, _REQUEST)]
        works += [outward.send([part], 1, _REQUEST) for part in parts]
        for work in works:
            work.wait(self._timeout)
        coming.wait(_FOREVER)
        for work in [inward.recv([part], 0, _REPLY) for part in room(int(form))]:
            work.wait(self._timeout)

    def close(self, wait_seconds: float, failed: bool = False) -> None:
        """Take leave of every peer, and wait for theirs; or break all connections, if the run has failed."""
        if self._closing.is_set():
            return
        self._closing.set()
        if failed:
            for group in (*self._outward.values(), *self._inward.values()):
                break_connection(group, 1 - group.rank())
            self.broken.set()
            for answer in tuple(self._under_way.values()):
                answer.abandon()
        else:
            for peer in self._callees:
                try:
                    goodbye = _as_tensor(_GOODBYE, Header(0))
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
        header = _as_tensor(_GOODBYE, Header(0))
        try:
            while True:
                inward.recv([header], 0, _REQUEST).wait(_FOREVER)
                kind, *numbers = header.tolist()
                if kind == _GOODBYE:
                    return
                with self._answer(source, Header(*numbers)) as answer:
                    self._under_way[source] = answer
                    if self.broken.is_set():
                        answer.abandon()
                    if answer.whole:
                        self._answer_whole(answer, inward, outward)
                    else:
                        self._exchange(answer, inward, outward)
                del answer, self._under_way[source]  # and its memory
        except Exception as error:
            if not self._closing.is_set():
                self._on_failure(source, error)

    def _answer_whole(
        self, answer: AbstractAnswer, inward: dist.ProcessGroupGloo, outward: dist.ProcessGroupGloo
    ) -> None:
        for work in [inward.recv([answer.buffer(part)], 0, _REQUEST) for part in range(answer.parts)]:
            work.wait(self._timeout)
        first = answer.reply(0)  # in its time
        sending = [outward.send([torch.tensor([answer.form])], 1, _REPLY)]
        sending += [outward.send([part], 1, _REPLY) for part in (first, *map(answer.reply, range(1, answer.parts)))]
        for work in sending:
            work.wait(self._timeout)

    def _exchange(self, answer: AbstractAnswer, inward: dist.ProcessGroupGloo, outward: dist.ProcessGroupGloo) -> None:
        """Receive some parts ahead, while the answers to earlier ones are on their way back."""
        receiving: deque[Any] = deque()
        sending: deque[Any] = deque()
        asked = arrived = 0
        for part in range(answer.parts):
            while asked < min(answer.parts, part + CALL_AHEAD):
                if asked >= answer.slots:  # its memory holds an earlier answer, which must have left
                    sending.popleft().wait(self._timeout)
                receiving.append(inward.recv([answer.buffer(asked)], 0, _REQUEST))
                asked += 1
            while arrived < part + 1:
                receiving.popleft().wait(self._timeout)
                arrived += 1
            sending.append(outward.send([answer.reply(part)], 1, _REPLY))
        for work in sending:
            work.wait(self._timeout)


def _as_tensor(kind: int, header: Header) -> Tensor:
    return torch.tensor([kind, *header])


def gloo_options(timeout: timedelta, kept: bool = False) -> Any:
    """Return one socket that listens and one thread that moves bytes, for all edges: by default each has three
    threads.

    Args:
        timeout: of the connections.
        kept: whether socket and thread are those of all such connections of this process, and live as long as it:
            gloo ends the process where a connection that was never made is the last one to use them.
    """
    options = dist.ProcessGroupGloo._Options()
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    options._devices = [_kept_device(interface, os.getpid()) if kept else _device(interface)]
    options._threads = 1
    options._timeout = timeout
    return options


def _device(interface: str) -> Any:
    gloo = dist.ProcessGroupGloo
    return gloo.create_device(interface=interface) if interface else gloo.create_default_device()


@cache
def _kept_device(interface: str, process: int) -> Any:
    return _device(interface)


def break_connection(group: dist.ProcessGroupGloo, peer: int) -> None:
    """Close a connection on which a thread may be waiting for a peer that will never send.

    gloo has no other way: a receive that times out closes its connection, which ends every other wait on it.
    """
    try:
        group.recv([torch.zeros(1, dtype=torch.uint8)], peer, 1).wait(timedelta(milliseconds=1))
    except RuntimeError:  # always: nobody sends with this tag
        return
