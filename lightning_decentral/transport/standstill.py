"""A standstill: nobody can go on, for all who have not come to their end wait for what others would bring.

No worker can see that alone. Each has its heartbeat thread say what it does when worker 0 asks for it; worker 0 asks
as long as somebody waits. If all stand still, each call that a worker waits for is held by the one that it calls, and
nothing has changed when worker 0 asks a second time, then there was a moment at which this was true of all of them at
once. Then those that wait are told that it cannot come any more, steps before answers; or, if nobody has come to an
end, that they wait for each other for ever.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from lightning_decentral.errors import DeadlockError
from lightning_decentral.transport.connections import AbstractConnections

_PATIENCE_SECONDS = 0.2  # of waiting before worker 0 asks
_HURRY_SECONDS = 0.03  # between two heartbeats while somebody waits
Status = dict[str, Any]


class Waiting:
    """Somebody who waits in `Until`.

    Args:
        kind: a step, or an answer to a call.
        what: for what it waits, in words.
        turns: how often somebody had the worker to itself.
        wake: lets it look again, soon.
        call: who has called, and that one's number for the call; of an answer.

    Attributes:
        seen: of how many turns its condition is known not to hold after them.
        told: whether it cannot come any more.
    """

    def __init__(
        self,
        kind: Literal["step", "answer"],
        what: str,
        turns: Callable[[], int],
        wake: Callable[[], None],
        call: tuple[int, int] | None = None,
    ) -> None:
        self.kind, self.what, self.turns, self.wake, self.call = kind, what, turns, wake, call
        self.since = time.monotonic()
        self.seen = -1
        self.told = False


class Standstill:
    """One worker's part in noticing that nobody can go on.

    Args:
        connections: to the other workers.

    Attributes:
        trains: whether this worker computes gradients.
        gradients: how many it has computed.
        over: whether all that train had come to theirs when this worker was told last.
        on_lane: whether its main thread waits for the lane.
        calling: whom it calls, by its number for the call, as long as the answer has not begun to arrive.
    """

    def __init__(self, connections: AbstractConnections) -> None:
        self._links = connections
        self._waiting: list[Waiting] = []
        self._lock = threading.Lock()
        self.trains = True
        self.gradients = 0
        self.over = self.on_lane = False
        self._ended = False  # whether it has come to an end, and waits for the others there
        self._ends = 0  # to which it has come
        self.calling: dict[int, int] = {}
        # The last rounds, and what was said in them. The next one may begin before the verdict on one is read.
        self._answered: deque[tuple[int, Status | None]] = deque([(0, None)], maxlen=2)
        self._told = 0  # the last round in which somebody was told something
        # Of worker 0:
        self._open = self._round = self._wanted = 0
        self._before: list[Status] | None = None
        self._told_at: dict[int, tuple[int, int]] = {}  # in which round a step was told, after how many events
        if connections.watch is not None:
            connections.watch.standstill = self.listen

    @contextmanager
    def at_the_end(self) -> Iterator[None]:
        """Wait for the others at the end, under this; all come to it equally often."""
        self._ends += 1
        self._ended = True
        try:
            yield
        finally:
            self._ended = False

    @contextmanager
    def waiting(self, each: Waiting) -> Iterator[Waiting]:
        """Somebody waits, under this."""
        with self._lock:
            self._waiting.append(each)
        try:
            yield each
        finally:
            with self._lock:
                self._waiting.remove(each)

    def listen(self, store: Any) -> float | None:
        """Take part; on the heartbeat's thread.

        Returns:
            After how many seconds this should be called again, if it is soon.
        """
        with self._lock:
            waiting = tuple(self._waiting)
        if any(time.monotonic() - each.since > _PATIENCE_SECONDS for each in waiting):
            store.add("still/wanted", 1)
        number = store.add("still/round", 0)
        if number > self._answered[-1][0]:
            self._answered.append((number, self._status()))
            store.set(f"still/{number % 2}/{self._links.rank}", json.dumps(self._answered[-1]))
        if waiting and store.add("still/told", 0) > self._told:
            self._heed(store, json.loads(store.get("still/verdict")))
        if self._links.rank == 0:
            self._ask(store)
        return _HURRY_SECONDS if waiting or self._ended or self._open else None

    def _status(self) -> Status | None:
        """Tell what this worker waits for, as all see it; ``None`` if it does something."""
        with self._lock:
            waiting = tuple(self._waiting)
        if any(each.told or each.seen != each.turns() for each in waiting):
            return None
        steps = [each for each in waiting if each.kind == "step"]
        calling = [(peer, number) for number, peer in self.calling.copy().items()]
        ended, ends = self._ended, self._ends
        if not (ended or (steps and (calling or self._links.idle)) or (self.on_lane and calling)):
            return None
        sent = self._links.sent
        return {
            "ended": ended,
            "ends": ends,
            "trains": self.trains,
            "calling": calling,
            "waiting": [(each.kind, each.what, each.call, each.seen) for each in waiting],
            # Who was told goes on, and may wait again, with another gradient, before anything is sent.
            "events": sent.messages + sent.exchanges + sent.calls_answered + self.gradients,
        }

    def _heed(self, store: Any, verdict: dict[str, Any]) -> None:
        """Tell those that this worker has waiting, if they have gone on waiting since; and let worker 0 know."""
        self._told = verdict["round"]
        kind, said = verdict["told"].get(str(self._links.rank)), dict(self._answered).get(verdict["round"])
        if kind is None or said is None or said != self._status():
            return
        self.over = verdict["over"]
        with self._lock:
            waiting = [each for each in self._waiting if each.kind == kind]
        for each in waiting:
            each.told = True
            each.wake()
        store.set(f"still/heeded/{self._links.rank}", str(verdict["round"]))

    # -- worker 0 -----------------------------------------------------------------------------------------------------

    def _ask(self, store: Any) -> None:
        if not self._open:
            wanted = store.add("still/wanted", 0)
            if wanted != self._wanted or self._before is not None:
                self._wanted = wanted
                self._open = self._round = store.add("still/round", 1)
            return
        keys = [f"still/{self._open % 2}/{rank}" for rank in range(self._links.world_size)]
        if not store.check(keys):
            return
        answers = [json.loads(store.get(key)) for key in keys]
        if any(number != self._open for number, _ in answers):
            return
        self._open = 0
        statuses: list[Status] = [status for _, status in answers if status is not None]
        if len(statuses) < len(answers) or _somebody_goes_on(statuses) or not _all_calls_are_held(statuses):
            self._before = None
        elif statuses != self._before:
            self._before = statuses
        else:
            self._before = None
            self._judge(store, statuses)

    def _judge(self, store: Any, statuses: list[Status]) -> None:
        """Nobody can go on."""
        kinds = [{kind for kind, *_ in status["waiting"]} for status in statuses]
        if not any(kinds):
            return
        if not any(status["ended"] for status in statuses):
            assert self._links.watch is not None
            self._links.watch.publish(DeadlockError(_described(statuses)))
            return
        now = sum(status["events"] for status in statuses)
        told_now = {rank for rank, (number, at) in self._told_at.items() if at == now and _heeds(store, rank, number)}
        steps = [rank for rank, each in enumerate(kinds) if "step" in each and rank not in told_now]
        self._told_at |= dict.fromkeys(steps, (self._round, now))
        told = dict.fromkeys(steps, "step") or {rank: "answer" for rank, each in enumerate(kinds) if "answer" in each}
        over = all(status["ended"] for status in statuses if status["trains"])
        store.set("still/verdict", json.dumps({"round": self._round, "told": told, "over": over}))
        store.add("still/told", self._round - store.add("still/told", 0))


def _heeds(store: Any, rank: int, number: int) -> bool:
    """Tell whether a worker has told its step what was said in a round: it had not gone on meanwhile."""
    key = f"still/heeded/{rank}"
    return bool(store.check([key])) and int(store.get(key)) >= number


def _somebody_goes_on(statuses: Sequence[Status]) -> bool:
    """Tell whether somebody is at an end that others have left: all have met there, and it does not know yet."""
    left = max(status["ends"] - status["ended"] for status in statuses)
    return any(status["ended"] and status["ends"] <= left for status in statuses)


def _all_calls_are_held(statuses: Sequence[Status]) -> bool:
    """Tell whether each call that is waited for has arrived, and its answer waits."""
    for rank, status in enumerate(statuses):
        for peer, number in status["calling"]:
            if [rank, number] not in [call for _, _, call, _ in statuses[peer]["waiting"]]:
                return False
    return True


def _described(statuses: Sequence[Status]) -> str:
    lines = ["Nobody can go on:"]
    for rank, status in enumerate(statuses):
        lines += [f"  worker {rank}{what}" for _, what, _, _ in status["waiting"]]
        for peer, _ in status["calling"]:
            lines.append(f"  worker {rank} waits for worker {peer} to answer its call")
    return "\n".join(lines)
