"""Connections for calls in a run whose workers come and go: each edge is made, broken and made again by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_decentral.errors import PeerLost
from lightning_decentral.membership import Members
from lightning_decentral.transport.answers import AnswerFailed
from lightning_decentral.transport.edges import AbstractAnswer, Edges, Header
from lightning_decentral.transport.lanes import beside
from lightning_decentral.transport.membership import Membership

_CONNECT_SECONDS = 20.0
_MET_SECONDS = 5.0  # for each of two connections of workers that have just met: one may have left since
_CLOSE_SECONDS = 2.0
_POLL_SECONDS, _LOOK_SECONDS = 0.02, 0.05


@dataclass(eq=False)
class _Edge:
    """An edge to one life of a worker.

    Args:
        life: of the other end.
        key: on the store, of the number of its generation; whoever finds the edge broken counts it up.
        generation: of which the connections are, or are being made.
        edges: the connections; none while they are being made.
    """

    life: int
    key: str
    generation: int = -1
    edges: Edges | None = None
    making: bool = False
    wanted: bool = True


class OpenEdges:
    """The calls of one worker to those that take part.

    Args:
        membership: knows who does.
        timeout_seconds: for one call.
        answer: makes the answer to one call of ``source``, from that one's header.
        neighbors: whom this worker may call, or be called by, among the members.
    """

    def __init__(
        self,
        membership: Membership,
        timeout_seconds: float,
        answer: Callable[[int, Header], AbstractAnswer],
        neighbors: Callable[[Members], Sequence[int]],
    ) -> None:
        self._membership = membership
        self._timeout_seconds = timeout_seconds
        self._answer, self._neighbors = answer, neighbors
        self._lock = threading.Lock()
        self._edges: dict[int, _Edge] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False

    @property
    def open_to(self) -> tuple[int, ...]:
        """The ranks to which there is a connection now."""
        return tuple(sorted(rank for rank, edge in tuple(self._edges.items()) if edge.edges is not None))

    def follow(self, store: dist.Store) -> None:
        """Make and break edges, as the members and the generations on the store say; at each heartbeat."""
        members = self._membership.members
        mine = self._membership.life
        wanted = {}
        if self._membership.takes_part and mine in members.lives:
            wanted = {rank: members.life_of(rank) for rank in self._neighbors(members)}
        with self._lock:
            if self._closed:
                return
            for rank, edge in tuple(self._edges.items()):
                if wanted.get(rank) != edge.life:
                    edge.wanted = False
                    self._break(edge)
                    del self._edges[rank]
            for rank, life in wanted.items():
                if life is not None and rank not in self._edges:
                    self._edges[rank] = _Edge(life, f"edge/{min(life, mine)}-{max(life, mine)}")
            edges = tuple(self._edges.items())
        for rank, edge in edges:
            generation = int(store.compare_set(edge.key, "", "0"))
            with self._lock:
                if not edge.wanted or edge.making:
                    continue
                if edge.generation != generation:
                    self._break(edge)
                    edge.generation, edge.making = generation, True
                    self._start(f"decentral-edge-{rank}", self._make, rank, edge, generation)

    def call(self, peer: int, header: Header, parts: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Call a worker that answers in parts.

        Raises:
            PeerLost: if there is no edge to it, or the edge breaks.
        """
        self._with(peer, lambda edges: edges.call(peer, header, parts, into))

    def ask(self, peer: int, header: Header, parts: Sequence[Tensor], room: Callable[[int], Sequence[Tensor]]) -> None:
        """Call a worker that answers whole; see `call`."""
        self._with(peer, lambda edges: edges.ask(peer, header, parts, room))

    def _with(self, peer: int, work: Callable[[Edges], None]) -> None:
        edge = self._edges.get(peer)
        edges = None if edge is None else edge.edges
        if edge is None or edges is None:
            raise PeerLost(f"There is no edge to worker {peer} now.", (peer,))

        def look() -> None:
            if edges.broken.is_set():
                raise RuntimeError("The edge was broken.")

        try:
            beside(partial(work, edges), "decentral-call", _LOOK_SECONDS, look)
        except RuntimeError as error:
            self._broken(peer, edge, edge.generation)
            raise PeerLost(f"The edge to worker {peer} broke.", (peer,)) from error

    def close(self, wait_seconds: float, failed: bool = False) -> None:
        """Break all edges, and wait until their threads have ended.

        A thread that comes back from gloo into an interpreter that is going would end the process with SIGABRT.
        """
        with self._lock:
            self._closed = True
            edges = [edge for edge in self._edges.values() if edge.edges is not None]
            self._edges.clear()
            for edge in edges:
                edge.wanted = False
                self._break(edge)
            threads = tuple(self._threads)
        deadline = time.monotonic() + max(wait_seconds, 2 * _CLOSE_SECONDS)
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _start(self, name: str, target: Callable[..., None], *args: Any) -> None:
        """Do something on a thread of its own, for whose end `close` waits."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _make(self, rank: int, edge: _Edge, generation: int) -> None:
        """Make the connections of one generation; on a thread of its own."""
        mine, edges = self._membership.rank, None
        began = time.monotonic()
        with suppress(Exception):  # the other end is lost, or has gone on to another generation
            store = self._membership.connect(f"{edge.key}/{generation}")
            store.set_timeout(timedelta(seconds=_CONNECT_SECONDS))
            if self._meets(rank, edge, store):
                store.set_timeout(timedelta(seconds=_MET_SECONDS))
                edges = Edges(
                    *(mine, [rank], [rank], store, _MET_SECONDS, self._answer),
                    lambda _, error: self._failed(rank, edge, generation, error),
                )
                edges.set_timeout(self._timeout_seconds)
        with self._lock:
            edge.making = False
            if edges is not None and edge.wanted and not self._closed and edge.generation == generation:
                edge.edges, edges = edges, None
                return
        if edges is not None:
            edges.close(_CLOSE_SECONDS, failed=True)
        elif edge.wanted and not self._closed:
            time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))
            self._broken(rank, edge, generation)

    def _meets(self, rank: int, edge: _Edge, store: dist.Store) -> bool:
        """Wait until the other end makes the edge, too; gloo would complain on the terminal about one that is lost."""
        store.set(f"here/{self._membership.rank}", "")
        deadline = time.monotonic() + _CONNECT_SECONDS
        while edge.wanted and not self._closed and time.monotonic() < deadline:
            if store.check([f"here/{rank}"]):
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _failed(self, rank: int, edge: _Edge, generation: int, error: Exception) -> None:
        """Learn why an edge was left: a worker that cannot answer ends with its error, at its next look."""
        if isinstance(error, AnswerFailed) and self._membership.failure is None:
            self._membership.failure = error.reason
        self._broken(rank, edge, generation)

    def _broken(self, rank: int, edge: _Edge, generation: int) -> None:
        """Learn that the connections of a generation broke: close them, and let both ends make others."""
        with self._lock:
            if edge.generation == generation:
                self._break(edge)
        if edge.wanted and not self._closed:
            with suppress(Exception):  # the store has gone: the heartbeat says so
                self._membership.connect().compare_set(edge.key, str(generation), str(generation + 1))

    def _break(self, edge: _Edge) -> None:
        edges, edge.edges = edge.edges, None
        if edges is not None:
            self._start("decentral-edge-end", edges.close, _CLOSE_SECONDS, True)
