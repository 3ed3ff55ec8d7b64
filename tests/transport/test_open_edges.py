"""Proved here: the end of an edge whose other end is lost gives up by itself, and says nothing on the terminal. When
edges are closed no thread of theirs is left, which would abort a process that ends then."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from lightning_decentral.membership import Member, Members
from lightning_decentral.transport import open_edges
from lightning_decentral.transport.open_edges import OpenEdges


def edges_to_another(store: dist.Store) -> tuple[OpenEdges, dist.Store]:
    """The edges of worker 0 to worker 1, and the store on which they are."""
    members = Members.founded(Member(0, 1), "{}", 0).joined(Member(1, 2))
    membership: Any = SimpleNamespace(
        rank=0, life=1, takes_part=True, members=members, connect=lambda place="": dist.PrefixStore(place, store)
    )
    return OpenEdges(membership, 1.0, lambda *_: None, lambda members: [1]), membership.connect()  # type: ignore[arg-type, return-value]


def test_whoever_closes_edges_waits_for_what_their_connections_do_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that need a while to close stand for gloo's, whose two ends cannot be in one process."""
    connections = SimpleNamespace(set_timeout=lambda seconds: None, close=lambda *_: time.sleep(0.3))
    monkeypatch.setattr(open_edges, "Edges", lambda *_: connections)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before = set(threading.enumerate())
    edges, log = edges_to_another(store)
    dist.PrefixStore("edge/1-2/0", store).set("here/1", "")
    edges.follow(log)
    deadline = time.monotonic() + 60.0
    while not edges.open_to and time.monotonic() < deadline:
        time.sleep(0.02)
    assert edges.open_to == (1,)
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
