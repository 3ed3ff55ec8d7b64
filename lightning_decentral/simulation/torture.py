"""Runs of workers that come and go, with failures from a seed, in virtual time: does every one of them end well?

The algorithm's coroutines are those that train, and who takes part is agreed on by the coroutines of `agreement`, which
real workers run on a real store. Here each operation on the store takes its time, each worker may die between any two
things that it does, and double-entry bookkeeping tells whether an update was lost or counted twice.

A connection loses nothing and repeats nothing, as TCP: messages are late, or the connection breaks. So these failures
are tried: crashes at any await, restarts, workers that stand still, one that is a hundred times slower, connections
that break and heal, of two workers or of all between two halves, clocks that jump, and a store that is slow or does not
answer for a while.

Workers with rounds of local updates average all together, by the bookkeeping of the store. There it is checked that all
begin a round at one common model, and leave it with one. Where each step is a round on a graph, an exchange fails on
those whose connection is broken, or whose neighbour has crashed; there it is checked that all of the living make a
round or nobody does, and that a round keeps the sum of their models.

Of a server's updates it is checked that each gradient that counts is in one of them once, that one which is said to be
of the newest model was taken there, and, where each worker counts the same, that all that are there do, and nobody
else.

The file is long because a worker's life, what may happen to it, and the books that are kept of it are one machine.
"""

from __future__ import annotations

import copy
import json
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from lightning_decentral import agreement
from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.flat import Vector, pack, unpack
from lightning_decentral.membership import Hearts, Member, Members, Patience
from lightning_decentral.protocol import (
    AbstractAsynchronousAlgorithm,
    AbstractOpenRounds,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    NeighborAverage,
    Start,
    Ticket,
    Until,
)
from lightning_decentral.simulation.events import Clock
from lightning_decentral.worker import Worker

_NUMBERS = 3  # of which a model has
_RATE = 0.1
_BEATS_PER_HEARTBEAT = 4
_ON_STORE = frozenset(
    {
        agreement.Look,
        agreement.Check,
        agreement.Count,
        agreement.Propose,
        agreement.Set,
        agreement.SetFirst,
        agreement.Get,
    }
)
_TOLERANCE = 1e-9  # of sums of a few hundred numbers of size one in double precision


class Open(Protocol):
    """An algorithm for workers that come and go; it has a ``mass``, of which averages in pairs, or with neighbours,
    keep the sum."""

    needs: tuple[int, ...]
    updates_in_answers: bool

    def among(self, ranks: Sequence[int], size: int) -> Any:
        """Return the algorithm for those workers that are there."""

    def init(self, worker: Worker) -> None:
        """Prepare a worker."""


@runtime_checkable
class Weighing(Protocol):
    """An algorithm around a server which tells what would count there how much; `Open` besides."""

    weight_of: Callable[..., float | None]


class TortureFailed(AssertionError):
    """A schedule did not end well; the message says what went wrong, and gives the seed."""


@dataclass(frozen=True)
class Schedule:
    """How large a run is, and what may happen to it.

    Args:
        workers: at the start.
        epochs: of the run.
        batches: of an epoch, of all workers together.
        heartbeat_seconds: of virtual time; a gradient takes about a tenth of a second.
        crashes: at most; each worker is started again.
        pauses: at most.
        breaks: at most, of connections between two workers.
        leavers: at most, that get SIGTERM: they hand over what others have not of them, and their batches, and leave.
        partitions: at most: no connection between some of the workers and the others works for a while.
        outages: at most, of the store, which answers nobody for a while.
        jumps: at most, of one worker's clock, by up to half a minute.
        grace: of the `Patience` with the slowest, of local updates in schedules of odd seeds; ``None``: it is waited
            for.
        most_seconds: after which a run hangs.
    """

    workers: int = 4
    epochs: int = 2
    batches: int = 16
    heartbeat_seconds: float = 1.0
    crashes: int = 3
    pauses: int = 2
    breaks: int = 2
    leavers: int = 1
    partitions: int = 1
    outages: int = 1
    jumps: int = 1
    grace: float | None = None
    most_seconds: float = 1000.0


@dataclass(frozen=True)
class Outcome:
    """How a schedule ended.

    Args:
        seconds: of virtual time.
        events: that happened.
        crashes: of workers.
        joins: of workers, after the run had begun.
        interrupted: exchanges of which only one end was made, or that had to be made again; counted by each worker.
        repeated: batches that were trained again, because whoever had was lost.
        averages: of all that were there, at the end of a round within an epoch; counted by each of them.
    """

    seconds: float
    events: int
    crashes: int
    joins: int
    interrupted: int
    repeated: int
    averages: int


@dataclass(frozen=True, slots=True)
class _Copy(agreement.Operation):
    """Take a copy from a member."""

    donor: Member


@dataclass(eq=False)
class _Life:
    """One start of a worker."""

    rank: int
    life: int
    worker: Worker
    hearts: Hearts
    script: Any = None
    members: Members = field(default_factory=Members)
    algorithm: Any = None
    algorithms: dict[tuple[int, ...], Any] = field(default_factory=dict)  # that it has had, by who was there
    of_step: Any = None  # the algorithm with which its step began
    ended: str = ""  # how, once it is
    frozen_until: float = 0.0
    factor: float = 1.0
    ahead: float = 0.0  # seconds, that its clock is
    crash_after: int | None = None
    done: int = 0  # things that it has done
    unfinished: list[int] = field(default_factory=list)
    lane: deque[_Task] = field(default_factory=deque)
    entered: bool = False
    waits_for: Any = "its start"
    needed: dict[int, int] = field(default_factory=dict)  # lives of those without whom nobody goes on, by rank
    patience: Patience | None = None
    round_began: float = 0.0
    ends_round: bool = False  # whoever joins, it gives its copy later
    leaves: bool = False  # then it was not left out
    leaves_after: float | None = None  # the moment of its SIGTERM
    hurried: tuple[int, int] | None = None  # of which epoch, and which round of it
    waiting: list[_Waiting] = field(default_factory=list)  # of its step, and of its answers

    def weighing(self, source: int) -> Any:
        """Return the algorithm by which a server weighs what comes: its own is weighed by its step."""
        return self.of_step if source == self.rank else self.algorithm


class _Task:
    """A coroutine of one life; on its lane, if it was started by the algorithm."""

    def __init__(self, life: _Life, coroutine: Coroutine[Any, Any, Any], on_lane: bool = False) -> None:
        self.life, self.coroutine, self.on_lane = life, coroutine, on_lane
        self.stack: list[Coroutine[Any, Any, Any]] = []
        self.finished = False
        self.answer: Any = None
        self.waiting: list[_Task] = []


@dataclass(eq=False)
class _Waiting:
    """Somebody who waits in `Until`.

    Args:
        condition: for which.
        go_on: called once it holds, or cannot come any more, with the caller, and which of these.
        caller: who waits for the answer, with its call; none of a step, or if the connection has broken.
    """

    condition: Callable[[], bool]
    go_on: Callable[[Any, bool], None]
    caller: tuple[_Task, Call] | None = None


class _Begun(Ticket[Any]):
    __slots__ = ("task",)

    def __init__(self, task: _Task) -> None:
        self.task = task


async def _one(request: Any) -> Any:
    return await request


class Torture:
    """One schedule.

    Args:
        algorithm: for any number of workers, as `AbstractGossip.among` makes them.
        seed: of all that happens.
        schedule: how large, and how hard.
        trace: is told each event, to be printed.
        without: the disturbances, by number, that do not happen; see `shrink`.

    Attributes:
        disturbances: what disturbs this schedule, in words.
    """

    def __init__(
        self,
        algorithm: Open,
        seed: int,
        schedule: Schedule | None = None,
        trace: Callable[[str], None] | None = None,
        without: Iterable[int] = (),
    ) -> None:
        self._configured, self._seed, self._schedule = algorithm, seed, schedule or Schedule()
        self._trace, self._without = trace, frozenset(without)
        self.disturbances: list[str] = []
        self._rng = random.Random(f"torture {seed}")
        self._clock = Clock()
        self._coroutines: list[Coroutine[Any, Any, Any]] = []
        self._store: dict[str, bytes] = {}
        self._log: list[Members] = []
        self._lives: dict[int, _Life] = {}
        self._broken: dict[tuple[int, int], float] = {}  # until when a connection between two ranks is
        self._gathered: dict[str, Any] = {}
        self._trained: dict[tuple[int, int], list[int]] = {}  # which lives have finished a batch of an epoch
        self._balance: dict[int, Vector] = {}  # of each life: what its model should be
        self._served: dict[int, dict[int, int]] = {}  # of each life of a server: gradients that came, by rank
        self._heard: dict[int, list[Vector]] = {}  # of each life of a server: what its next update is the mean of
        self._weighs = isinstance(algorithm, Weighing)
        self._applies = self._weighs and algorithm.updates_in_answers  # a server does, gradients
        self._averaged: dict[str, Vector] = {}  # what came of each average of all
        self._averages = 0
        self._living = self._crashes = self._joins = self._interrupted = 0
        self._slow_store_until = self._store_stands_until = 0.0

    def run(self) -> Outcome:
        """Run the schedule to its end.

        Raises:
            TortureFailed: if it hangs, or something was lost, counted twice, or is not agreed on.
        """
        try:
            return self._run()
        except TortureFailed:
            raise
        except Exception as error:
            raise TortureFailed(f"seed {self._seed}: raised {type(error).__name__}: {error}") from error
        finally:
            for coroutine in self._coroutines:
                coroutine.close()

    @property
    def models(self) -> list[torch.Tensor]:
        """The models with which workers came to the end of the run, by rank."""
        through = sorted(
            (life.rank, life.life, life.worker) for life in self._lives.values() if life.ended == "is through"
        )
        return [worker.x.buffers[0] for _, _, worker in through if isinstance(worker.x, Vector)]

    def _run(self) -> Outcome:
        plan, clock = self._schedule, self._clock
        self._plan()
        while self._living:
            if not clock.events or clock.seconds > plan.most_seconds:
                waits = ", ".join(
                    f"worker {life.rank} (life {life.life}) waits for {str(life.waits_for)[:120]}"
                    for life in self._lives.values()
                    if not life.ended
                )
                self._fail(f"hangs after {clock.seconds:.1f} virtual seconds: {waits}")
            clock.advance()
        self._check_batches()
        repeated = sum(len(who) - 1 for who in self._trained.values())
        return Outcome(
            clock.seconds, clock.count, self._crashes, self._joins, self._interrupted, repeated, self._averages
        )

    # -- what disturbs ------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Start the workers, and plan what disturbs them."""
        plan, rng, at = self._schedule, self._rng, self._clock.at
        slow = rng.choice([None, *range(plan.workers)])
        for rank in range(plan.workers):
            self._start(rank, rng.uniform(0.0, 0.5))
            if rank == slow and rng.random() < 0.3:
                self._disturb(f"worker {rank} is 100 times slower", setattr, self._lives[rank + 1], "factor", 100.0)
        for rank in rng.sample(range(plan.workers), k=rng.randint(0, min(plan.crashes, plan.workers))):
            things = rng.randint(1, 400)
            text = f"worker {rank} crashes after {things} things that it does"
            self._disturb(text, setattr, self._lives[rank + 1], "crash_after", things)
        for _ in range(rng.randint(0, plan.pauses)):
            when, rank, seconds = rng.uniform(0.0, 6.0), rng.randrange(plan.workers), rng.uniform(0.2, 5.0)
            self._disturb(f"worker {rank} stands still at {when:.2f} s", at, when, self._freeze, rank, seconds)
        for _ in range(rng.randint(0, plan.breaks)):
            pair = tuple(sorted(rng.sample(range(plan.workers), 2)))
            when, seconds = rng.uniform(0.0, 6.0), rng.uniform(0.1, 3.0)
            self._disturb(f"the connection {pair} breaks at {when:.2f} s", at, when, self._break, pair, seconds)
        terminated = random.Random(f"terminated {self._seed}")
        leaving = [rank for rank in range(plan.workers) if rank not in self._configured.needs]
        for rank in terminated.sample(leaving, k=terminated.randint(0, min(plan.leavers, len(leaving)))):
            when, life = terminated.uniform(0.5, 5.0), self._lives[rank + 1]
            self._disturb(f"worker {rank} gets SIGTERM at {when:.2f} s", setattr, life, "leaves_after", when)
        if rng.random() < 0.3:
            when, seconds = rng.uniform(0.0, 4.0), rng.uniform(0.5, 3.0)
            self._disturb(f"the store is slow from {when:.2f} s on", at, when, self._slow_down, seconds, None)
        for _ in range(rng.randint(0, plan.partitions)):
            when, seconds = rng.uniform(0.0, 6.0), rng.uniform(0.1, 3.0)
            some = tuple(sorted(rng.sample(range(plan.workers), rng.randint(1, plan.workers - 1))))
            self._disturb(f"workers {some} are cut off at {when:.2f} s", at, when, self._part, some, seconds)
        for _ in range(rng.randint(0, plan.outages)):
            when, seconds = rng.uniform(0.0, 6.0), rng.uniform(0.2, 5.0)
            self._disturb(f"the store stands still at {when:.2f} s", at, when, self._stop_store, seconds, None)
        for _ in range(rng.randint(0, plan.jumps)):
            when, rank, seconds = rng.uniform(0.0, 6.0), rng.randrange(plan.workers), rng.uniform(0.5, 30.0)
            self._disturb(f"the clock of worker {rank} jumps at {when:.2f} s", at, when, self._jump, rank, seconds)

    def _disturb(self, what: str, arrange: Callable[..., Any], *arguments: Any) -> None:
        if len(self.disturbances) not in self._without:
            arrange(*arguments)
        self.disturbances.append(what)

    def _freeze(self, rank: int, seconds: float) -> None:
        for life in self._living_of(rank):
            life.frozen_until = self._clock.seconds + seconds
            self._say(life, f"stands still for {seconds:.2f} s")

    def _jump(self, rank: int, seconds: float) -> None:
        for life in self._living_of(rank):
            life.ahead += seconds
            self._say(life, f"has a clock that jumps by {seconds:.2f} s")

    def _living_of(self, rank: int) -> list[_Life]:
        return [life for life in self._lives.values() if life.rank == rank and not life.ended]

    def _part(self, some: tuple[int, ...], seconds: float) -> None:
        for one in some:
            for other in range(self._schedule.workers):
                if other not in some:
                    self._break((min(one, other), max(one, other)), seconds)

    def _break(self, pair: tuple[int, int], seconds: float) -> None:
        self._broken[pair] = max(self._broken.get(pair, 0.0), self._clock.seconds + seconds)
        self._tell(f"the connection {pair} breaks for {seconds:.2f} s")
        for life in self._lives.values():
            for waiting in life.waiting:
                if waiting.caller is not None and {life.rank, waiting.caller[0].life.rank} == set(pair):
                    self._interrupted += 1
                    self._comes_to_nothing(*waiting.caller)
                    waiting.caller = None

    def _slow_down(self, seconds: float, _: None) -> None:
        self._slow_store_until = self._clock.seconds + seconds

    def _stop_store(self, seconds: float, _: None) -> None:
        self._store_stands_until = self._clock.seconds + seconds
        self._tell(f"the store stands still for {seconds:.2f} s")

    # -- lives --------------------------------------------------------------------------------------------------------

    def _start(self, rank: int, after: float) -> None:
        life = len(self._lives) + 1
        self._living += 1
        numbers = _NUMBERS + self._schedule.workers * self._applies  # who has part in a model, besides
        x = Vector([torch.full((numbers,), float(rank + 1), dtype=torch.float64)])
        worker = Worker(rank, self._schedule.workers, x, x.clone())
        worker.rng.seed(f"{self._seed} {life}")
        one = self._lives[life] = _Life(rank, life, worker, Hearts(self._schedule.heartbeat_seconds))

        def gradient() -> Vector:
            snapshot = worker.snapshot
            assert isinstance(snapshot, Vector)
            value = self._gradient(rank, snapshot)
            if rank in self._configured.needs and self._applies:  # a server takes its own at once
                self._note_gradient(one, rank, value, worker.state["given"][rank])
            return value

        worker.read_gradient = gradient
        self._configured.init(worker)
        grace = self._schedule.grace if self._seed % 2 else None
        one.patience = None if grace is None else Patience(grace, quorum=0.5, most_seconds=30.0)
        self._balance[life] = self._mass(one)
        coroutines = self._live(one), self._beat(one)
        self._coroutines += coroutines
        for coroutine in coroutines:
            self._clock.at(self._clock.seconds + after, self._go, _Task(one, coroutine), None)

    def _gradient(self, rank: int, model: Any) -> Vector:
        """Return a worker's gradient at a model; where a server applies it there is a 1 in the place of its rank."""
        (x,) = model.buffers
        value = torch.zeros_like(x)
        target = torch.arange(_NUMBERS, dtype=torch.float64) + rank
        value[:_NUMBERS] = (1.0 + 0.5 * rank) * (x[:_NUMBERS] - target)
        if self._applies:
            value[_NUMBERS + rank] = 1.0
        return Vector([value])

    def _crash(self, life: _Life) -> None:
        self._end(life, "crashed")
        self._crashes += 1
        self._start(life.rank, self._rng.uniform(0.05, 4.0))

    def _end(self, life: _Life, how: str) -> None:
        if not life.ended:
            self._living -= 1
            life.ended = how
            self._say(life, how)

    # -- what a worker does -------------------------------------------------------------------------------------------

    async def _live(self, one: _Life) -> None:
        plan, me = self._schedule, Member(one.rank, one.life)
        founded, ahead = await agreement.enter(me, "{}", 0, "the torture", lambda _: plan.batches)
        one.entered = True
        if not founded and one.members.phase == "training":
            self._joins += 1
        while one.members.phase == "gathering" and len(one.members.living) < plan.workers:
            await agreement.Pause(0.05)
            await agreement.Look()
            if await agreement.Now() > 20.0:
                break
        epoch = one.members.epoch
        joins = ahead is not None
        while epoch < plan.epochs:
            if not joins:
                self._balance_is_right(one)
                here = f"begin/{epoch}"
                following = partial(Members.training, epoch=epoch)
                await agreement.advance(one.life, here, following, partial(_is_in, "training", epoch))
                batch: int | None = one.members.dealt.index(one.life)
                one.unfinished = [one.members.dealt.index(one.life)]
                await self._note(one, epoch)
            else:
                assert ahead is not None
                batch, one.unfinished = ahead, [ahead]
            joins = False
            one.round_began = await agreement.Now()
            while batch is not None:
                await self._end_round_if_due(one)
                await self._step(one)
                self._trained.setdefault((epoch, batch), []).append(one.life)
                one.unfinished.remove(batch)
                claimed = await agreement.claim(one.life, plan.batches, str(one.done))
                one.unfinished += claimed
                batch = claimed[0] if claimed else None
                await self._note(one, epoch)
                if await self._departs(one, batch is not None):
                    return
            if self._has_rounds or self._configured.needs:
                await agreement.close_rounds(one.life)
            await agreement.advance(one.life, f"end/{epoch}", Members.meeting, partial(_is_in, "meeting", epoch))
            if isinstance(self._configured, AbstractOpenRounds) and self._configured.ends_with_epoch:
                await self._average(one, f"together/{epoch}/end")
            for number in range(2):
                place = f"together/{epoch}/{number}"
                given = await agreement.gather(one.life, place, "a mean", str(one.worker.step).encode())
                if self._gathered.setdefault(place, given) != given:
                    self._fail(f"worker {one.rank} has agreed on {given} at {place}, others on {self._gathered[place]}")
            epoch += 1
        one.leaves = True
        await agreement.leave(one.life)
        self._end(one, "is through")

    async def _departs(self, one: _Life, has_batch: bool) -> bool:
        """Leave after a SIGTERM, if there is one, with nothing that others have not; tell whether it has."""
        if one.leaves_after is None or await agreement.Now() < one.leaves_after:
            return False
        if await agreement.all_claimed(one.life, self._schedule.batches) and has_batch:
            return False  # it makes this batch first: others may be at the end of the epoch
        if self._has_rounds and not one.members.closed:
            await agreement.hurry(one.members)
            await self._end_round(one)
        elif not self._has_rounds:
            self._follow(one)
            reached = [rank for rank in one.members.ranks if rank != one.rank and self._reaches(one, rank)]
            steps = one.algorithm.depart(one.worker, reached)
            self._coroutines.append(steps)
            await steps
        if has_batch and not await agreement.gives_back(one.life, self._schedule.batches):
            return False
        self._balance_is_right(one)
        one.leaves = True
        await agreement.leave(one.life)
        self._end(one, "left")
        return True

    @property
    def _has_rounds(self) -> bool:
        return isinstance(self._configured, AbstractOpenRounds)

    async def _end_round_if_due(self, one: _Life) -> None:
        algorithm = self._configured
        if not isinstance(algorithm, AbstractOpenRounds):
            return
        if algorithm.is_due(one.worker) or one.hurried == (one.members.epoch, one.members.round):
            await self._end_round(one)

    async def _end_round(self, one: _Life) -> None:
        if not await agreement.end_round(one.life, one.round_began, one.patience):
            return
        one.ends_round = True
        epoch, number = one.members.epoch, one.members.round
        await self._average(one, f"together/{epoch}/round {number}")
        self._averages += 1

        def is_over(members: Members) -> bool:
            return (members.epoch, members.round) > (epoch, number)

        await agreement.go_on(one.life, Members.averaged, is_over)
        one.ends_round = False
        one.round_began = await agreement.Now()

    async def _average(self, one: _Life, place: str) -> None:
        """Let an algorithm end its round; all the living do, and again where an exchange was not made by all."""
        number, members = 0, one.members.met
        while True:
            one.algorithm = self._among(one, tuple(member.rank for member in members))
            steps = one.algorithm.end_round(one.worker)
            self._coroutines.append(steps)
            made = await self._made_round(one, steps, f"{place}/{number}", members)
            if made:
                return
            number += 1
            members = await agreement.meet(one.life, f"{place}/members {number}")

    def _among(self, one: _Life, ranks: tuple[int, ...]) -> Any:
        """Return a life's algorithm for those that are there; as on real workers, no two have one in common."""
        algorithm = one.algorithms.get(ranks)
        if algorithm is None:
            algorithm = self._configured.among(ranks, max(self._schedule.workers, ranks[-1] + 1))
            one.algorithms[ranks] = algorithm
        return algorithm

    async def _made_round(
        self, one: _Life, steps: Coroutine[Any, Any, None], place: str, members: tuple[Member, ...]
    ) -> bool:
        """Answer what an algorithm asks for at the end of a round; tell whether the living have made all of it."""
        worker, number = one.worker, 0
        common = worker.state["global"].buffers[0].tolist() if "global" in worker.state else []
        while True:
            try:
                request: Any = steps.send(None)
            except StopIteration:
                break
            if isinstance(request, NeighborAverage):
                if not await self._average_with_neighbors(one, request, place, members):
                    return False
                continue
            assert isinstance(request, AllReduce)
            assert isinstance(request.value, Vector)
            told = json.dumps([common, request.weight, request.value.buffers[0].tolist()]).encode()
            given = await agreement.gather(one.life, f"{place}/{number}", "an average", told)
            rows = [json.loads(each) for each in given.values()]
            if any(row[0] != rows[0][0] for row in rows):
                self._fail(f"workers {sorted(member.rank for member in given)} began another round each at {place}")
            total = sum(row[1] for row in rows)
            weights = [row[1] / total if total else 1 / len(rows) for row in rows]
            terms = [
                weight * torch.tensor(row[2], dtype=torch.float64) for weight, row in zip(weights, rows, strict=True)
            ]
            request.value.buffers[0].copy_(torch.stack(terms).sum(0))
            await agreement.gather(one.life, f"{place}/{number} made", "the end of an average", b"")
            number += 1
        own = self._balance[one.life] = self._mass(one)
        if number and not torch.equal(self._averaged.setdefault(place, own.clone()).buffers[0], own.buffers[0]):
            self._fail(f"worker {one.rank} left {place} with another model than others")
        return True

    async def _average_with_neighbors(
        self, one: _Life, request: NeighborAverage, place: str, members: tuple[Member, ...]
    ) -> bool:
        """Exchange with neighbours, if all of the members come to its end; tell whether they have."""
        value = request.value
        assert isinstance(value, Vector)
        await agreement.Set(f"{place}/model/{one.rank}", json.dumps(value.buffers[0].tolist()).encode())
        neighbors, there = {*request.weights, *request.send_to}, False
        sources = tuple(f"{place}/model/{source}" for source in request.weights)
        while not there and all(self._reaches(one, rank) for rank in neighbors):
            await agreement.Pause(0.005)
            await agreement.Look()
            if any(member.life not in one.members.lives for member in members):
                break
            there = await agreement.Check(sources)
        if not await agreement.all_made(one.life, f"{place}/made", members, there):
            self._interrupted += 1
            return False
        texts = await agreement.Get(sources)
        rows = [Vector([torch.tensor(json.loads(text), dtype=torch.float64)]) for text in texts]
        before = value.buffers[0].clone()
        request.apply(dict(zip(request.weights, rows, strict=True)))
        told = json.dumps([before.tolist(), value.buffers[0].tolist()]).encode()
        given = await agreement.gather(one.life, f"{place}/sums", "sums", told)
        if len(given) == len(members):  # or one of those that have made it is lost by now
            sums = torch.tensor([json.loads(each) for each in given.values()], dtype=torch.float64).sum(0)
            if float((sums[0] - sums[1]).abs().max()) > _TOLERANCE:
                self._fail(f"the exchange at {place} has changed the sum of the models")
        return True

    async def _note(self, one: _Life, epoch: int) -> None:
        await agreement.Set(f"claimed/{epoch}/{one.life}", json.dumps(one.unfinished).encode())

    async def _step(self, one: _Life) -> None:
        worker = one.worker
        self._follow(one)
        one.of_step = one.algorithm
        worker.snapshot.copy_(worker.x)
        worker.snapshot_version = worker.version
        worker.forget_gradient()
        await one.of_step.step(worker)
        worker.step += 1

    def _follow(self, one: _Life) -> None:
        """Let a worker's algorithm be that of those that are there."""
        ranks = one.members.ranks
        if one.rank in ranks:  # or it was left out, and its heartbeat will say so
            one.algorithm = self._among(one, ranks)
        elif one.algorithm is None:  # before its first step
            one.algorithm = self._among(one, (one.rank,))
        one.algorithm.notice(one.worker)

    def _look_again(self, one: _Life) -> None:
        """Let go on who waits on a worker for what has come, or cannot come any more in this epoch."""
        while one.waiting and not one.ended and self._clock.seconds >= one.frozen_until:
            self._follow(one)
            over = one.members.phase == "training" and one.members.closed
            waiting = next((each for each in one.waiting if over or each.condition()), None)
            if waiting is None:
                return
            one.waiting.remove(waiting)
            waiting.go_on(waiting.caller, waiting.condition())

    async def _beat(self, one: _Life) -> None:
        pause = self._schedule.heartbeat_seconds / _BEATS_PER_HEARTBEAT
        looked = await agreement.Now()
        while not one.ended:
            await agreement.Pause(pause)
            now = await agreement.Now()
            if now - looked > 3 * pause:
                one.hearts.forget(now)
            looked = now
            await agreement.Look()  # as real workers do, which catch up with the log
            entered = one.entered  # before the look of this beat, which does not show a worker that joins during it
            members = await agreement.beat(one.life, one.hearts, now)
            if entered and not (one.ended or one.leaves) and one.life not in members.lives:
                raise PeerLost("This worker was left out.")
            if entered and await agreement.lost_of(self._configured.needs, one.needed, members) is not None:
                raise PeerLost("The server was lost.")
            if self._has_rounds and members.phase == "training" and await agreement.is_hurried(members):
                one.hurried = members.epoch, members.round

    async def _prepare(self, one: _Life, members: Members) -> Members | None:
        """Take a copy of a member, before joining."""
        donor = self._rng.choice(members.living)
        copied: Members | None = await _Copy(donor)
        if copied is not None and self._has_rounds:
            await agreement.Pause(self._rng.uniform(0.0, 0.3))  # while a round may end
        return copied

    # -- the driver ---------------------------------------------------------------------------------------------------

    def _go(self, task: _Task, answer: Any) -> None:
        """Let a task go on, until it waits for something; and those that wait for what it has changed."""
        self._go_on(task, answer)
        if task.life.waiting:
            self._look_again(task.life)

    def _go_on(self, task: _Task, answer: Any) -> None:
        one = task.life
        while True:
            if one.ended:
                task.coroutine.close()
                return
            if self._clock.seconds < one.frozen_until:
                self._clock.at(one.frozen_until, self._go, task, answer)
                return
            one.done += 1
            if one.crash_after is not None and one.done > one.crash_after:
                for inner in reversed(task.stack):
                    inner.close()  # one that has not begun would be missed by Python
                self._crash(one)
                return
            try:
                request = (task.stack[-1] if task.stack else task.coroutine).send(answer)
            except StopIteration as finished:
                if task.stack:
                    del task.stack[-1]
                    answer = finished.value
                    continue
                self._finish(task, finished.value)
                return
            except PeerLost as error:
                self._end(one, "was left out")
                # A heart that beats is heard, unless who listens, or the store, takes longer for a beat than its limit.
                if "left out" in str(error) and not (one.frozen_until or one.patience or self._slow_store_until):
                    self._fail(f"worker {one.rank} was left out, and it has never stood still")
                self._start(one.rank, self._rng.uniform(0.05, 2.0))
                return
            except ConfigurationError as error:  # it has come too late
                self._end(one, "was refused")
                if self._log[-1].phase != "over":
                    self._fail(str(error))
                return
            if isinstance(request, agreement.Prepare):
                task.stack.append(self._prepare(one, request.members))
                answer = None
                continue
            one.waits_for = request
            answer = self._handle(task, request)
            if answer is _LATER:
                return

    def _finish(self, task: _Task, value: Any) -> None:
        task.finished, task.answer = True, value
        for waiting in task.waiting:
            self._clock.at(self._clock.seconds, self._go, waiting, value)
        if task.on_lane:
            task.life.lane.popleft()
            if task.life.lane:
                self._clock.at(self._clock.seconds, self._go, task.life.lane[0], None)

    def _handle(self, task: _Task, request: Any) -> Any:
        one, clock, rng = task.life, self._clock, self._rng
        if type(request) in _ON_STORE:  # as most are
            clock.at(clock.seconds + self._latency(), self._on_store, task, request)
            return _LATER
        match request:
            case agreement.Now():
                return clock.seconds + one.ahead
            case agreement.Known():
                return one.members
            case agreement.Pause(seconds):
                clock.at(clock.seconds + seconds * rng.uniform(1.0, 1.5), self._go, task, None)
            case _Copy(donor):
                clock.at(clock.seconds + rng.uniform(0.01, 0.5), self._copied, task, donor)
            case Gradient():
                seconds = one.factor * 0.1 * (0.5 + rng.paretovariate(3.0) / 2)
                clock.at(clock.seconds + min(seconds, 20.0), self._computed, task, None)
            case LocalStep(at=None):
                self._update(one, request)
                return True
            case Until(condition):
                if condition():
                    return True
                one.waiting.append(_Waiting(condition, lambda _, holds: self._go_on(task, holds)))
            case Start(work):
                return self._begin(one, work)
            case _Begun():
                if request.task.finished:
                    return request.task.answer
                request.task.waiting.append(task)
            case Call():
                clock.at(clock.seconds + self._network(), self._arrive, task, (request, request.value.clone()))
            case _:
                self._fail(f"knows no {type(request).__name__}, which worker {one.rank} asks for")
        return _LATER

    def _latency(self) -> float:
        slow = 0.3 if self._clock.seconds < self._slow_store_until else 0.0
        stands = max(0.0, self._store_stands_until - self._clock.seconds)
        return stands + self._rng.expovariate(1 / 0.0005) + slow * self._rng.random()

    def _network(self) -> float:
        return 0.002 + 0.002 * self._rng.paretovariate(1.5)

    def _computed(self, task: _Task, _: None) -> None:
        task.life.worker.gradient_is_there = True
        self._go(task, None)

    def _update(self, one: _Life, request: LocalStep) -> None:
        direction = one.worker.gradient if request.gradient is None else request.gradient
        assert isinstance(direction, Vector)
        one.worker.version += 1
        if one.rank not in self._configured.needs or not self._weighs:
            one.worker.x.add_(direction, alpha=-_RATE)
            self._balance[one.life].add_(direction, alpha=-_RATE)
        elif self._applies:
            self._check_update(one, direction)
            one.worker.x.add_(direction, alpha=-_RATE)
            self._balance[one.life].add_(direction, alpha=-_RATE)
        else:  # the server has a model of its own besides, which has this one's part at the end of a round
            one.worker.x.add_(direction, alpha=-_RATE)
            state = one.worker.state
            if state["steps"] + 1 >= state["due"]:
                self._note_round(one, one.rank, _minus(one.worker.x, state["anchor"]))

    def _begin(self, one: _Life, work: Any) -> _Begun:
        coroutine = work if isinstance(work, Coroutine) else _one(work)
        self._coroutines.append(coroutine)
        begun = _Task(one, coroutine, on_lane=True)
        one.lane.append(begun)
        if len(one.lane) == 1:
            self._clock.at(self._clock.seconds, self._go, begun, None)
        return _Begun(begun)

    # -- the store ----------------------------------------------------------------------------------------------------

    def _on_store(self, task: _Task, operation: Any) -> None:
        """Do one operation, whether or not its worker is still there to hear of it."""
        answer = self._do(task.life, operation)
        self._clock.at(self._clock.seconds + self._latency(), self._go, task, answer)

    def _do(self, one: _Life, operation: Any) -> Any:
        store = self._store
        match operation:
            case agreement.Look():
                one.members = self._log[-1] if self._log else Members()
                return one.members
            case agreement.Check(keys):
                return all(map(store.__contains__, keys))
            case agreement.Count(key, by):
                store[key] = str(int(store.get(key, b"0")) + by).encode()
                return int(store[key])
            case agreement.Propose(members):
                won = members.number == len(self._log)
                if won:
                    self._log.append(members)
                    self._say(one, f"writes entry {members.number}: {members.phase} {members.epoch} {members.ranks}")
                one.members = self._log[-1]
                return won
            case agreement.Set(key, value):
                store[key] = value
            case agreement.SetFirst(key, value):
                return store.setdefault(key, value)
            case agreement.Get(keys):
                return [store[key] for key in keys]
        return None

    # -- between two workers ------------------------------------------------------------------------------------------

    def _reaches(self, one: _Life, rank: int) -> _Life | None:
        """Return the life at the other end of an edge, if there is one that works."""
        life = one.members.life_of(rank)
        other = None if life is None else self._lives[life]
        if other is None or other.ended or one.life not in other.members.lives:
            return None
        pair = (min(one.rank, rank), max(one.rank, rank))
        return None if self._clock.seconds < self._broken.get(pair, 0.0) else other

    def _arrive(self, task: _Task, sent: tuple[Call, Any]) -> None:
        """Learn that a call has come to the one that is called, or that the edge is broken."""
        one, (request, value) = task.life, sent
        other = None if one.ended else self._reaches(one, request.peer)
        if other is None:
            self._comes_to_nothing(task, request)
            return
        if self._clock.seconds < other.frozen_until:
            self._clock.at(other.frozen_until, self._arrive, task, sent)
            return
        if self._configured.needs or other.algorithm is None:
            self._follow(other)
        algorithm = other.algorithm
        assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
        if self._applies:
            self._note_gradient(other, one.rank, *other.algorithm.taken_apart(other.worker, value))
        elif self._weighs:
            self._note_round(other, one.rank, value)
        coroutine = algorithm.on_call(other.worker, one.rank, value.clone())
        self._coroutines.append(coroutine)
        self._answer(other, coroutine, (task, request), None)
        self._look_again(other)

    def _answer(
        self, other: _Life, coroutine: Coroutine[Any, Any, Any], caller: tuple[_Task, Call] | None, answer: Any
    ) -> None:
        """Answer a call, at once or later; a server makes its update."""
        before = self._mass(other)
        while True:
            try:
                request: Any = coroutine.send(answer)
            except StopIteration as finished:
                reply = finished.value.clone()
                break
            match request:
                case LocalStep():
                    self._update(other, request)
                    answer = True
                case Until(condition) if condition():
                    answer = True
                case Until(condition):
                    other.waiting.append(_Waiting(condition, partial(self._answer, other, coroutine), caller))
                    return
                case _:
                    self._fail(f"worker {other.rank} waits for a {type(request).__name__} in an answer")
        change = _minus(self._mass(other), before)
        if self._configured.needs:
            self._check_counts(other)
        if not self._weighs:
            other.worker.version += 1
            self._balance[other.life].add_(change)
        elif not self._applies:
            self._balance_is_right(other)
        if caller is not None:
            task, call = caller
            self._clock.at(self._clock.seconds + self._network(), self._return, task, (call, reply, change, other))

    def _note_gradient(self, server: _Life, source: int, value: Vector, version: int) -> None:
        """Learn that a server is given a gradient at a version of its model, before it takes it."""
        counts = self._served.setdefault(server.life, {})
        counts[source] = counts.get(source, 0) + 1
        if version == server.worker.state["version"]:
            difference = float(_minus(value, self._gradient(source, server.worker.x)).buffers[0].abs().max())
            if difference > _TOLERANCE:
                self._fail(f"a gradient of worker {source} differs by {difference:g} from that at version {version}")
        weight = server.weighing(source).weight_of(server.worker, source, version)
        if weight is not None:
            self._heard.setdefault(server.life, []).append(value.clone().mul_(weight))

    def _note_round(self, server: _Life, source: int, difference: Vector) -> None:
        """Learn that a server is given a round of local steps, before it takes it."""
        counts = self._served.setdefault(server.life, {})
        counts[source] = counts.get(source, 0) + 1
        weight = server.weighing(source).weight_of(server.worker, source)
        self._balance[server.life].add_(difference, alpha=weight)

    def _check_update(self, server: _Life, direction: Vector) -> None:
        """Check that a server applies the mean of what has come since its last update, each gradient once."""
        if server.algorithm.method.by_worker:
            there = server.worker.state["given"]
            shares = [(rank in there) / len(there) for rank in range(self._schedule.workers)]
            found = direction.buffers[0][_NUMBERS:].tolist()
            if max(abs(share - other) for share, other in zip(shares, found, strict=True)) > _TOLERANCE:
                self._fail(f"an update has {found} of the workers, of which {sorted(there)} are there")
            return
        heard = self._heard.pop(server.life, [])
        expected = torch.stack([each.buffers[0] for each in heard]).mean(0) if heard else torch.zeros(_NUMBERS)
        difference = float((direction.buffers[0] - expected).abs().max())
        if difference > _TOLERANCE:
            self._fail(f"the server has applied {len(heard)} gradients wrong by {difference:g}")

    def _check_counts(self, server: _Life) -> None:
        """Check that a server has counted each gradient that came."""
        told, counts = server.algorithm.report(server.worker), self._served.get(server.life)
        if counts is None:
            return
        told = {rank: count + told["dropped"][rank] for rank, count in told["accepted"].items()}
        if told != counts:
            self._fail(f"the server counts {told} gradients by rank, and {counts} have come")

    def _return(self, task: _Task, answered: tuple[Call, Any, Vector, _Life]) -> None:
        """Learn that an answer has come back, or that the edge is broken: then one end is made and the other is not."""
        one, (request, reply, change, other) = task.life, answered
        if one.ended or self._reaches(one, other.rank) is not other:
            self._interrupted += 1
            self._comes_to_nothing(task, request)
            return
        if self._clock.seconds < one.frozen_until:
            self._clock.at(one.frozen_until, self._return, task, answered)
            return
        if request.then is None:
            self._clock.at(self._clock.seconds, self._go, task, reply)
            return
        before = self._mass(one)
        request.then(one.worker, reply)
        own = _minus(self._mass(one), before)
        self._balance[one.life].add_(own)
        # What one end has more, the other has less: both have moved by the same two vectors.
        lost = float((own.buffers[0] + change.buffers[0]).abs().max())
        if lost > _TOLERANCE and not self._weighs:
            self._fail(f"an exchange of workers {one.rank} and {other.rank} has lost {lost:g}")
        self._clock.at(self._clock.seconds, self._go, task, None)

    def _comes_to_nothing(self, task: _Task, request: Call) -> None:
        if task.life.ended:
            return
        if request.then is None:
            self._fail(f"worker {task.life.rank} needs the answer of worker {request.peer}, which is lost")
        self._clock.at(self._clock.seconds + 0.01, self._go, task, None)

    def _copied(self, task: _Task, donor: Member) -> None:
        one, other = task.life, self._lives[donor.life]
        made = not (one.ended or other.ended or self._clock.seconds < other.frozen_until)
        algorithm = self._configured
        if isinstance(algorithm, AbstractOpenRounds):
            made = made and not other.ends_round and other.members.phase not in ("averaging", "meeting")
        if made:
            one.worker.x.copy_(other.worker.x)
            algorithm.init(one.worker)  # which begins at what was copied
            one.worker.step = other.worker.step
            if isinstance(algorithm, AbstractAsynchronousAlgorithm):
                given: Any = unpack(copy.deepcopy(pack(algorithm.handed_over(other.worker))), torch.device("cpu"))
                algorithm.join(one.worker, given)
            self._balance[one.life] = self._mass(one)
        self._clock.at(self._clock.seconds, self._go, task, other.members if made else None)

    # -- whether it is well -------------------------------------------------------------------------------------------

    def _balance_is_right(self, one: _Life) -> None:
        """Check that a worker's model is what it began with, its updates, and its part of exchanges; nothing else."""
        difference = float(_minus(self._mass(one), self._balance[one.life]).buffers[0].abs().max())
        if difference > _TOLERANCE:
            self._fail(f"the model of worker {one.rank} differs by {difference:g} from what was done to it")

    def _check_batches(self) -> None:
        """Check that each batch was trained once: again only if who had it was lost, not at all only if it died with
        it."""
        for one in self._lives.values():
            if one.ended == "is through":
                self._balance_is_right(one)
        lost = {life.life for life in self._lives.values() if life.ended not in ("is through", "left")}
        for epoch in range(self._schedule.epochs):
            if not any(each == epoch for each, _ in self._trained):
                continue
            for batch in range(self._schedule.batches):
                who = self._trained.get((epoch, batch), [])
                if len([life for life in who if life not in lost]) > 1:
                    self._fail(f"batch {batch} of epoch {epoch} was trained by lives {who}")
                if not who and not lost:
                    self._fail(f"batch {batch} of epoch {epoch} was trained by nobody, and nobody was lost")

    def _mass(self, one: _Life) -> Vector:
        """Return of what exchanges keep the sum."""
        algorithm: Any = self._configured
        mass = algorithm.mass(one.worker)
        assert isinstance(mass, Vector)
        return mass

    def _say(self, one: _Life, what: str) -> None:
        self._tell(f"worker {one.rank} (life {one.life}) {what}")

    def _tell(self, what: str) -> None:
        if self._trace is not None:
            self._trace(f"{self._clock.seconds:9.4f} {what}")

    def _fail(self, what: str) -> None:
        raise TortureFailed(f"seed {self._seed}: {what}")


_LATER = object()


def _is_in(phase: str, epoch: int, members: Members) -> bool:
    return members.phase == phase and members.epoch == epoch


def _minus(one: Any, other: Vector) -> Vector:
    return Vector([a - b for a, b in zip(one.buffers, other.buffers, strict=True)])


def torture(
    algorithm: Open, seeds: Sequence[int], schedule: Schedule | None = None
) -> tuple[list[Outcome], list[TortureFailed]]:
    """Run a schedule of each seed.

    Args:
        algorithm: see `Torture`.
        seeds: of the schedules.
        schedule: how large, and how hard.

    Returns:
        How those ended that ended well, and what went wrong with the others.
    """
    outcomes, failures = [], []
    for seed in seeds:
        try:
            outcomes.append(Torture(algorithm, seed, schedule).run())
        except TortureFailed as failure:
            failures.append(failure)
    return outcomes, failures


def shrink(
    algorithm: Open, seed: int, schedule: Schedule | None = None
) -> tuple[frozenset[int], list[str], TortureFailed]:
    """Leave out whatever disturbs a schedule as long as it still does not end well.

    Args:
        algorithm: see `Torture`.
        seed: of a schedule that does not end well.
        schedule: how large, and how hard.

    Returns:
        The numbers of the disturbances that are left out, those that are left, in words, and what goes wrong with them.

    Raises:
        ConfigurationError: if the schedule ends well.
    """
    without: set[int] = set()
    failures, number = _failures_of(one := Torture(algorithm, seed, schedule)), 0
    if not failures:
        raise ConfigurationError(
            f"torture got --shrink and --seed {seed}, which ends well; it needs one that does not. Leave --shrink out."
        )
    while number < len(one.disturbances):
        one = Torture(algorithm, seed, schedule, without={*without, number})
        if failed := _failures_of(one):
            without.add(number)
            failures = failed
        number += 1
    left = [what for each, what in enumerate(one.disturbances) if each not in without]
    return frozenset(without), left, failures[0]


def _failures_of(one: Torture) -> list[TortureFailed]:
    try:
        one.run()
    except TortureFailed as failure:
        return [failure]
    return []
