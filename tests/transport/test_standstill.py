"""Proved here: who waits for what cannot come any more is told so, also if worker 0 has asked again before it has read
that."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from lightning_decentral.traffic import Traffic
from lightning_decentral.transport.standstill import Standstill, Waiting


class Store(dict[str, Any]):
    """What all workers share, in one process."""

    def add(self, key: str, number: int) -> int:
        self[key] = self.get(key, 0) + number
        return int(self[key])

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def worker(rank: int) -> Standstill:
    links = SimpleNamespace(rank=rank, world_size=2, watch=None, sent=Traffic(), idle=True)
    return Standstill(links)  # type: ignore[arg-type]


def test_who_moved_when_it_was_told_is_told_again_although_nothing_was_sent() -> None:
    store, asks, waits, turns = Store(), worker(0), worker(1), [0]
    waiting = Waiting("step", "waits", lambda: turns[0], lambda: None)
    waiting.seen, waiting.since = 0, time.monotonic() - 1.0
    with asks.at_the_end(), waits.waiting(waiting):
        for _ in range(200):
            before = store.get("still/told", 0)
            asks.listen(store)
            if before == 0 and store.get("still/told", 0):
                turns[0] = waiting.seen = 1  # somebody else has run on that worker, and it waits as before
            waits.listen(store)
            if waiting.told:
                break
    assert turns[0] == 1
    assert waiting.told


def test_who_goes_on_and_waits_again_is_told_again_although_nothing_was_sent() -> None:
    """A server that trains, with the last batches of an epoch: each of its gradients waits for others in vain."""
    store, asks, waits = Store(), worker(0), worker(1)
    told = 0
    with asks.at_the_end():
        for _ in range(3):
            waits.gradients += 1
            waiting = Waiting("step", "waits", lambda: 0, lambda: None)
            waiting.seen, waiting.since = 0, time.monotonic() - 1.0
            with waits.waiting(waiting):
                for _ in range(200):
                    asks.listen(store)
                    waits.listen(store)
                    if waiting.told:
                        told += 1
                        break
    assert told == 3


def test_a_verdict_counts_although_the_next_question_is_asked() -> None:
    store, asks, waits = Store(), worker(0), worker(1)
    waiting = Waiting("step", "waits", lambda: 0, lambda: None)
    waiting.seen, waiting.since = 0, time.monotonic() - 1.0
    with asks.at_the_end(), waits.waiting(waiting):
        for _ in range(100):
            if "still/verdict" in store:
                break
            waits.listen(store)
            asks.listen(store)
        judged = store.add("still/round", 0)
        store.add("still/wanted", 1)
        asks.listen(store)
        assert store.add("still/round", 0) == judged + 1
        waits.listen(store)
    assert waiting.told
