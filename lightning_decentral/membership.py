"""Who takes part in a run whose workers come and go: the entries of the log that all agree on, and the rules for them.

Pure data. Real workers write the log on a store, the simulator in a list; both use what is here to decide what the next
entry is, and who is lost.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self, get_args

from lightning_decentral.errors import ConfigurationError

Phase = Literal["gathering", "training", "averaging", "meeting", "over"]
"""What the living do: wait for others before the first epoch, train in an epoch, average at the end of a round of it,
meet at its end; or nobody is left."""

SILENT_HEARTBEATS = 1.5
"""A worker is lost when its heart has stood still for so many heartbeats, as seen by one that lives."""

_REMEMBERED_ROUNDS = 8


@dataclass(frozen=True, order=True)
class Member:
    """A worker, from its start to its end.

    Args:
        rank: its place; a worker that is started again has it, too.
        life: a number that no other start of any worker has.
    """

    rank: int
    life: int


@dataclass(frozen=True)
class Members:
    """One entry of the log.

    Args:
        number: of the entry.
        phase: what the living do.
        epoch: in which, or at the end of which, they are.
        living: who takes part, by rank.
        gone: the lives of those that were lost or left in this epoch.
        dealt: the lives that had a batch of this epoch from its beginning, in the order of these batches.
        identity: what all must have in common.
        round: how many rounds of local updates this epoch has had.
        closed: whether one of the living has no more batches of this epoch, so that no round ends in it any more.
        met: who was there when all began to average or to meet: those that average first.

    Example:
        >>> members = Members.founded(Member(0, 1), "a run", 0).joined(Member(1, 2)).training(0)
        >>> members.without([1]).living, members.without([1]).gone
        ((Member(rank=1, life=2),), (1,))
    """

    number: int = -1
    phase: Phase = "gathering"
    epoch: int = 0
    living: tuple[Member, ...] = ()
    gone: tuple[int, ...] = ()
    dealt: tuple[int, ...] = ()
    identity: str = ""
    round: int = 0
    closed: bool = False
    met: tuple[Member, ...] = ()

    @classmethod
    def founded(cls, member: Member, identity: str, epoch: int) -> Self:
        """Return the first entry, of one worker that waits for others."""
        return cls(number=0, epoch=epoch, living=(member,), identity=identity)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the living, in order."""
        return tuple(member.rank for member in self.living)

    @cached_property
    def lives(self) -> frozenset[int]:
        """The lives of the living."""
        return frozenset(member.life for member in self.living)

    def life_of(self, rank: int) -> int | None:
        """Tell which life of a rank takes part."""
        return next((member.life for member in self.living if member.rank == rank), None)

    def leads(self, life: int) -> bool:
        """Tell whether a worker is the first of the living, who writes what is written once."""
        return bool(self.living) and self.living[0].life == life

    def joined(self, member: Member) -> Self:
        """Return the next entry, with one more worker.

        Raises:
            ConfigurationError: if its rank takes part already, or the living average, or are at the end of an epoch.
        """
        if self.phase not in ("gathering", "training") or self.life_of(member.rank) is not None:
            raise ConfigurationError(
                f"Worker {member.rank} got to join {self.ranks} in phase {self.phase!r}; it needs a rank that is free "
                "and workers that train. Wait for the next epoch, or take another rank."
            )
        return dataclasses.replace(self, number=self.number + 1, living=tuple(sorted((*self.living, member))))

    def without(self, lives: Iterable[int]) -> Self:
        """Return the next entry, without some workers; the run is over with the last."""
        lost = set(lives) & self.lives
        living = tuple(member for member in self.living if member.life not in lost)
        gone = tuple(sorted({*self.gone, *lost}))
        phase: Phase = self.phase if living else "over"
        return dataclasses.replace(self, number=self.number + 1, living=living, gone=gone, phase=phase)

    def meeting(self) -> Self:
        """Return the next entry: all the living have come to the end of the epoch, and nobody joins."""
        return dataclasses.replace(self, number=self.number + 1, phase="meeting", met=self.living)

    def training(self, epoch: int) -> Self:
        """Return the next entry: an epoch begins, of which each of the living has a batch."""
        dealt = tuple(member.life for member in self.living)
        begun = dataclasses.replace(self, number=self.number + 1, phase="training", round=0, closed=False)
        return dataclasses.replace(begun, epoch=epoch, gone=(), dealt=dealt)

    def averaging(self) -> Self:
        """Return the next entry: all the living have come to the end of a round, and nobody joins."""
        return dataclasses.replace(self, number=self.number + 1, phase="averaging", met=self.living)

    def averaged(self) -> Self:
        """Return the next entry: all the living have the average of the round, and train on."""
        return dataclasses.replace(self, number=self.number + 1, phase="training", round=self.round + 1)

    def closing(self) -> Self:
        """Return the next entry: one of the living has no more batches of this epoch."""
        return dataclasses.replace(self, number=self.number + 1, closed=True)

    def to_json(self) -> str:
        """Return the entry as text."""
        members = {name: [[each.rank, each.life] for each in getattr(self, name)] for name in ("living", "met")}
        return json.dumps({**dataclasses.asdict(self), **members})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read an entry.

        Raises:
            ConfigurationError: if it is none.
        """
        try:
            read = json.loads(text)
            living, met = (
                tuple(Member(int(rank), int(life)) for rank, life in read[name]) for name in ("living", "met")
            )
            if read["phase"] not in get_args(Phase):
                raise ValueError(read["phase"])
            return cls(
                int(read["number"]),
                read["phase"],
                int(read["epoch"]),
                living,
                tuple(int(life) for life in read["gone"]),
                tuple(int(life) for life in read["dealt"]),
                str(read["identity"]),
                int(read["round"]),
                bool(read["closed"]),
                met,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigurationError(
                f"The log of the members got {text[:80]!r}, which is no entry; it needs a store that nobody else "
                "writes to. Start a rendezvous of its own for each job."
            ) from error


class Patience:
    """Learns for how long those that are at the end of a round wait for all others, from the times of earlier arrivals.

    ``median + grace * MAD`` of the seconds from the beginning of a round to its end, over the workers and the last
    rounds; MAD is the median of the absolute differences to the median. If so long has passed, and enough workers are
    there, the others are asked to end their round after the step that they are in.

    Args:
        grace: the factor, 0 or more.
        quorum: which share of the living is enough, in (0, 1].
        most_seconds: after being asked, until whoever has not come is left out.

    Raises:
        ConfigurationError: if a number is out of its range.

    Example:
        >>> patience = Patience(grace=3.0, quorum=0.5, most_seconds=300.0)
        >>> for seconds in ([10.0, 11.0, 40.0], [9.0, 10.0, 12.0]):
        ...     patience.note(seconds)
        >>> patience.seconds, patience.enough(3)
        (13.5, 2)
    """

    def __init__(self, grace: float, quorum: float, most_seconds: float) -> None:
        if not 0.0 <= grace < math.inf or not 0.0 < quorum <= 1.0:
            raise ConfigurationError(
                f"OpenStrategy(grace={grace}, quorum={quorum}): needs a finite grace of 0 or more, and a quorum in "
                "(0, 1]. Use grace=3.0 and quorum=0.5, or grace=None to wait for the slowest."
            )
        self._grace, self._quorum, self.most_seconds = grace, quorum, most_seconds
        self._rounds: deque[list[float]] = deque(maxlen=_REMEMBERED_ROUNDS)

    def note(self, seconds: Iterable[float]) -> None:
        """Learn how long the workers took to the end of one round."""
        self._rounds.append(list(seconds))

    @property
    def seconds(self) -> float:
        """The time from the beginning of a round for which all are waited for; for ever, until there have been two."""
        if len(self._rounds) < 2:
            return math.inf
        all_seconds = [each for arrivals in self._rounds for each in arrivals]
        median = statistics.median(all_seconds)
        return median + self._grace * statistics.median(abs(each - median) for each in all_seconds)

    def enough(self, living: int) -> int:
        """Tell how many have to be at the end of a round, of so many living."""
        return math.ceil(self._quorum * living)


class Hearts:
    """Tells whose heart is silent, from the beats that one worker sees.

    Args:
        heartbeat_seconds: see `SILENT_HEARTBEATS`.
    """

    def __init__(self, heartbeat_seconds: float) -> None:
        self._limit = SILENT_HEARTBEATS * heartbeat_seconds
        self._seen: dict[int, tuple[int, float]] = {}

    def hear(self, life: int, beat: int, now: float) -> None:
        """Note how often a heart has beaten by now."""
        if self._seen.get(life, (-1, now))[0] != beat:
            self._seen[life] = beat, now

    def forget(self, now: float) -> None:
        """Let all have beaten now: who looks has not looked for a while itself."""
        self._seen = {life: (beat, now) for life, (beat, _) in self._seen.items()}

    def silent(self, lives: Iterable[int], now: float) -> tuple[int, ...]:
        """Tell which of some workers' hearts have stood still for too long."""
        return tuple(life for life in lives if now - self._seen.get(life, (0, now))[1] > self._limit)
