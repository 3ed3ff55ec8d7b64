"""How many bytes exchanges send, in what parts, and what is counted of them: the same for real and virtual workers."""

from __future__ import annotations

from dataclasses import dataclass, field

CALL_AHEAD = 2  # parts of a call that its responder asks for before it needs them
DIRECT_BYTES = 1 << 18  # of a vector that all workers reduce in two messages of each to each, and in a ring beyond


def all_reduce_bytes(num_bytes: int, workers: int) -> int:
    """Return bytes that each worker sends in a bandwidth-optimal all-reduce of ``num_bytes``."""
    return 2 * (workers - 1) * num_bytes // workers


@dataclass(frozen=True, slots=True)
class Wait:
    """A time in which a worker could do nothing but wait; in seconds of its own ``time.perf_counter``.

    Attributes:
        began: when it began to wait.
        ended: when it went on.
        asked: when it began what it waited for; before `began` where it did something else meanwhile.
        place: where in its program: the number of the optimizer, of the step, and of the wait in that step. Others that
            are at the same place of theirs wait for each other.
        word: what it waited for, as ``NeighborAverage``.
        peers: for whom; none: for all others; empty: for nobody that is known.
    """

    began: float
    ended: float
    asked: float
    place: tuple[int, int, int]
    word: str
    peers: tuple[int, ...] | None


@dataclass(slots=True)
class Traffic:
    """What one worker sent, and how long it waited for it.

    Attributes:
        bytes_sent: payload bytes sent to others (headers not counted).
        messages: messages sent (an all-reduce is one).
        exchanges: exchanges finished: neighbour exchanges, all-reduces, and calls made.
        calls_answered: calls of others that this worker answered.
        exposed_seconds: seconds in which the worker could do nothing but wait for an exchange.
        waits: each of these times, where somebody records them.
    """

    bytes_sent: int = 0
    messages: int = 0
    exchanges: int = 0
    calls_answered: int = 0
    exposed_seconds: float = 0.0
    waits: list[Wait] | None = field(default=None, compare=False)


def call_part_bytes(num_bytes: int) -> int:
    """Return bytes of the parts in which a call travels: about 16, small against the model, large against a message's
    cost."""
    return min(max(num_bytes // 16, 256 << 10), 2 << 20)
