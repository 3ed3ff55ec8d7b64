"""Directed connections for calls: a caller, a responder, and a thread that answers.

Each edge is a process group of two, made directly on the store, so that the loss of one worker ends its own edges and
no other. A call is a header, the caller's vector, and the answer. A worker answers one call at a time, so that it needs
one buffer however many neighbours it has; its answer never waits for its own training thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_decentral.flat import Vector

_CALL, _GOODBYE = 1, 0
_FOREVER = timedelta(days=365)  # an idle edge waits for the next call; a peer that dies closes it


class Edges:
    """The calls of one worker.

    Args:
        rank: this worker.
        callees: whom it may call.
        callers: who may call it.
        store: where the two ends of an edge meet.
        timeout_seconds: for one call.
        buffer: gives the buffer for the ``index``-th model of this worker, to receive a call into.
        answer: computes the answer to a call of ``source`` for the ``index``-th model; may reuse the buffer.
        on_failure: told when an edge breaks that should be there.
    """

    def __init__(
        self,
        rank: int,
        callees: Sequence[int],
        callers: Sequence[int],
        store: dist.Store,
        timeout_seconds: float,
        buffer: Callable[[int], Vector],
        answer: Callable[[int, int, Vector], Vector],
        on_failure: Callable[[int, Exception], None],
    ) -> None:
        self._timeout = timedelta(seconds=timeout_seconds)
        self._buffer = buffer
        self._answer = answer
        self._on_failure = on_failure
        self._serving = threading.Lock()
        self._closing = threading.Event()
        self._callees: dict[int, dist.ProcessGroupGloo] = {}
        self._callers: dict[int, dist.ProcessGroupGloo] = {}
        # Both ends must meet: everybody makes its edges in the same global order, so the first missing one is being
        # made.
        for caller, responder in sorted([(rank, peer) for peer in callees] + [(peer, rank) for peer in callers]):
            group = dist.ProcessGroupGloo(
                dist.PrefixStore(f"edge/{caller}-{responder}", store), int(responder == rank), 2, self._timeout
            )
            if caller == rank:
                self._callees[responder] = group
            else:
                self._callers[caller] = group
        self._threads = [
            threading.Thread(target=self._respond, args=(peer, group), name=f"decentral-answer-{peer}", daemon=True)
            for peer, group in self._callers.items()
        ]
        for thread in self._threads:
            thread.start()

    def call(self, peer: int, index: int, value: Vector, into: Vector) -> Vector:
        """Send ``value`` to a peer and receive its answer into ``into``."""
        group = self._callees[peer]
        works = [group.send([torch.tensor([_CALL, index])], 1, 0)]
        works += [group.send([buffer.view(torch.uint8)], 1, 0) for buffer in value.buffers]
        works += [group.recv([buffer.view(torch.uint8)], 1, 0) for buffer in into.buffers]
        for work in works:
            work.wait(self._timeout)
        return into

    def close(self, wait_seconds: float, failed: bool = False) -> None:
        """Take leave of every peer, and wait for theirs; or break all connections, if the run has failed."""
        if self._closing.is_set():
            return
        self._closing.set()
        if failed:
            for group in (*self._callees.values(), *self._callers.values()):
                _break(group)
        else:
            for group in self._callees.values():
                try:
                    group.send([torch.tensor([_GOODBYE, 0])], 1, 0).wait(timedelta(seconds=wait_seconds))
                except RuntimeError:  # the peer is gone already
                    continue
        deadline = time.monotonic() + wait_seconds
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        self._callees.clear()
        self._callers.clear()

    def _respond(self, source: int, group: dist.ProcessGroupGloo) -> None:
        header = torch.zeros(2, dtype=torch.int64)
        try:
            while True:
                group.recv([header], 0, 0).wait(_FOREVER)
                kind, index = header.tolist()
                if kind == _GOODBYE:
                    return
                with self._serving:
                    theirs = self._buffer(index)
                    for buffer in theirs.buffers:
                        group.recv([buffer.view(torch.uint8)], 0, 0).wait(self._timeout)
                    mine = self._answer(source, index, theirs)
                    for buffer in mine.buffers:
                        group.send([buffer.view(torch.uint8)], 0, 0).wait(self._timeout)
        except Exception as error:
            if not self._closing.is_set():
                self._on_failure(source, error)


def _break(group: dist.ProcessGroupGloo) -> None:
    """Close a connection on which a thread may be waiting for a peer that will never send.

    gloo has no other way: a receive that times out closes its connection, which ends every other wait on it.
    """
    try:
        group.recv([torch.zeros(1, dtype=torch.uint8)], 1 - group.rank(), 1).wait(timedelta(milliseconds=1))
    except RuntimeError:  # always: nobody sends with this tag
        return
