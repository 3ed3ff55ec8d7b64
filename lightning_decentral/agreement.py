"""How workers that come and go agree: coroutines that ask a store, which real workers and the simulator answer.

Each awaits *operations*. One at a time is done on the store as a whole, whatever others do; between two of them
anything may have happened. So what is proved with the simulator's store, where each operation may be the last one of
its worker, is what real workers do. It is one file, since each of these relies on what others leave on the store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass
from typing import Any

from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.membership import Hearts, Member, Members, Patience

_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.001, 0.02
_MOVES, _STAYS = b"moves", b"stays"
_LONGEST_MOVE_SECONDS = 20.0  # from a claim to being entered; or the worker was lost in between
_SIGNS_OF_LIFE = 2  # beats of a worker, after which its rank is not about to become free


class Operation:
    """Something that is asked for."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield self)


@dataclass(frozen=True, slots=True)
class Look(Operation):
    """Answered with the newest entry of the log."""


@dataclass(frozen=True, slots=True)
class Known(Operation):
    """Answered with the newest entry that this worker knows of, without a question to the store."""


@dataclass(frozen=True, slots=True)
class Propose(Operation):
    """Write the next entry of the log; answered with whether nobody was quicker. This worker knows the entry then."""

    members: Members


@dataclass(frozen=True, slots=True)
class Set(Operation):
    """Lay a value on the store."""

    key: str
    value: bytes = b""


@dataclass(frozen=True, slots=True)
class SetFirst(Operation):
    """Lay a value on the store unless there is one; answered with what is there afterwards."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Check(Operation):
    """Answered with whether there is something under all of these keys."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Get(Operation):
    """Answered with the values of keys that are there."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Count(Operation):
    """Add to a number; answered with the sum."""

    key: str
    by: int = 1


@dataclass(frozen=True, slots=True)
class Now(Operation):
    """Answered with the seconds of this worker's clock."""


@dataclass(frozen=True, slots=True)
class Pause(Operation):
    """Let some time pass; raises where this worker cannot go on."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Prepare(Operation):
    """Take over what the others have, to join them; answered with the entry of which that is, or with ``None`` if this
    worker has not all that it needs."""

    members: Members


Agreeing = Coroutine[Any, Any, Any]


async def enter(
    me: Member, identity: str, epoch: int, where: str, batches: Callable[[int], int] = lambda _: 0
) -> tuple[bool, int | None]:
    """Found a run, or join it.

    Args:
        me: the worker.
        identity: what all have in common, as text of a dictionary.
        epoch: with which the run begins, if it is founded.
        where: the job and its rendezvous, for messages.
        batches: tells how many an epoch has; 0: nobody deals any.

    Returns:
        Whether it was founded; and the batch with which this worker joins an epoch that goes on, if it does.

    Raises:
        ConfigurationError: if the others are of another run, the run is over, or the rank is taken.
    """
    beats: dict[int, int] = {}  # of who has the rank, when this worker saw it first
    tries = 0
    while True:
        members: Members = await Look()
        if members.number < 0:
            if await Propose(Members.founded(me, identity, epoch)):
                return True, None
            continue
        if members.phase == "over":
            raise ConfigurationError(
                f"Worker {me.rank} got {where}, which is over; it needs one that goes on, or a new one. Start another "
                "rendezvous, or give the job another name on all workers (LIGHTNING_DECENTRAL_JOB)."
            )
        require_same(me.rank, identity, members.identity)
        other = members.life_of(me.rank)
        if other is not None:
            now = int(await Count(f"beat/{other}", 0))
            if now >= beats.setdefault(other, now) + _SIGNS_OF_LIFE:
                raise ConfigurationError(
                    f"Worker {me.rank} got a rank that takes part already, in its life {other}; it needs a free one. "
                    "Start it with another NODE_RANK, or end the other one."
                )
            await Pause(_LONGEST_POLL_SECONDS)
            continue
        of_epoch = batches(members.epoch) if members.phase == "training" else 0
        if members.phase in ("averaging", "meeting") or (of_epoch and not await _something_is_left(members, of_epoch)):
            await Pause(_LONGEST_POLL_SECONDS)  # the next epoch will come
            continue
        prepared: Members | None = await Prepare(members)
        if prepared is None:
            await Pause(_SHORTEST_POLL_SECONDS)
            continue
        newest: Members = await Look()
        # What was prepared is of this epoch, or of none; rounds of it may have gone on meanwhile.
        same = _place(prepared) == _place(newest) and _place(prepared)[:2] == _place(members)[:2]
        if not same or newest.life_of(me.rank) is not None:
            continue
        if of_epoch:
            tries += 1
            batch = await _join_with_a_batch(me, newest, of_epoch, f"joins {tries}")
            if batch is not None:
                return False, batch
        elif await Propose(newest.joined(me)):
            return False, None


async def _join_with_a_batch(me: Member, members: Members, batches: int, token: str) -> int | None:
    """Claim a batch of an epoch, and join it, with no pause in between; or give the batch back, and return ``None``."""
    epoch, newest = members.epoch, members
    await _moves(me.life, epoch, True)
    claimed = await claim(me.life, batches, token, 1, epoch)
    if claimed:
        await Set(f"claimed/{epoch}/{me.life}", json.dumps(claimed).encode())
    joined = False
    while claimed and not joined and _place(newest) == _place(members) and newest.life_of(me.rank) is None:
        joined = await Propose(newest.joined(me))
        newest = await Look()
    if claimed and not joined:
        number = int(await Count(f"returns/{epoch}"))
        await Set(f"returned/{epoch}/{number}", str(claimed[0]).encode())
    await _moves(me.life, epoch, False)
    return claimed[0] if joined else None


async def leave(life: int) -> None:
    """Leave the others, which tell it from a loss by what is laid on the store."""
    await Set(f"left/{life}")
    while True:
        members: Members = await Look()
        if life not in members.lives or await Propose(members.without([life])):
            return


async def advance(
    life: int,
    here: str,
    following: Callable[[Members], Members],
    reached: Callable[[Members], bool],
    value: bytes = b"",
    waiting: Callable[[Members], Agreeing] | None = None,
) -> Members:
    """Wait until all the living are at the same place, and write the entry that follows; return the one reached.

    Args:
        life: this worker's.
        here: the place, named alike on all workers, and never again.
        following: makes the entry that follows.
        reached: whether an entry is that one.
        value: what is laid on the store at this place.
        waiting: what is done again and again while others are waited for.

    Raises:
        PeerLost: if this worker was left out.
    """
    await Set(f"{here}/{life}", value)
    seconds = _SHORTEST_POLL_SECONDS
    while True:
        members: Members = await Look()
        if life not in members.lives:
            raise PeerLost("This worker was left out.")
        if reached(members):
            return members
        if await Check(tuple(f"{here}/{each}" for each in sorted(members.lives))):
            await Propose(following(members))
        else:
            if waiting is not None:
                await waiting(members)
            await Pause(seconds)
            seconds = min(2 * seconds, _LONGEST_POLL_SECONDS)


async def go_on(life: int, following: Callable[[Members], Members], reached: Callable[[Members], bool]) -> None:
    """Write the entry that follows what all the living have just agreed on, unless another one has.

    Args:
        life: this worker's.
        following: makes the entry that follows.
        reached: whether an entry is that one, or comes after it.

    Raises:
        PeerLost: if this worker was left out.
    """
    while not reached(members := await Known()):
        if life not in members.lives:
            raise PeerLost("This worker was left out.")
        await Propose(following(members))


async def end_round(life: int, began: float = 0.0, patience: Patience | None = None) -> bool:
    """Wait until all the living are at the end of this round of this epoch, and let them average.

    Args:
        life: this worker's.
        began: when its round did, by its clock.
        patience: for how long all are waited for; then those that have not come are asked to end their round, see
            `is_hurried`. ``None``: for as long as they live.

    Returns:
        Whether they average now. They do not where one of them has come to the end of the epoch: all average there.

    Raises:
        PeerLost: if this worker was left out.
    """
    members: Members = await Known()
    place, here = _place(members), f"round/{members.epoch}/{members.round}"
    asked: list[float] = []

    async def ask(members: Members) -> None:
        assert patience is not None
        now = await Now()
        if now - began <= patience.seconds:
            return
        there = [each for each in sorted(members.lives) if await Check((f"{here}/{each}",))]
        if len(there) < patience.enough(len(members.lives)):
            return
        if not asked:
            asked.append(now)
            await Set(_hurry(members))
        elif now - asked[0] > patience.most_seconds:
            await Propose(members.without(members.lives.difference(there)))

    seconds = await Now() - began
    reached = await advance(
        life,
        here,
        Members.averaging,
        lambda now: _place(now) != place or now.closed,
        repr(seconds).encode(),
        None if patience is None else ask,
    )
    averages = reached.phase == "averaging"
    if averages and patience is not None:
        patience.note(map(float, await Get(tuple(f"{here}/{member.life}" for member in reached.living))))
    return averages


async def is_hurried(members: Members) -> bool:
    """Tell whether those that have not come to the end of a round are asked to end it after the step they are in."""
    hurried: bool = await Check((_hurry(members),))
    return hurried


async def hurry(members: Members) -> None:
    """Ask those that have not come to the end of this round to end it after the step they are in."""
    await Set(_hurry(members))


def _hurry(members: Members) -> str:
    return f"hurry/{members.epoch}/{members.round}"


async def meet(life: int, place: str) -> tuple[Member, ...]:
    """Return who exchanges now: the same on all of the living.

    Args:
        life: this worker's.
        place: named alike on all workers, and never again.

    Raises:
        PeerLost: if this worker was left out.
    """
    return tuple(await gather(life, place, "an average", b""))


async def all_made(life: int, place: str, members: tuple[Member, ...], made: bool) -> bool:
    """Tell whether an exchange came to its end on each of those that made it; the same on all of the living.

    If not, because one of them was lost, it has to be made again by those that are left.

    Args:
        life: this worker's.
        place: named alike on all workers, and never again.
        members: whose exchange it was.
        made: whether it came to its end here.

    Raises:
        PeerLost: if this worker was left out.
    """
    given = await gather(life, place, "the end of an average", b"" if made else b"failed")
    return tuple(given) == members and not any(given.values())


async def close_rounds(life: int) -> None:
    """Let no more rounds end in this epoch, of which this worker has no more batches.

    Raises:
        PeerLost: if this worker was left out.
    """
    while True:
        members: Members = await Look()
        if life not in members.lives:
            raise PeerLost("This worker was left out.")
        if members.closed or await Propose(members.closing()):
            return


def _place(members: Members) -> tuple[str, int, int]:
    """Tell what the living do, and since when."""
    return members.phase, members.epoch, members.round


async def gather(life: int, place: str, what: str, value: bytes) -> dict[Member, bytes]:
    """Return what each of the living has given; the same on all of them.

    Args:
        life: this worker's.
        place: named alike on all workers, and never again.
        what: for messages.
        value: of this worker.

    Raises:
        ConfigurationError: if others do something else.
        PeerLost: if this worker was left out.
    """
    name = what.encode()
    await Set(f"{place}/{life}", len(name).to_bytes(2, "big") + name + value)
    seconds, decided = _SHORTEST_POLL_SECONDS, f"{place}/decided"
    members: Members = await Known()
    while True:
        if await Check(tuple(f"{place}/{member.life}" for member in members.living)):
            text = json.dumps([[member.rank, member.life] for member in members.living])
            text_of = await SetFirst(decided, text.encode())
            break
        if await Check((decided,)):  # by others, for whom somebody was still there, or was so no more
            (text_of,) = await Get((decided,))
            break
        await Pause(seconds)
        seconds = min(2 * seconds, _LONGEST_POLL_SECONDS)
        members = await Look()
    counted = [Member(rank, other) for rank, other in json.loads(text_of)]
    if all(member.life != life for member in counted):
        raise PeerLost("This worker was left out.")
    given: dict[Member, bytes] = {}
    names: dict[str, list[int]] = {}
    raws = await Get(tuple(f"{place}/{member.life}" for member in counted))
    for member, raw in zip(counted, raws, strict=True):
        length = int.from_bytes(raw[:2], "big")
        given[member] = bytes(raw[2 + length :])
        names.setdefault(bytes(raw[2 : 2 + length]).decode(), []).append(member.rank)
    if len(names) > 1:
        where = "; ".join(f"workers {ranks} at {each}" for each, ranks in names.items())
        raise ConfigurationError(
            f"The workers do not do the same: {where}. What all workers do together, they must do equally often and in "
            "the same order. Look for a checkpoint or a collective on some workers only."
        )
    return given


async def beat(life: int, hearts: Hearts, began: float) -> Members:
    """Let a heart beat, and enter into the log whose heart is silent; return the newest entry.

    Args:
        life: this worker's.
        hearts: that it hears.
        began: when this beat did, by its clock, before it asked for anything. Silence is counted up to then: if
            this worker itself stands still within the beat, or the store does not answer, nobody is silent.
    """
    await Count(f"beat/{life}")
    members: Members = await Look()
    others = sorted(members.lives - {life})
    for other in others:
        hearts.hear(other, int(await Count(f"beat/{other}", 0)), await Now())
    silent = hearts.silent(others, began)
    if silent:
        await Propose(members.without(silent))
        members = await Look()
    return members


async def lost_of(needs: Iterable[int], known: dict[int, int], members: Members) -> int | None:
    """Tell which of the workers is gone without whom the others do not go on; ``None``: all of them are there.

    One that has left at the end of the run is not missed.

    Args:
        needs: their ranks.
        known: their lives, as far as this worker has seen them; noted here.
        members: the newest entry.
    """
    for rank in needs:
        life, before = members.life_of(rank), known.get(rank)
        if life is not None and (before is None or members.phase == "gathering"):
            known[rank] = life
        elif before not in (None, life) and (members.phase == "training" or not await Check((f"left/{before}",))):
            return rank
    return None


async def claim(life: int, batches: int, token: str, count: int = 1, epoch: int | None = None) -> list[int]:
    """Claim batches of the epoch: some that nobody has had, or one that a lost worker has not finished; none: nothing
    is left.

    Args:
        life: this worker's.
        batches: how many the epoch has.
        token: that no other claim has.
        count: how many are claimed.
        epoch: of which; ``None``: the one that goes on. Of one that is over nothing is left.
    """
    members: Members = await Look()
    if epoch is not None and epoch != members.epoch:
        return []
    epoch = members.epoch
    end = len(members.dealt) + int(await Count(f"claims/{epoch}", count))
    if end - count < batches:
        return list(range(end - count, min(end, batches)))
    mine, began = f"{life} {token}".encode(), await Now()
    while (members := await Look()).epoch == epoch:
        late = await Now() - began > _LONGEST_MOVE_SECONDS
        waits = life in members.lives and await _somebody_moves(members, late)  # before the look at what is there
        newest: Members = await Look()
        for key, batch in await _given_back(newest) if newest.epoch == epoch else ():
            if await SetFirst(key, mine) == mine:
                return [batch]
        if not waits:
            break
        await Pause(_SHORTEST_POLL_SECONDS)  # until its batches are there
    return []


async def _given_back(members: Members) -> list[tuple[str, int]]:
    """Return the batches of this epoch of those that are gone, or did not join; each with the key of who takes it."""
    found: list[tuple[str, int]] = []
    for lost in members.gone:
        key = f"claimed/{members.epoch}/{lost}"
        if await Check((key,)):
            (unfinished,) = await Get((key,))
            found += [(f"again/{members.epoch}/{lost}/{batch}", int(batch)) for batch in json.loads(unfinished)]
    for number in range(1, int(await Count(f"returns/{members.epoch}", 0)) + 1):
        key = f"returned/{members.epoch}/{number}"
        if await Check((key,)):
            (batch,) = await Get((key,))
            found.append((f"again/{members.epoch}/returned/{number}", int(batch)))
    return found


async def _something_is_left(members: Members, batches: int) -> bool:
    """Tell whether there seems to be a batch of this epoch, of so many, for one that joins."""
    if len(members.dealt) + int(await Count(f"claims/{members.epoch}", 0)) < batches:
        return True
    return not all([await Check((key,)) for key, _ in await _given_back(members)])


async def _moves(life: int, epoch: int, moves: bool) -> None:
    """Say that a worker is about to leave or to join, with batches that others take if it does not have them then; or
    that it is no more."""
    await Set(f"moves/{epoch}/{life}", _MOVES if moves else _STAYS)
    if moves:
        await Set(f"mover/{epoch}/{int(await Count(f'movers/{epoch}'))}", str(life).encode())


async def _somebody_moves(members: Members, late: bool) -> bool:
    """Tell whether somebody is about to leave or to join.

    Args:
        members: the newest entry.
        late: whether one that has wanted to join for long is not waited for: it may be lost. A member's heart is heard.
    """
    for number in range(1, int(await Count(f"movers/{members.epoch}", 0)) + 1):
        key = f"mover/{members.epoch}/{number}"
        if not await Check((key,)):  # it is about to say so
            if not late:
                return True
            continue
        (life,) = map(int, await Get((key,)))
        waited_for = life in members.lives or (life not in members.gone and not late)
        if waited_for and await Get((f"moves/{members.epoch}/{life}",)) == [_MOVES]:
            return True
    return False


async def gives_back(life: int, batches: int) -> bool:
    """Tell whether others can still take the batches with which this worker leaves, or it has to make them itself.

    They can as long as not all of the epoch, so many, have been claimed. Who finds later that all have been waits until
    this worker is gone: so nothing may be waited for between this and `leave`.

    Raises:
        PeerLost: if this worker was left out.
    """
    epoch = (await Look()).epoch
    await _moves(life, epoch, True)
    if not await all_claimed(life, batches):
        return True
    await _moves(life, epoch, False)
    return False


async def all_claimed(life: int, batches: int) -> bool:
    """Tell whether of the batches of this epoch, so many, all have been claimed: others may be at its end.

    Raises:
        PeerLost: if this worker was left out.
    """
    members: Members = await Look()
    if life not in members.lives:
        raise PeerLost("This worker was left out.")
    claimed: int = await Count(f"claims/{members.epoch}", 0)
    return len(members.dealt) + claimed >= batches


def require_same(rank: int, own: str, others: str) -> None:
    """Refuse a worker of another run.

    Raises:
        ConfigurationError: if there is a difference; names it.
    """
    if own == others:
        return
    mine: dict[str, Any] = json.loads(own)
    theirs: dict[str, Any] = json.loads(others)
    name = next((name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)), "identity")
    raise ConfigurationError(
        f"Worker {rank} got another {name} than the workers that train: {str(mine.get(name))[:300]} where they have "
        f"{str(theirs.get(name))[:300]}. It needs the same, and has disturbed nobody. Start it with the same program, "
        "versions and token, or another rendezvous."
    )
