"""Proved here: few answers are sent at a time, whoever comes next has room as soon as one is sent, and those that are
sent to slow workers hold nobody up for long."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_decentral.transport import sending
from lightning_decentral.transport.sending import Sending


def test_few_are_sent_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_FIRST_PATIENCE_SECONDS", 60.0)  # on a busy machine, too
    room, most, now, lock = Sending(), [0], [0], threading.Lock()

    def answer(_: int) -> None:
        number = room.begin()
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.005)  # as sending does
        with lock:
            now[0] -= 1
        room.end(number)  # whose seconds are not told, so that the first patience stays

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(answer, range(24)))
    assert most == [sending._MOST]


def test_slow_ones_hold_nobody_up_for_long() -> None:
    room = Sending()
    for _ in range(sending._REMEMBERED):
        room.end(room.begin(), 0.001)
    numbers = [room.begin() for _ in range(3 * sending._MOST)]  # none of which ends; each waits for some milliseconds
    for number in numbers:
        room.end(number, 1.0)
    assert not room._began
