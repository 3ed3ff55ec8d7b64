"""Proved here: the living average small and large vectors; around one whom all reach, where two do not reach each
other, for as long as that lasts; and who cannot average with others that live, because a connection does not work,
tries for a while only, and names them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_decentral import agreement
from lightning_decentral.errors import PeerLost
from lightning_decentral.flat import Vector
from lightning_decentral.membership import Members
from lightning_decentral.traffic import DIRECT_BYTES
from lightning_decentral.transport import living
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings
from lightning_decentral.transport.living import LivingCollectives
from lightning_decentral.transport.membership import Membership


def enter_and_run(members: Sequence[Membership], work: Callable[[Membership], None]) -> None:
    """All take part; each does its work on a thread of its own."""
    for one in members:
        one.enter({}, 0, lambda entry: entry)
    threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    for one in members:
        one.close()


def test_the_living_average_small_and_large_vectors() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = ConnectionSettings(torch.device("cpu"), "", 30.0, timedelta(seconds=60), shared_memory=False)
    members = [Membership("127.0.0.1", store.port, rank, heartbeat_seconds=60.0) for rank in range(3)]
    sizes = (5, DIRECT_BYTES)
    means: dict[int, list[torch.Tensor]] = {}

    def average(one: Membership) -> None:
        communicator = Communicator(settings, one, 3)
        one.advance("here", Members.averaging, lambda now: now.phase == "averaging")
        value = Vector([torch.arange(size, dtype=torch.float32) + 3.0 * one.rank for size in sizes])
        means[one.rank] = communicator.collectives.all_reduce(value, weight=float(one.rank)).buffers
        one.leave()
        communicator.close()

    enter_and_run(members, average)
    assert sorted(means) == [0, 1, 2]
    for mean in means.values():  # with weights 0, 1 and 2
        for buffer, size in zip(mean, sizes, strict=True):
            torch.testing.assert_close(buffer, torch.arange(size, dtype=torch.float32) + 5.0)


def test_where_two_do_not_reach_each_other_a_mean_is_made_around_another(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = ConnectionSettings(torch.device("cpu"), "", 30.0, timedelta(seconds=60), shared_memory=False)
    members = [Membership("127.0.0.1", store.port, rank, heartbeat_seconds=60.0) for rank in range(4)]
    greet, around = LivingCollectives._greet, LivingCollectives._sum_around
    doors = {one.door.address: one.rank for one in members}
    hubs: list[list[int]] = []
    means: list[tuple[int, torch.Tensor]] = []
    waited: list[float] = []

    def are_cut(first: int, second: int) -> bool:
        return {first, second} == {0, 2} and 4 <= len(means) < 16

    def silent(self: LivingCollectives, among: Any, group: Any) -> None:
        """Workers 0 and 2 hear nothing of each other, for three means after the first one."""
        greet(self, among, group)
        if are_cut(0, group.rank()) or are_cut(2, group.rank()):
            raise RuntimeError("nothing came")

    def unreached(addresses: dict[int, str], seconds: dict[int, float]) -> list[int]:
        (mine,) = {0, 1, 2, 3} - {doors[address] for address in addresses.values()}
        found = [life for life, address in addresses.items() if are_cut(mine, doors[address])]
        waited.extend(seconds[life] for life in found)
        return found

    def count(self: LivingCollectives, total: torch.Tensor, **told: Any) -> None:
        hubs.append([told["place"], told["hub"]])
        around(self, total, **told)

    def average(one: Membership) -> None:
        communicator = Communicator(settings, one, 4)
        one.advance("here", Members.averaging, lambda now: now.phase == "averaging")
        for number in range(5):
            value = Vector([torch.full((3,), 4.0 * one.rank + number)])
            means.append((number, communicator.collectives.all_reduce(value).buffers[0]))
            one.gather("between two means")
        one.leave()
        communicator.close()

    monkeypatch.setattr(LivingCollectives, "_greet", silent)
    monkeypatch.setattr(living, "unreached", unreached)
    monkeypatch.setattr(LivingCollectives, "_sum_around", count)
    enter_and_run(members, average)
    assert len(means) == 20
    for number, mean in means:
        torch.testing.assert_close(mean, torch.full((3,), 6.0 + number))
    # The first mean is among all, and the last one again.
    assert sorted(hubs) == sorted([place, 1] for place in range(4) for _ in range(3))
    assert sorted(waited) == [0.5] * 4 + [3.0] * 2  # who was not reached the last time has less time


def errors_of_two_that_cannot_average() -> dict[int, PeerLost]:
    """What each of two living workers is told, which try for a fifth of a second."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = ConnectionSettings(torch.device("cpu"), "", 0.2, timedelta(seconds=60), shared_memory=False)
    members = [Membership("127.0.0.1", store.port, rank, heartbeat_seconds=60.0) for rank in range(2)]
    errors: dict[int, PeerLost] = {}

    def average(one: Membership) -> None:
        communicator = Communicator(settings, one, 2)
        assert isinstance(communicator.collectives, LivingCollectives)
        one.advance("here", Members.averaging, lambda now: now.phase == "averaging")
        try:
            communicator.collectives.all_reduce(Vector([torch.ones(3)]))
        except PeerLost as error:
            errors[one.rank] = error
        one.leave()  # or the other one would wait for it
        communicator.close(failed=True)

    enter_and_run(members, average)
    return errors


def test_where_nobody_is_reached_by_all_they_try_for_a_while_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(living, "unreached", lambda doors, seconds: list(doors))
    errors = errors_of_two_that_cannot_average()
    assert {rank: error.ranks for rank, error in errors.items()} == {0: (1,), 1: (0,)}


def test_who_joins_or_leaves_during_a_beat_was_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    looked, goes_on = threading.Semaphore(0), threading.Semaphore(0)
    leave = agreement.leave

    def stand_still(*_: Any) -> None:
        looked.release()
        assert goes_on.acquire(timeout=30.0)

    async def leave_and_wait(life: int) -> None:
        await leave(life)
        assert looked.acquire(timeout=30.0)  # the heart has seen that this worker is gone
        goes_on.release()
        assert looked.acquire(timeout=30.0)  # it has judged that

    monkeypatch.setattr(Membership, "_clear_up", stand_still)
    monkeypatch.setattr(agreement, "leave", leave_and_wait)
    one = Membership("127.0.0.1", store.port, 0, heartbeat_seconds=0.02)
    try:
        assert looked.acquire(timeout=30.0)
        one.enter({}, 0, lambda entry: entry)  # after what the heart has seen, and before it judges
        goes_on.release()
        assert looked.acquire(timeout=30.0)
        goes_on.release()
        one.leave()
    finally:
        goes_on.release(1000)
        one.close()
    assert one.failure is None


def test_nobody_is_left_out_because_the_rendezvous_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answered = {rank: threading.Event() for rank in range(2)}
    waits, beaten = threading.Semaphore(0), threading.Semaphore(0)

    def catch_up(one: Membership, *_: Any) -> None:
        if not answered[one.rank].is_set():
            waits.release()
            assert answered[one.rank].wait(30.0)

    def beats(times: int) -> None:
        while beaten.acquire(blocking=False):
            pass
        for _ in range(times):
            assert beaten.acquire(timeout=30.0)

    monkeypatch.setattr(Membership, "_catch_up", catch_up)
    monkeypatch.setattr(Membership, "_clear_up", lambda one, _: beaten.release() if one.rank == 0 else None)
    for each in answered.values():
        each.set()
    members = [Membership("127.0.0.1", store.port, rank, heartbeat_seconds=0.2) for rank in range(2)]
    try:
        for one in members:
            one.enter({}, 0, lambda entry: entry)
        beats(3)
        for rank, times in ((1, 2), (0, 0)):  # worker 0 has heard the last beat of worker 1
            answered[rank].clear()
            assert waits.acquire(timeout=30.0)
            beats(times)
        time.sleep(0.4)  # for two workers a heart is silent after 0.3 s
        answered[0].set()  # it is the first to be answered
        beats(1)
        answered[1].set()
        assert members[0].members.ranks == (0, 1)
    finally:
        for each in answered.values():
            each.set()
        for one in members:
            one.close()


def test_who_cannot_average_with_others_that_live_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_connection(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(living, "gloo_options", no_connection)
    errors = errors_of_two_that_cannot_average()
    assert errors
    assert all(error.ranks == (1 - rank,) for rank, error in errors.items())
    assert all("could not average" in str(error) for error in errors.values())
