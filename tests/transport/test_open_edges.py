"""Proved here: the end of an edge whose other end is lost gives up by itself, and says nothing on the terminal."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from lightning_decentral.membership import Member, Members
from lightning_decentral.transport import open_edges
from lightning_decentral.transport.open_edges import OpenEdges


def test_an_edge_to_one_that_is_lost_comes_to_nothing_in_silence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_edges, "_CONNECT_SECONDS", 0.3)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = Members.founded(Member(0, 1), "{}", 0).joined(Member(1, 2))
    membership: Any = SimpleNamespace(
        rank=0, life=1, takes_part=True, members=members, connect=lambda place="": dist.PrefixStore(place, store)
    )
    edges = OpenEdges(membership, 1.0, lambda source, header: None, lambda members: [1])  # type: ignore[arg-type, return-value]
    log = membership.connect()
    edges.follow(log)
    deadline = time.monotonic() + 60.0
    while log.get("edge/1-2") == b"0" and time.monotonic() < deadline:  # the next generation
        time.sleep(0.02)
    edges.close(1.0)
    assert log.get("edge/1-2") == b"1"
    assert edges.open_to == ()
    assert capfd.readouterr().err == ""
