"""A roll call: how far every worker is, once one of them asks.

Workers count the batches that they begin, each for itself, and nothing is sent. When one of them asks, because it has
no more batches or wants to stop, every worker says in the store how many it has begun, and begins no other until all
have answered. A thread answers (that of `liveness.Watch`, which runs anyway), whatever the training thread is doing or
waiting for. The largest number is the last batch that anybody has begun: once everybody has made it, nobody waits for
anybody, and they can meet.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from lightning_decentral.errors import PeerLost

_SHORTEST_POLL_SECONDS = 0.001
_LONGEST_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Answer:
    """What a worker says in a roll call.

    Args:
        begun: batches that it has begun.
        out: whether it has no other.
        stop: whether it wants to stop, and validate before.
        finish: whether it has made all steps that it should.
        gone: whether it turned out to have no batch for the last that it has begun.
        loading: whether it does not know yet if there is another one, and will `RollCall.say_out`.
    """

    begun: int
    out: bool = False
    stop: bool = False
    finish: bool = False
    gone: bool = False
    loading: bool = False


class RollCall:
    """One worker's part in the roll calls of a run.

    Args:
        store: that all workers share, of `torch.distributed`.
        rank: this worker.
        world_size: how many there are.
        timeout_seconds: after which a worker that does not answer is taken for stuck.

    Attributes:
        begun: batches that this worker has begun since the run started.
        under_way: whether somebody has asked, as far as this worker knows.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._number = 0  # of the next roll call, the same on all workers
        self._loading = False  # whether a batch has begun of which nobody knows yet whether it is the last
        self._answered = False
        self.begun = 0
        self.under_way = False

    def begin(self) -> bool:
        """Count a batch that will be loaded, unless a roll call is under way: whether it may begin."""
        with self._lock:
            if not self.under_way:
                self.begun += 1
                self._loading = True
            return not self.under_way

    def loaded(self) -> None:
        """Learn that the batch is there, and that there will be others."""
        with self._lock:
            self._loading = False

    def ask(self, out: bool = False, stop: bool = False, finish: bool = False, gone: bool = False) -> None:
        """Answer, and let all workers do so, unless this one has answered."""
        with self._lock:
            self.under_way, self._loading = True, False
            self._answer(Answer(self.begun, out, stop, finish, gone))
            self._store.set(f"roll/{self._number}/asked", "")

    def listen(self, store: Any) -> None:
        """Answer if somebody has asked; on the thread that calls this a few times a second."""
        number = self._number
        if self._answered or not store.check([f"roll/{number}/asked"]):
            return
        with self._lock:
            if number == self._number:  # it was not ended meanwhile
                self.under_way = True
                self._answer(Answer(self.begun, loading=self._loading))

    def answers(self, check: Callable[[], None]) -> list[Answer]:
        """Tell what all workers say, by rank; waits for it.

        Args:
            check: is called while waiting; raises if another worker has failed.

        Raises:
            PeerLost: if somebody does not answer.
        """
        texts = self._wait([f"roll/{self._number}/{rank}" for rank in range(self._world_size)], check)
        return [Answer(*json.loads(text)) for text in texts]

    def say_out(self, out: bool) -> None:
        """Say whether there is a batch after the last that anybody has begun; at that batch, when it is loaded."""
        self._store.set(f"roll/{self._number}/out/{self._rank}", str(int(out)))

    def out(self, ranks: Sequence[int], check: Callable[[], None]) -> list[bool]:
        """Tell what some workers have said to `say_out`; waits as `answers` does."""
        return [bool(int(text)) for text in self._wait([f"roll/{self._number}/out/{rank}" for rank in ranks], check)]

    def close(self) -> None:
        """End this roll call; all workers do, before any of them begins another batch."""
        with self._lock:
            self._number += 1
            self.under_way = self._answered = False

    def _answer(self, answer: Answer) -> None:
        if not self._answered:
            self._answered = True
            self._store.set(f"roll/{self._number}/{self._rank}", json.dumps(astuple(answer)))

    def _wait(self, keys: list[str], check: Callable[[], None]) -> list[bytes]:
        deadline, pause = time.monotonic() + self._timeout_seconds, _SHORTEST_POLL_SECONDS
        while keys and not self._store.check(keys):
            check()
            if time.monotonic() > deadline:
                silent = tuple(int(key.split("/")[-1]) for key in keys if not self._store.check([key]))
                raise PeerLost(
                    f"Workers {list(silent)} do not say how many batches they have begun. Worker {self._rank} needs to "
                    f"know it to end an epoch together with them, and has waited {self._timeout_seconds:g} s. Raise "
                    "`exchange_timeout_seconds` if loading a batch takes so long.",
                    silent,
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        return [self._store.get(key) for key in keys]
