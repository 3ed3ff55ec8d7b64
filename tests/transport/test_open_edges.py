"""Proved here: the end of an edge whose other end is lost gives up by itself, and says nothing on the terminal. When
edges are closed no thread of theirs is left, which would abort a process that ends then. Who waits for the rest of a
message whose sender was killed in the middle of it is told soon."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_decentral.errors import PeerLost
from lightning_decentral.membership import Member, Members
from lightning_decentral.transport import open_edges
from lightning_decentral.transport.edges import Header
from lightning_decentral.transport.open_edges import OpenEdges

_ANSWERS = """
import sys, time
from types import SimpleNamespace
import torch, torch.distributed as dist
from lightning_decentral.transport.edges import Edges
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, wait_for_workers=False)
place = dist.PrefixStore("edge/1-2/0", store)
place.set("here/1", "")
class Answer(SimpleNamespace):
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def buffer(self, part): return torch.empty(1, dtype=torch.uint8)
    def reply(self, part): return torch.ones(int(sys.argv[2]), dtype=torch.uint8)
edges = Edges(1, [0], [0], place, 60.0, lambda *_: Answer(parts=1, slots=1, whole=False), lambda *_: None)
time.sleep(60.0)
"""


def edges_to_another(store: dist.Store) -> tuple[OpenEdges, dist.Store]:
    """The edges of worker 0 to worker 1, and the store on which they are."""
    members = Members.founded(Member(0, 1), "{}", 0).joined(Member(1, 2))
    membership: Any = SimpleNamespace(
        rank=0, life=1, takes_part=True, members=members, connect=lambda place="": dist.PrefixStore(place, store)
    )
    return OpenEdges(membership, 1.0, lambda *_: None, lambda members: [1]), membership.connect()  # type: ignore[arg-type, return-value]


def wait_until_open(edges: OpenEdges) -> None:
    deadline = time.monotonic() + 60.0
    while not edges.open_to and time.monotonic() < deadline:
        time.sleep(0.02)
    assert edges.open_to == (1,)


def test_whoever_closes_edges_waits_for_what_their_connections_do_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that need a while to close stand for gloo's, whose two ends cannot be in one process."""
    connections = SimpleNamespace(set_timeout=lambda seconds: None, close=lambda *_: time.sleep(0.3))
    monkeypatch.setattr(open_edges, "Edges", lambda *_: connections)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = set(threading.enumerate())
    edges, log = edges_to_another(store)
    dist.PrefixStore("edge/1-2/0", store).set("here/1", "")
    edges.follow(log)
    wait_until_open(edges)
    edges.close(1.0)
    assert set(threading.enumerate()) <= before


def test_an_edge_to_one_that_is_lost_comes_to_nothing_in_silence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_edges, "_CONNECT_SECONDS", 0.3)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    edges, log = edges_to_another(store)
    edges.follow(log)
    deadline = time.monotonic() + 60.0
    while log.get("edge/1-2") == b"0" and time.monotonic() < deadline:  # the next generation
        time.sleep(0.02)
    edges.close(1.0)
    assert log.get("edge/1-2") == b"1"
    assert edges.open_to == ()
    assert capfd.readouterr().err == ""


def test_who_waits_for_the_rest_of_a_message_is_told_that_its_sender_was_killed() -> None:
    """gloo does not tell it: its own wait goes on to the end of the time-out."""
    store, size = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 1 << 28
    edges, log = edges_to_another(store)
    edges._timeout_seconds = 5.0
    errors: list[BaseException] = []
    into = torch.zeros(size, dtype=torch.uint8)

    def call() -> None:
        try:
            edges.call(1, Header(0), [torch.zeros(1, dtype=torch.uint8)], [into])
        except PeerLost as error:
            errors.append(error)

    with subprocess.Popen([sys.executable, "-c", _ANSWERS, str(store.port), str(size)]) as peer:
        edges.follow(log)
        wait_until_open(edges)
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60.0
        while not into[0] and time.monotonic() < deadline:
            pass
        peer.kill()
    thread.join(3.0)
    assert not into[-1], "all of it has come: a larger message is needed"
    assert [type(error) for error in errors] == [PeerLost]
    edges.close(1.0)
