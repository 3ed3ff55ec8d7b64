"""One worker's part in a run whose workers come and go: its heartbeat, the log of the members, and what all agree on.

Everything lies on a store that outlives the workers. Three kinds of thread use it, each with a connection of its own,
since an operation that waits blocks its connection: the heartbeat, the training thread, and those that make edges.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_decentral import agreement
from lightning_decentral.errors import PeerLost
from lightning_decentral.membership import Hearts, Member, Members, Patience
from lightning_decentral.transport.doors import Door
from lightning_decentral.transport.jobs import JOB, Job, enlist, listed, other_jobs, still_living, store_of

_CONNECT_SECONDS = 30.0
_BEATS_PER_HEARTBEAT = 4
_KEPT_ENTRIES = 1000  # of the log: who has missed more goes on at the newest one
_OF_ONE_ROUND = ("round/", "together/", "hurry/")  # keys that nobody looks at two rounds later
_POLL_SECONDS = 0.005
TOKEN = "LIGHTNING_DECENTRAL_TOKEN"
"""The environment variable with what a worker must know to take part."""


class Membership:
    """A worker among those that take part.

    Args:
        host: of the rendezvous.
        port: of it.
        rank: this worker.
        heartbeat_seconds: a worker is lost when its heart has stood still for one and a half of these.

    Attributes:
        rank: this worker.
        heartbeat_seconds: of all of them.
        life: the number of this start of it.
        members: the newest entry of the log that this worker knows.
        store: a connection for the training thread.
        door: by which others see whether they reach this worker.
        operation: how many things all the living have done together in this meeting.
        failure: why this worker cannot go on, if it cannot.
        job: the name of its job.
        jobs_before: the other jobs that there were when this worker found nobody in its own.
        listener: called at each heartbeat with the store, on that thread.
        between_steps: called while the training thread waits for others.

    Raises:
        PeerLost: if the rendezvous cannot be reached.
    """

    def __init__(self, host: str, port: int, rank: int, heartbeat_seconds: float) -> None:
        self.rank, self.host = rank, socket.gethostname()
        self._address = host, port
        self.job = os.environ.get(JOB, "job")
        self.heartbeat_seconds = heartbeat_seconds
        self._hearts = Hearts(heartbeat_seconds)
        self.failure: Exception | None = None
        self.members = Members()
        self.listener: Callable[[dist.Store], None] = lambda _: None
        self.between_steps: Callable[[], None] = lambda: None
        self.store = self.connect()
        self._beats = self.connect()
        self.life = int(self.store.add("lives", 1))
        self.door = Door(self._address)
        self.store.set(f"door/{self.life}", self.door.address)
        self._joined = self._leaves = self._left = False
        self.jobs_before: tuple[Job, ...] = ()
        self._ends_round = False
        self._written: deque[tuple[int, int, str]] = deque()  # of which epoch and round, and under which key
        self._entries: deque[int] = deque()  # of the log, that this worker has written
        self.operation = 0  # of those that all the living do together, in this meeting
        self._prepare: Callable[[Members], Members | None] = lambda members: members
        self._stop = threading.Event()
        self._look(self.store)
        self._thread = threading.Thread(target=self._beat, name=f"decentral-membership-{rank}", daemon=True)
        self._thread.start()

    def connect(self, place: str = "") -> dist.Store:
        """Return a connection of its own to the store.

        Args:
            place: under which all names are that are used through it.

        Raises:
            PeerLost: if there is none.
        """
        return store_of(self._connect(), self.job, place)

    def door_of(self, life: int) -> str:
        """Return the address at which others see whether they reach a life; empty if it has none."""
        door: str = self.store.get(f"door/{life}").decode()
        return door

    def _connect(self) -> dist.Store:
        """Return a connection to the whole store, where other jobs may be, too."""
        host, port = self._address
        limit = timedelta(seconds=_CONNECT_SECONDS)
        try:
            return dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
        except RuntimeError as error:
            raise PeerLost(
                f"Worker {self.rank} on {self.host} found no rendezvous at {host}:{port} within "
                f"{_CONNECT_SECONDS:g} s. Start it first, and let it live as long as the run: lightning-decentral "
                f"rendezvous --port {port}. ({str(error).splitlines()[0][:200]})"
            ) from error

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def enter(
        self,
        identity: dict[str, str],
        epoch: int,
        prepare: Callable[[Members], Members | None],
        batches: Callable[[int], int] = lambda _: 0,
    ) -> tuple[bool, int | None]:
        """Found the run, or join it.

        Args:
            identity: what all workers must have in common.
            epoch: in which the run begins, if this worker founds it.
            prepare: called with the newest entry before this worker is entered into the log; takes over what the others
                have, and returns the entry of which that is; ``None``: this worker has not all that it needs.
            batches: tells how many an epoch has; 0: nobody deals any.

        Returns:
            Whether this worker has founded the run; and the batch with which it joins an epoch that goes on, or none.

        Raises:
            ConfigurationError: if the others are of another run, the run is over, or the rank takes part already.
        """
        where = f"the job {self.job!r} of the rendezvous at {self._address[0]}:{self._address[1]}"
        self._prepare = prepare
        if self.members.phase in ("gathering", "over"):
            self.jobs_before = self._look_at_other_jobs()
            where += f" (which also has {listed(self.jobs_before)})" * bool(self.jobs_before)
        me = Member(self.rank, self.life)
        entered: tuple[bool, int | None] = self._run(agreement.enter(me, _digested(identity), epoch, where, batches))
        self._joined = True
        return entered

    def living_jobs(self) -> tuple[Job, ...]:
        """List the other jobs of the rendezvous that have gone on since this worker entered its own.

        Raises:
            PeerLost: if the rendezvous has ended.
        """
        return still_living(self._look_at_other_jobs(), self.jobs_before)

    def _look_at_other_jobs(self) -> tuple[Job, ...]:
        whole = self._connect()
        try:
            if self.members.number < 0:
                enlist(whole, self.job)  # before it looks: of two that found jobs, one sees the other
            return other_jobs(whole, self.job)
        except dist.DistError as error:
            raise self._unanswered(error) from error

    def leave(self) -> None:
        """Leave the others, who go on at once; nothing happens if this worker does not take part."""
        if self._joined and not self._left and self.failure is None:
            self._leaves = True
            self._run(agreement.leave(self.life))
            self._left = True

    def close(self) -> None:
        """End the heartbeat."""
        self._stop.set()
        self.door.close()
        self._thread.join(timeout=10.0)

    @property
    def takes_part(self) -> bool:
        """Whether this worker is among the living, as far as it knows."""
        return self._joined and not self._left

    @property
    def meets(self) -> bool:
        """Whether all the living do something together now: between two epochs."""
        return self.takes_part and self.members.phase == "meeting"

    @property
    def averages(self) -> bool:
        """Whether all the living average now: at the end of a round, or between two epochs.

        At the end of a round also while this worker has not done so yet, and another one has written that it is over.
        """
        return self.takes_part and (self._ends_round or self.members.phase in ("averaging", "meeting"))

    @property
    def place(self) -> str:
        """A name for what all the living do together now, and for nothing else."""
        members = self.members
        return f"{members.epoch}/{members.phase}/{members.round}/{self.operation}"

    @property
    def leads(self) -> bool:
        """Whether this worker writes what is written once; one that takes part in nothing does so for itself."""
        return not self.takes_part or self.members.leads(self.life)

    # -- what all the living do together ------------------------------------------------------------------------------

    def advance(self, here: str, following: Callable[[Members], Members], reached: Callable[[Members], bool]) -> None:
        """Wait until all the living are at the same place, and write the entry that follows.

        Args:
            here: the place, named alike on all workers, and never again.
            following: makes the entry that follows.
            reached: whether an entry is that one, or comes after it.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        self._run(agreement.advance(self.life, here, following, reached))
        self.operation = 0

    def go_on(self, following: Callable[[Members], Members], reached: Callable[[Members], bool]) -> None:
        """Write the entry that follows what all the living have just agreed on; see `agreement.go_on`.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        self._run(agreement.go_on(self.life, following, reached))
        self.operation, self._ends_round = 0, False

    def end_round(self, began: float = 0.0, patience: Patience | None = None) -> bool:
        """Wait until all the living are at the end of this round; tell whether they average now, see `agreement`.

        Args:
            began: when this worker's round did, by ``time.monotonic``.
            patience: for how long all are waited for, if not for as long as they live.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        self._ends_round = self._run(agreement.end_round(self.life, began, patience))
        self.operation = 0
        return self._ends_round

    def is_hurried(self, store: dist.Store) -> bool:
        """Tell whether this worker is asked to end its round after the step that it is in; on a connection."""
        hurried: bool = self._run(agreement.is_hurried(self.members), store)
        return hurried

    def hurry(self) -> None:
        """Ask the others to end their round after the step that they are in."""
        self._run(agreement.hurry(self.members))

    def lost_of(self, needs: Iterable[int], known: dict[int, int], store: dist.Store) -> int | None:
        """Tell who is gone without whom the others do not go on; see `agreement.lost_of`. On a connection."""
        rank: int | None = self._run(agreement.lost_of(needs, known, self.members), store)
        return rank

    def close_rounds(self) -> None:
        """Let no more rounds end in this epoch, of which this worker has no more batches.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        self._run(agreement.close_rounds(self.life))

    def gather(self, what: str, value: bytes = b"") -> dict[Member, bytes]:
        """Return what each of the living has given; the same on all of them. All together, while nobody trains.

        Who dies before it has given anything is left out.

        Args:
            what: for messages.
            value: of this worker.

        Raises:
            ConfigurationError: if others do something else.
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        place = f"together/{self.place}"
        self.operation += 1
        given: dict[Member, bytes] = self._run(agreement.gather(self.life, place, what, value))
        return given

    def meet(self) -> tuple[Member, ...]:
        """Return who exchanges now, while all the living average: the same on all of them.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        place = f"together/{self.place}"
        self.operation += 1
        members: tuple[Member, ...] = self._run(agreement.meet(self.life, place))
        return members

    def all_made(self, members: tuple[Member, ...], made: bool) -> bool:
        """Tell whether an exchange came to its end on each of those that made it; see `agreement.all_made`.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        place = f"together/{self.place}"
        self.operation += 1
        all_made: bool = self._run(agreement.all_made(self.life, place, members, made))
        return all_made

    def claim(
        self, batches: int, count: int = 1, epoch: int | None = None, store: dist.Store | None = None
    ) -> list[int]:
        """Claim some batches of an epoch, of so many; none: nothing is left. See `agreement.claim`; on a connection."""
        steps = agreement.claim(self.life, batches, uuid.uuid4().hex, count, epoch)
        claimed: list[int] = self._run(steps, store)
        return claimed

    def all_claimed(self, batches: int) -> bool:
        """Tell whether of so many batches of this epoch all have been claimed.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        claimed: bool = self._run(agreement.all_claimed(self.life, batches))
        return claimed

    def gives_back(self, batches: int) -> bool:
        """Tell whether others can take the batches with which this worker leaves at once; see `agreement.gives_back`.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        given: bool = self._run(agreement.gives_back(self.life, batches))
        return given

    def wait_in_training(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the heartbeat's thread brings.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        while not condition():
            self.check()
            self.between_steps()
            time.sleep(_POLL_SECONDS)

    # -- the log ------------------------------------------------------------------------------------------------------

    def _look(self, store: dist.Store) -> Members:
        """Return the newest entry."""
        members = self.members
        if members.number < 0 and store.check(["head"]):
            members = Members.from_json(store.get(f"log/{int(store.get('head'))}"))
        while store.check([f"log/{members.number + 1}"]):
            members = Members.from_json(store.get(f"log/{members.number + 1}"))
        if members.number > self.members.number:
            self.members = members
        return self.members

    def _propose(self, members: Members, store: dist.Store) -> bool:
        """Write the next entry, unless somebody else does so first; tell whether this one was written."""
        text = members.to_json()
        written = bytes(store.compare_set(f"log/{members.number}", "", text))
        won = written == text.encode()
        if won:
            store.set("head", str(members.number))
            self._entries.append(members.number)
        if members.number > self.members.number:
            self.members = members if won else Members.from_json(written)
        return won

    def check(self) -> None:
        """Raise why this worker cannot go on, if it cannot."""
        if self.failure is not None:
            raise self.failure

    def _left_out(self) -> PeerLost:
        return PeerLost(
            f"Worker {self.rank} on {self.host} was silent for more than {self.heartbeat_seconds:g} s (stopped, or "
            "cut off), and the others go on without it. Start it again: it joins them.",
            (self.rank,),
        )

    def _unanswered(self, error: Exception) -> PeerLost:
        return PeerLost(
            f"The rendezvous at {self._address[0]}:{self._address[1]} does not answer worker {self.rank} on "
            f"{self.host} any more. Without it nobody knows who takes part: start it again, and the run from its "
            f"last checkpoint. ({type(error).__name__}: {str(error)[:200].partition(chr(10))[0]})"
        )

    # -- operations ---------------------------------------------------------------------------------------------------

    def _run(self, coroutine: agreement.Agreeing, store: dist.Store | None = None) -> Any:
        """Answer what a coroutine asks for, on the training thread's connection or another one."""
        answer: Any = None
        while True:
            try:
                operation = coroutine.send(answer)
            except StopIteration as finished:
                return finished.value
            except PeerLost as error:
                raise self._left_out() from error
            try:
                answer = self._do(operation, store or self.store, store is None)
            except dist.DistError as error:
                raise self._unanswered(error) from error

    def _do(self, operation: Any, store: dist.Store, waits: bool) -> Any:
        match operation:
            case agreement.Look():
                return self._look(store)
            case agreement.Known():
                return self.members
            case agreement.Propose(members):
                return self._propose(members, store)
            case agreement.Set(key, value):
                self._note(key)
                store.set(key, value)
            case agreement.SetFirst(key, value):
                self._note(key)
                return bytes(store.compare_set(key, "", value.decode()))
            case agreement.Check(keys):
                return store.check(list(keys))
            case agreement.Get(keys):
                try:
                    return store.multi_get(list(keys))
                except RuntimeError:  # they are gone: the others went on long ago
                    self.check()
                    raise
            case agreement.Count(key, by):
                return store.add(key, by)
            case agreement.Now():
                return time.monotonic()
            case agreement.Prepare(members):
                return self._prepare(members)
            case agreement.Pause(seconds):
                self.check()
                if waits:
                    self.between_steps()
                time.sleep(seconds)
        return None

    def _note(self, key: str) -> None:
        if key.startswith(_OF_ONE_ROUND):
            self._written.append((self.members.epoch, self.members.round, key))

    def _clear_up(self, store: dist.Store) -> None:
        """Delete what this worker has written and nobody needs any more: or the store would grow with each round."""
        members = self.members
        while self._written and self._written[0][:2] < (members.epoch, members.round - 1):
            store.delete_key(self._written.popleft()[2])
        while self._entries and self._entries[0] < members.number - _KEPT_ENTRIES:
            store.delete_key(f"log/{self._entries.popleft()}")

    def _catch_up(self, store: dist.Store) -> None:
        """Go on at the newest entry, if those before it may have been deleted."""
        newest = int(store.get("head")) if self.members.number >= 0 else -1
        if newest > self.members.number + _KEPT_ENTRIES // 2:
            self.members = Members.from_json(store.get(f"log/{newest}"))

    # -- the heartbeat ------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        pause = self.heartbeat_seconds / _BEATS_PER_HEARTBEAT
        looked = time.monotonic()
        try:
            while not self._stop.wait(pause):
                now = time.monotonic()
                if now - looked > 3 * pause:  # this process stood still itself
                    self._hearts.forget(now)
                looked = now
                self._catch_up(self._beats)
                joined = self._joined  # before the look, which does not show a worker that joins during it
                members = self._run(agreement.beat(self.life, self._hearts, now), self._beats)
                self._clear_up(self._beats)
                if joined and not self._leaves and self.life not in members.lives:
                    raise self._left_out()
                self.listener(self._beats)
        except PeerLost as error:
            self.failure = error
        except Exception as error:
            self.failure = self._unanswered(error)


def _digested(identity: dict[str, str]) -> str:
    """Return what all must have in common as text, with the job's token as a digest."""
    token = hashlib.sha256(os.environ.get(TOKEN, "").encode()).hexdigest()
    return json.dumps({**identity, f"token (the variable {TOKEN})": token}, sort_keys=True)
