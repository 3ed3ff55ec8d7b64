"""Proved here: a worker that asks for a copy is heard of at once, also after one that died while it asked; one that
dies while it gets its copy is waited for only until its heart is silent."""

from __future__ import annotations

import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from lightning_decentral.strategies import newcomers
from lightning_decentral.strategies.newcomers import Newcomers


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "decentral-newcomers"]


def test_who_dies_while_it_gets_a_copy_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    over = threading.Event()

    def give(*_: Any) -> int:
        over.wait(20.0)
        raise RuntimeError("nobody has taken it")

    monkeypatch.setattr(newcomers, "give", give)
    monkeypatch.setattr(newcomers, "_LOOK_SECONDS", 0.02)

    def connect(place: str = "") -> dist.Store:
        return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)

    membership: Any = SimpleNamespace(life=7, failure=None, store=connect(), connect=connect, heartbeat_seconds=0.2)
    donor = Newcomers(None, [], membership)  # type: ignore[arg-type]
    donor._guests[3] = math.inf
    began = time.monotonic()
    giving = threading.Thread(target=donor._give, args=(3, 1, {}), daemon=True)
    giving.start()
    for _ in range(20):  # it lives for a while
        store.add("beat/3", 1)
        time.sleep(0.02)
    assert donor._guests == {3: math.inf}
    giving.join(10.0)
    assert donor._guests == {}
    assert time.monotonic() - began < 5.0
    over.set()
    donor.close()


def test_who_asks_is_heard_of_at_once_also_after_one_that_died_in_between() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connect() -> dist.Store:
        return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)

    membership: Any = SimpleNamespace(life=7, failure=None, store=connect(), connect=connect)
    before = _threads()
    donor = Newcomers(None, [], membership)  # type: ignore[arg-type]
    (hears,) = [thread for thread in _threads() if thread not in before]
    store.add("ask/7", 1)  # this one has died before it said who it is
    donor.listen(store)
    assert newcomers._ask(connect(), 7, 3) == 2
    deadline = time.monotonic() + 10.0
    while not donor._asked and time.monotonic() < deadline:
        time.sleep(0.001)
    assert list(donor._asked) == [(3, 2)]
    store.set("ask/7/1", "4")  # it was only slow
    donor.listen(store)
    assert list(donor._asked) == [(3, 2), (4, 1)]
    donor.close()
    hears.join(10.0)
    assert not hears.is_alive()
    assert len(donor._asked) == 2
