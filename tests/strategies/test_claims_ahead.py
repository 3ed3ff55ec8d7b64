"""Proved here: batches are claimed ahead only where a claim takes long against a step and the epoch goes on for longer;
each is given once, to whoever; what is in hand is given up with its epoch."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from lightning_decentral.strategies import claims_ahead
from lightning_decentral.strategies.claims_ahead import ClaimsAhead

TOTAL = 120


class Clock:
    """A clock that stands still, and is set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(claims_ahead, "time", clock)
    return clock


class Store:
    """Counts claims, and how many batches each was of and found in hand. One takes so long, by the clock if there is
    one; then others claim so many batches in each second, too."""

    def __init__(self, seconds: float, clock: Clock | None = None, others: float = 0.0) -> None:
        self.seconds, self.clock, self.others = seconds, clock, others
        self.counts: list[int] = []
        self.in_hand: list[int] = []
        self._end, self._lock = 0, threading.Lock()

    def claim(self, epoch: int, count: int, held: list[int]) -> list[int]:
        if self.clock is None:
            time.sleep(self.seconds)
        elif threading.current_thread() is threading.main_thread():  # beside steps it takes no time of theirs
            self.clock.now += self.seconds
        with self._lock:
            now = 0.0 if self.clock is None else self.clock.now
            self._end = max(self._end, int(now * self.others)) + count
            self.counts.append(count)
            self.in_hand.append(len(held))
            return list(range(self._end - count, self._end))


def batches(store: Store, seconds: float) -> Iterator[int]:
    """What one worker takes, whose steps take so long."""
    claims = ClaimsAhead(store.claim)
    while (number := claims.next(0, TOTAL)) < TOTAL:
        yield number
        if store.clock is None:
            time.sleep(seconds)
        else:
            store.clock.now += seconds
    claims.close()


def test_workers_of_any_speed_get_every_batch_once() -> None:
    store = Store(0.004)
    taken: list[list[int]] = [[], [], []]
    threads = [
        threading.Thread(target=lambda own=own, step=step: own.extend(batches(store, step)))
        for own, step in zip(taken, (0.001, 0.001, 0.01), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*taken)) == list(range(TOTAL))
    assert all(own == sorted(own) for own in taken)


@pytest.mark.parametrize(("claim", "step", "most"), [(0.08, 0.011, 8), (0.001, 0.0045, 5), (0.001, 0.0001, 16)])
def test_long_claims_are_of_what_is_used_meanwhile_or_in_a_fiftieth_of_a_second(
    clock: Clock, claim: float, step: float, most: int
) -> None:
    store = Store(claim, clock)
    assert list(batches(store, step)) == list(range(TOTAL))
    assert max(store.counts) == most
    assert len(store.counts) < 0.7 * TOTAL


def test_quick_claims_are_made_when_they_are_needed(clock: Clock) -> None:
    store = Store(0.0001, clock)
    assert list(batches(store, 0.01)) == list(range(TOTAL))
    assert store.counts == [1] * (TOTAL + 1)


def test_a_slow_worker_has_nothing_in_hand_when_the_others_come_to_the_end(clock: Clock) -> None:
    store, late = Store(0.02, clock, others=TOTAL / 3.0), 0  # they need three seconds, in which it makes thirty steps
    for _ in batches(store, 0.1):
        late += clock.now > 3.0
    assert max(store.counts) == 1
    assert late <= 1


def test_what_is_in_hand_is_given_up_with_its_epoch(clock: Clock) -> None:
    store = Store(0.005, clock)
    claims = ClaimsAhead(store.claim)
    for _ in range(30):
        claims.next(0, 10_000)
        clock.now += 0.001
    before = sum(store.counts)
    assert before >= 30
    assert claims.next(1, 10_000) >= before  # of a new claim
    claims.close()
