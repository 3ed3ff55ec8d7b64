"""Proved here: few answers are sent at a time, whoever comes next has room as soon as one is sent, and nobody is held
up twice by those that are sent to slow workers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from lightning_decentral.transport import sending
from lightning_decentral.transport.sending import Sending

PATIENCE = 30.0  # seconds until a test that hangs has failed


def test_few_are_sent_at_a_time() -> None:
    room, most, now, lock = Sending(), [0], [0], threading.Lock()

    def answer(_: int) -> None:
        room.begin()
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.005)  # as sending does
        with lock:
            now[0] -= 1
        room.end()  # whose seconds are not told, so that the first patience stays

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(answer, range(24)))
    assert most == [sending._MOST]


def test_nobody_is_held_up_twice_by_slow_ones() -> None:
    room = Sending()
    for _ in range(sending._MOST):
        room.begin()
        room.end(0.001)
    for _ in range(sending._MOST + 1):  # the last one waits for some milliseconds
        room.begin()
    assert room._waited_in_vain
    room.begin()  # at once
    for _ in range(sending._MOST + 2):
        room.end(1.0)
    assert not room._waited_in_vain
