"""Proved here: a store that outlives the workers does not grow with the rounds that they make; and who has missed many
entries of the log goes on at the newest one; a round is over for each worker when it has averaged itself; and who asks
a store that has ended is told so, with what to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from helpers.waiting import wait_until

from lightning_decentral.errors import PeerLost
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
        assert one.enter({}, 0, lambda members: members) == (rank == 0, None)
    yield made
    for one in made:
        one.close()


def rounds(one: Membership, count: int) -> None:
    """Make rounds, in each of which all exchange."""
    for _ in range(count):
        assert one.end_round()
        number = one.members.round
        assert one.all_made(one.members.met, True)
        one.go_on(Members.averaged, lambda now, before=number: now.round > before)  # type: ignore[misc]


def test_the_store_does_not_grow_with_the_rounds(workers: list[Membership]) -> None:
    sizes = []
    for count in (25, 50):
        threads = [threading.Thread(target=rounds, args=(one, count), daemon=True) for one in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        wait_until(lambda: not any(len(one._written) > 20 or len(one._entries) > 22 for one in workers), "a heartbeat")
        sizes.append(workers[0].store.num_keys())
    assert sizes[1] < sizes[0] + 100  # of a thousand that were written


def test_who_has_not_averaged_yet_does_though_another_one_has_written_that_the_round_is_over(
    workers: list[Membership],
) -> None:
    """So it gives no copy of its model, which would be of the last round and be taken for one of the next."""
    one, other = workers
    both_average = threading.Event()

    def is_over(members: Members) -> bool:
        return members.round == 1

    def end() -> None:
        other.end_round()
        both_average.wait(60.0)
        other.go_on(Members.averaged, is_over)

    others = threading.Thread(target=end, daemon=True)
    others.start()
    assert one.end_round()
    both_average.set()
    wait_until(lambda: is_over(one.members), "its heart learns that the round is over")
    others.join(60.0)
    assert (one.averages, other.averages) == (True, False)
    one.go_on(Members.averaged, is_over)
    assert not one.averages


def test_who_has_missed_entries_that_are_deleted_goes_on_at_the_newest(workers: list[Membership]) -> None:
    one, other = workers
    missed = one._look(one.store)
    newest = missed
    for _ in range(40):
        newest = newest.averaged()
        assert one._propose(newest, one.store)
    wait_until(lambda: other.members == newest, "the other one has seen them")  # and does not ask for one just now
    for number in range(missed.number + 1, newest.number):
        one.store.delete_key(f"log/{number}")
    other.members = missed  # as if it had stood still since
    wait_until(lambda: other.members == newest, "it goes on at the newest one")


def test_who_asks_a_rendezvous_that_has_ended_is_told_what_to_do() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    one = Membership("127.0.0.1", store.port, 0, heartbeat_seconds=20.0)  # its heart notices later than it asks
    one.enter({}, 0, lambda members: members)
    del store
    with pytest.raises(PeerLost, match=r"The rendezvous at .* does not answer worker 0 .*: start it again"):
        one.claim(4)
    one.close()
