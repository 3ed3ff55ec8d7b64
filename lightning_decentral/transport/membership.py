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
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.membership import Hearts, Member, Members

_CONNECT_SECONDS = 30.0
_BEATS_PER_HEARTBEAT = 4
_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.001, 0.02
JOB, TOKEN = "LIGHTNING_DECENTRAL_JOB", "LIGHTNING_DECENTRAL_TOKEN"
"""Environment variables: the name of the job, if a rendezvous has several; what a worker must know to take part."""


class Membership:
    """A worker among those that take part.

    Args:
        host: of the rendezvous.
        port: of it.
        rank: this worker.
        heartbeat_seconds: a worker is lost when its heart has stood still for one and a half of these.

    Attributes:
        rank: this worker.
        life: the number of this start of it.
        members: the newest entry of the log that this worker knows.
        store: a connection for the training thread.
        operation: how many things all the living have done together in this meeting.
        failure: why this worker cannot go on, if it cannot.
        on_change: called with each new entry, on the thread of the heartbeat.
        listener: called at each heartbeat with the store, on that thread.
        between_steps: called while the training thread waits for others.

    Raises:
        PeerLost: if the rendezvous cannot be reached.
    """

    def __init__(self, host: str, port: int, rank: int, heartbeat_seconds: float) -> None:
        self.rank, self.host = rank, socket.gethostname()
        self._address = host, port
        self._job = os.environ.get(JOB, "job")
        self._heartbeat_seconds = heartbeat_seconds
        self._hearts = Hearts(heartbeat_seconds)
        self.failure: Exception | None = None
        self.members = Members()
        self.on_change: Callable[[Members], None] = lambda _: None
        self.listener: Callable[[dist.Store], None] = lambda _: None
        self.between_steps: Callable[[], None] = lambda: None
        self.store = self.connect()
        self._beats = self.connect()
        self.life = int(self.store.add("lives", 1))
        self._joined = self._left = False
        self.operation = 0  # of those that all the living do together, in this meeting
        self._stop = threading.Event()
        self._look(self.store)
        self._thread = threading.Thread(target=self._run, name=f"decentral-membership-{rank}", daemon=True)
        self._thread.start()

    def connect(self, place: str = "") -> dist.Store:
        """Return a connection of its own to the store.

        Args:
            place: under which all names are that are used through it.

        Raises:
            PeerLost: if there is none.
        """
        host, port = self._address
        limit = timedelta(seconds=_CONNECT_SECONDS)
        try:
            store = dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
        except RuntimeError as error:
            raise PeerLost(
                f"Worker {self.rank} on {self.host} found no rendezvous at {host}:{port} within "
                f"{_CONNECT_SECONDS:g} s. Start it first, and let it live as long as the run: lightning-decentral "
                f"rendezvous --port {port}. ({str(error).splitlines()[0][:200]})"
            ) from error
        return dist.PrefixStore(f"lightning_decentral/{self._job}/{place}", store)

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def enter(self, identity: dict[str, str], epoch: int, prepare: Callable[[Members], bool]) -> bool:
        """Found the run, or join it.

        Args:
            identity: what all workers must have in common.
            epoch: in which the run begins, if this worker founds it.
            prepare: called with the newest entry before this worker is entered into the log; takes over what the others
                have, and tells whether it still is a worker's that may join.

        Returns:
            Whether this worker has founded the run.

        Raises:
            ConfigurationError: if the others are of another run, the run is over, or the rank takes part already.
        """
        me = Member(self.rank, self.life)
        began, told = time.monotonic(), False
        own = _digested(identity)
        while True:
            self._check()
            members = self._look(self.store)
            if members.number < 0:
                if self._propose(Members.founded(me, own, epoch), self.store):
                    self._joined = True
                    return True
                continue
            if members.phase == "over":
                raise ConfigurationError(
                    f"Worker {self.rank} got a rendezvous at {self._address[0]}:{self._address[1]} whose job "
                    f"{self._job!r} is over; it needs one that goes on, or a new one. Start another rendezvous, or set "
                    f"{JOB} to another name on all workers."
                )
            _require_same(self.rank, own, members.identity)
            other = members.life_of(self.rank)
            if other is not None:
                if not told and time.monotonic() - began > 3 * self._heartbeat_seconds:
                    raise ConfigurationError(
                        f"Worker {self.rank} on {self.host} got a rank that takes part already, on "
                        f"{self._host_of(other)}; it needs a free one. Start it with another NODE_RANK, or end the "
                        "other one."
                    )
                time.sleep(_LONGEST_POLL_SECONDS)
                continue
            if members.phase == "meeting":
                time.sleep(_LONGEST_POLL_SECONDS)
                began = time.monotonic()
                continue
            if prepare(members):
                before, members = members, self._look(self.store)
                same = (members.phase, members.epoch) == (before.phase, before.epoch)
                if same and members.life_of(self.rank) is None:
                    self._hearts.forget(time.monotonic())
                    if self._propose(members.joined(me), self.store):
                        self._joined = True
                        return False

    def leave(self) -> None:
        """Leave the others, who go on at once; nothing happens if this worker does not take part."""
        while self._joined and not self._left and self.failure is None:
            members = self._look(self.store)
            if self.life not in members.lives or self._propose(members.without([self.life]), self.store):
                self._left = True

    def close(self) -> None:
        """End the heartbeat."""
        self._stop.set()
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
        self.store.set(f"{here}/{self.life}", "")
        poll = _Poll()
        while True:
            members = self._look(self.store)
            if reached(members):
                self.operation = 0
                return
            if self.store.check([f"{here}/{life}" for life in sorted(members.lives)]):
                self._propose(following(members), self.store)
            else:
                self._check()
                self.between_steps()
                poll.sleep()

    def gather(self, what: str, value: bytes = b"") -> dict[Member, bytes]:
        """Return what each of the living has given; the same on all of them. All together, between two epochs.

        Who dies before it has given anything is left out.

        Args:
            what: for messages.
            value: of this worker.

        Raises:
            ConfigurationError: if others do something else.
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        members = self.members
        place = f"together/{members.epoch}/{members.phase == 'gathering'}/{self.operation}"
        self.operation += 1
        name = what.encode()
        self.store.set(f"{place}/{self.life}", len(name).to_bytes(2, "big") + name + value)
        poll = _Poll()
        while not self.store.check([f"{place}/decided"]):
            living = self._look(self.store).living
            if self.store.check([f"{place}/{member.life}" for member in living]):
                text = json.dumps([[member.rank, member.life] for member in living])
                self.store.compare_set(f"{place}/decided", "", text)
                break
            self._check()
            poll.sleep()
        decided = [Member(rank, life) for rank, life in json.loads(self.store.get(f"{place}/decided"))]
        if all(member.life != self.life for member in decided):
            raise self._left_out()
        given: dict[Member, bytes] = {}
        names: dict[str, list[int]] = {}
        for member, raw in zip(
            decided, self.store.multi_get([f"{place}/{member.life}" for member in decided]), strict=True
        ):
            length = int.from_bytes(raw[:2], "big")
            given[member] = bytes(raw[2 + length :])
            names.setdefault(bytes(raw[2 : 2 + length]).decode(), []).append(member.rank)
        if len(names) > 1:
            where = "; ".join(f"workers {ranks} at {name}" for name, ranks in names.items())
            raise ConfigurationError(
                f"The workers do not do the same: {where}. What all workers do together, they must do equally often "
                "and in the same order. Look for a checkpoint or a collective on some workers only."
            )
        return given

    def wait_in_training(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the heartbeat's thread brings.

        Raises:
            PeerLost: if this worker was left out, or the rendezvous has ended.
        """
        poll = _Poll()
        while not condition():
            self._check()
            self.between_steps()
            poll.sleep()

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
        won = bytes(store.compare_set(f"log/{members.number}", "", text)) == text.encode()
        if won:
            store.set("head", str(members.number))
        self._look(store)
        return won

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def check(self) -> None:
        """Raise why this worker cannot go on, if it cannot."""
        self._check()

    def _host_of(self, life: int) -> str:
        key = f"host/{life}"
        return self.store.get(key).decode() if self.store.check([key]) else "a host that has not said its name"

    def _left_out(self) -> PeerLost:
        return PeerLost(
            f"Worker {self.rank} on {self.host} was silent for more than {self._heartbeat_seconds:g} s (stopped, or "
            "cut off), and the others go on without it. Start it again: it joins them.",
            (self.rank,),
        )

    # -- the heartbeat ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = self._heartbeat_seconds / _BEATS_PER_HEARTBEAT
        looked, known = time.monotonic(), self.members.number
        try:
            self._beats.set(f"host/{self.life}", f"{self.host} (process {os.getpid()})")
            while not self._stop.wait(pause):
                self._beats.add(f"beat/{self.life}", 1)
                now = time.monotonic()
                if now - looked > 3 * pause:  # this process stood still itself
                    self._hearts.forget(now)
                looked = now
                members = self._look(self._beats)
                self._watch_over(members, now)
                if self._joined and not self._left and self.life not in self.members.lives:
                    raise self._left_out()
                if self.members.number != known:
                    known = self.members.number
                    self.on_change(self.members)
                self.listener(self._beats)
        except PeerLost as error:
            self.failure = error
        except Exception as error:
            self.failure = PeerLost(
                f"The rendezvous at {self._address[0]}:{self._address[1]} does not answer worker {self.rank} on "
                f"{self.host} any more. Without it nobody knows who takes part: start it again, and the run from its "
                f"last checkpoint. ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
            )

    def _watch_over(self, members: Members, now: float) -> None:
        """Enter into the log who is lost."""
        others = sorted(members.lives - {self.life})
        for life in others:
            self._hearts.hear(life, int(self._beats.add(f"beat/{life}", 0)), now)
        silent = self._hearts.silent(others, now)
        if silent:
            self._propose(members.without(silent), self._beats)


class _Poll:
    """Waits longer each time."""

    def __init__(self) -> None:
        self._seconds = _SHORTEST_POLL_SECONDS

    def sleep(self) -> None:
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, _LONGEST_POLL_SECONDS)


def _digested(identity: dict[str, str]) -> str:
    """Return what all must have in common as text, with the job's token as a digest."""
    token = hashlib.sha256(os.environ.get(TOKEN, "").encode()).hexdigest()
    return json.dumps({**identity, f"token (the variable {TOKEN})": token}, sort_keys=True)


def _require_same(rank: int, own: str, others: str) -> None:
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
