"""Proved here: a store that outlives the workers does not grow with the rounds that they make; and who has missed many
entries of the log goes on at the newest one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from lightning_decentral.membership import Members
from lightning_decentral.transport import membership as rooms
from lightning_decentral.transport.membership import Membership


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Membership]]:
    monkeypatch.setattr(rooms, "_KEPT_ENTRIES", 20)
    monkeypatch.setattr(rooms, "_BEATS_PER_HEARTBEAT", 400)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [Membership("127.0.0.1", store.port, rank, heartbeat_seconds=20.0) for rank in range(2)]
    for rank, one in enumerate(made):
        assert one.enter({}, 0, lambda members: members) == (rank == 0)
    yield made
    for one in made:
        one.close()


def rounds(one: Membership, count: int) -> None:
    """Make rounds, in each of which all exchange."""
    for _ in range(count):
        assert one.end_round()
        members = one.meet()
        assert one.all_made(members, True)
        number = one.members.round
        one.advance(f"averaged/0/{number}", Members.averaged, lambda now, before=number: now.round > before)  # type: ignore[misc]


def test_the_store_does_not_grow_with_the_rounds(workers: list[Membership]) -> None:
    sizes = []
    for count in (25, 50):
        threads = [threading.Thread(target=rounds, args=(one, count), daemon=True) for one in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        deadline = time.monotonic() + 60.0
        while any(len(one._written) > 20 or len(one._entries) > 22 for one in workers):  # until a heartbeat has come
            assert time.monotonic() < deadline
            time.sleep(0.02)
        sizes.append(workers[0].store.num_keys())
    assert sizes[1] < sizes[0] + 100  # of a thousand that were written


def test_who_has_missed_entries_that_are_deleted_goes_on_at_the_newest(workers: list[Membership]) -> None:
    one, other = workers
    missed = one._look(one.store)
    newest = missed
    for _ in range(40):
        newest = newest.averaged()
        assert one._propose(newest, one.store)
        one.store.delete_key(f"log/{newest.number - 1}")
    other.members = missed  # as if it had stood still since
    deadline = time.monotonic() + 60.0
    while other.members != newest:
        assert time.monotonic() < deadline
        time.sleep(0.02)
