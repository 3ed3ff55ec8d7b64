"""What the living workers do together in a run whose workers come and go: the same as `collectives`, of who is there.

Small values go through the store. A mean of models is an all-reduce on a process group of exactly those that have
agreed to make it, and holds if all of them say so afterwards. So does an exchange with neighbours.

Two that live may not reach each other for a while. So before connections are made, all try whom they reach; and where
not all reach each other, a mean is made around one whom all reach, and which sends the sum to all.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.flat import Vector
from lightning_decentral.membership import Member
from lightning_decentral.protocol import NeighborAverage, NeighborExchange
from lightning_decentral.traffic import all_reduce_bytes
from lightning_decentral.transport.collectives import Collectives
from lightning_decentral.transport.connections import AbstractConnections
from lightning_decentral.transport.doors import unreached
from lightning_decentral.transport.edges import break_connection, gloo_options
from lightning_decentral.transport.exchanges import Exchanges
from lightning_decentral.transport.lanes import Pausing, beside, finished
from lightning_decentral.transport.membership import Membership
from lightning_decentral.transport.poison import is_finite
from lightning_decentral.transport.reductions import sum_among

_LOOK_SECONDS = 0.1
_CONNECT_SECONDS, _CONNECT_EACH_SECONDS = 5.0, 0.5  # and for each worker; a heartbeat, if that is longer
_REACH_SECONDS, _AGAIN_SECONDS = 3.0, 0.5  # to be reached; for one that was not reached the last time
_AGAIN, _ENOUGH = b"again", b"enough"  # what a worker says of a mean that came to no end
_GREETING = 2  # the tag of what shows that a connection works


class NotMade(RuntimeError):
    """An exchange has not come to its end on one of those that made it: all of them know, and nothing has changed.

    Attributes:
        here: whether it failed on this worker.
        members: who made it.
    """

    def __init__(self, here: bool, members: tuple[Member, ...]) -> None:
        super().__init__("An exchange has to be made again, by those that are left.")
        self.here, self.members = here, members


class LivingCollectives(Collectives):
    """What the living do together, in the same order. A worker that does not take part yet, or any more, is alone.

    Args:
        connections: of this worker.
        membership: knows who takes part.
    """

    def __init__(self, connections: AbstractConnections, membership: Membership) -> None:
        super().__init__(connections)
        self._membership = membership
        self._group: tuple[tuple[Member, ...], dist.ProcessGroupGloo] | None = None
        self._met: tuple[Member, ...] = ()  # who makes the exchanges that follow
        self._unreached: frozenset[int] = frozenset()  # the lives of those that were not reached the last time
        self._doors: dict[int, str] = {}  # of lives

    def meet_for_exchanges(self, again: bool) -> tuple[int, ...]:
        """Agree on who makes the exchanges that follow; return their ranks. All of the living, while they average."""
        self._met = self._membership.meet() if again else self._membership.members.met
        return tuple(member.rank for member in self._met)

    def exchange(self, value: Vector, targets: Sequence[int], received: dict[int, Vector]) -> None:
        """Send a vector to some of those that have met, and receive theirs.

        Args:
            value: of this worker.
            targets: who gets it.
            received: of each source, where its vector goes.

        Raises:
            NotMade: on all of them, if it came to no end on one of them.
        """
        members, failure = self._met, None
        try:
            self._send_and_receive(members, value, targets, received)
        except RuntimeError as error:
            failure = error
        if not self._membership.all_made(members, failure is None):
            self._group = None
            raise NotMade(failure is not None, members) from failure
        self._links.count(value.num_bytes * len(targets), len(targets), exchanges=1)

    def _send_and_receive(
        self, members: tuple[Member, ...], value: Vector, targets: Sequence[int], received: dict[int, Vector]
    ) -> None:
        if self._parted(members):
            raise RuntimeError("Not all workers reach each other.")
        group = self._group_of(members)
        if group is None:
            return
        places = {member.rank: place for place, member in enumerate(members)}
        outgoing = [buffer.detach().cpu().view(torch.uint8) for buffer in value.buffers]
        incoming = {source: [buffer.cpu() for buffer in vector.buffers] for source, vector in received.items()}

        def work() -> None:
            works = [
                group.recv([buffer.view(torch.uint8)], places[source], 0)
                for source, buffers in incoming.items()
                for buffer in buffers
            ]
            works += [group.send([buffer], places[target], 0) for target in targets for buffer in outgoing]
            for each in works:
                each.wait(self._links.timeout)

        self._watched(members, (group,), work)
        for source, buffers in incoming.items():
            for buffer, came in zip(received[source].buffers, buffers, strict=True):
                if came is not buffer:
                    buffer.copy_(came)

    def all_reduce(self, value: Vector, among: Sequence[int] | None = None, weight: float = 1.0) -> Vector:
        """Replace ``value`` by its weighted mean over the living, who average now; by itself for one that is alone.

        Where all weights are 0, all count alike.

        Raises:
            ConfigurationError: within a step, where nobody waits for the others; or if it is among some of them.
        """
        membership = self._membership
        if among is not None or (membership.takes_part and not membership.averages):
            where = "in a step" if among is None else f"among {tuple(among)}"
            raise ConfigurationError(
                f"OpenStrategy got `AllReduce` {where}, for which all workers wait; it needs an algorithm that "
                "averages in pairs, or at the end of a round. Use ADPSGD or DiLoCo, or AsyncStrategy."
            )
        members = self._mean("the average of a round", value, weight)
        num_bytes = sum(buffer.numel() * _wide(buffer.dtype).itemsize for buffer in value.buffers)
        self._links.count(all_reduce_bytes(num_bytes, members), 1, exchanges=1)
        return value

    def gather(self, value: bytes) -> list[bytes]:
        return self._gather("a gathering of values", value)

    def _gather(self, what: str, value: bytes) -> list[bytes]:
        if not self._membership.meets:
            return [value]
        return list(self._membership.gather(what, value).values())

    def meet(self, what: str, *numbers: int) -> list[list[int]]:
        rows = self._gather(what, b"".join(number.to_bytes(8, "big", signed=True) for number in numbers))
        return [
            [int.from_bytes(row[place : place + 8], "big", signed=True) for place in range(0, len(row), 8)]
            for row in rows
        ]

    def take_from(self, source: int, tensors: Sequence[Tensor]) -> None:
        """Replace contiguous tensors by those of the first of the living, for worker 0 may be gone. All together."""
        assert source == 0
        if not tensors or not self._membership.meets:
            return
        own = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        sent = b"".join(each.numpy().tobytes() for each in own) if self._membership.leads else b""
        first = next(given for given in self._gather("the first one's values", sent) if given)
        begin = 0
        for tensor, each in zip(tensors, own, strict=True):
            part = bytearray(first[begin : begin + each.numel()])
            begin += each.numel()
            tensor.copy_(torch.frombuffer(part, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape))

    def consensus_(self, value: Vector, keepers: Sequence[int] | None = None) -> Vector:
        inspector = self._links.inspector
        counts = inspector is None or not inspector.refuses or is_finite(value)
        counts = counts and (keepers is None or self._membership.rank in keepers)
        self._mean("a mean of models", value, float(counts))
        return value

    def _mean(self, what: str, value: Vector, weight: float) -> int:
        """Replace a vector by its weighted mean over the living, or the plain one where all weights are 0; tell how
        many they are."""
        membership = self._membership
        if not membership.averages:
            return 1
        own = Vector([buffer.clone() for buffer in value.buffers])
        deadline = math.inf
        while True:
            given = membership.gather(what, struct.pack(">d", weight))
            members = tuple(given)
            total = sum(struct.unpack(">d", each)[0] for each in given.values())
            share = weight / total if total else 1.0 / len(members)
            failure = self._reduce(members, value, own, share)
            word = b"" if failure is None else _AGAIN if time.monotonic() < deadline else _ENOUGH
            said = membership.gather("the end of a mean", word).values()
            if not any(said):
                return len(members)
            self._group = None  # all make the next one anew
            deadline = min(deadline, time.monotonic() + self._links.timeout_seconds)
            if _ENOUGH in said:  # for one, and so for all
                raise never_averages(membership.rank, members, self._links.timeout_seconds) from failure

    def _parted(self, members: tuple[Member, ...]) -> set[frozenset[int]]:
        """Return which two of the members, by their lives, do not reach each other: all of these together. Nobody asks
        while there are connections.

        Raises:
            RuntimeError: if a member is lost meanwhile.
        """
        if len(members) == 1 or (self._group is not None and self._group[0] == members):
            return set()
        membership = self._membership
        others = [member.life for member in members if member.life != membership.life]
        for life in others:
            if life not in self._doors:
                self._doors[life] = membership.door_of(life)
        seconds = {life: _AGAIN_SECONDS if life in self._unreached else _REACH_SECONDS for life in others}
        self._unreached = frozenset(unreached({life: self._doors[life] for life in others}, seconds))
        said = membership.gather("who reaches whom", " ".join(map(str, self._unreached)).encode())
        membership.door.clear()
        if tuple(said) != members:
            raise RuntimeError("A worker was lost before all were connected.")
        return {frozenset((member.life, int(life))) for member, words in said.items() for life in words.split()}

    def _reduce(self, members: tuple[Member, ...], value: Vector, own: Vector, share: float) -> RuntimeError | None:
        """Replace ``value`` by a weighted sum of what the members have; return why that came to no end, if it did."""
        try:
            parted = self._parted(members)
            if parted:
                hub = _reached_by_all(members, parted)
                groups = self._pairs_with(members, hub)
                add = partial(self._sum_around, place=self._place_among(members), hub=hub, groups=groups)
            else:
                group = self._group_of(members, greeted=True)
                groups = {} if group is None else dict.fromkeys(range(len(members)), group)
                add = partial(self._sum_among, group)
            for buffer, kept in zip(value.buffers, own.buffers, strict=True):
                total = kept.cpu().to(_wide(kept.dtype), copy=True)
                total = total.mul_(share) if share else total.zero_()
                if groups:
                    self._watched(members, tuple(dict.fromkeys(groups.values())), partial(add, total))
                buffer.copy_(total)
        except RuntimeError as error:
            return error
        return None

    def _sum_among(self, group: dist.ProcessGroupGloo | None, total: Tensor) -> None:
        assert group is not None
        sum_among(total, group.rank(), tuple(range(group.size())), (group, group), self._links.timeout)

    def _sum_around(self, total: Tensor, place: int, hub: int, groups: dict[int, dist.ProcessGroupGloo]) -> None:
        """Replace equal tensors by their sum: one adds what comes from each, and sends each the sum."""
        timeout, raw = self._links.timeout, total.view(torch.uint8)
        if place != hub:
            groups[hub].send([raw], 0, 0).wait(timeout)
            groups[hub].recv([raw], 0, 1).wait(timeout)
            return
        came = torch.empty_like(total)
        for group in groups.values():
            group.recv([came.view(torch.uint8)], 1, 0).wait(timeout)
            total.add_(came)
        for work in [group.send([raw], 1, 1) for group in groups.values()]:
            work.wait(timeout)

    def _pairs_with(self, members: tuple[Member, ...], hub: int) -> dict[int, dist.ProcessGroupGloo]:
        """Connect one of the members with each other one; return this worker's connections, by the other's place.

        Raises:
            RuntimeError: if that comes to no end.
        """
        membership, place = self._membership, self._place_among(members)
        options = gloo_options(self._connecting_for(members), kept=True)

        def connected(other: int) -> dist.ProcessGroupGloo:
            store = membership.connect(f"pair/{membership.place}/{other if place == hub else place}")
            pair: dist.ProcessGroupGloo = self._connected(
                members, partial(dist.ProcessGroupGloo, store, int(place != hub), 2, options)
            )
            return pair

        wanted = [hub] if place != hub else [other for other in range(len(members)) if other != hub]
        with ThreadPoolExecutor(len(wanted), "decentral-pairs") as threads:
            asked = {other: threads.submit(connected, other) for other in wanted}
        failures = [error for future in asked.values() if (error := future.exception()) is not None]
        if failures:
            for future in asked.values():
                if future.exception() is None:
                    _break(future.result())  # or these would wait for the sum
            raise failures[0]
        return {other: future.result() for other, future in asked.items()}

    def _place_among(self, members: tuple[Member, ...]) -> int:
        return [member.life for member in members].index(self._membership.life)

    def _connecting_for(self, members: tuple[Member, ...]) -> timedelta:
        """Tell how long workers that reach each other may take to connect."""
        seconds = max(_CONNECT_SECONDS, self._membership.heartbeat_seconds) + _CONNECT_EACH_SECONDS * len(members)
        return timedelta(seconds=min(seconds, self._links.timeout_seconds))

    def _group_of(self, members: tuple[Member, ...], greeted: bool = False) -> dist.ProcessGroupGloo | None:
        """Return a group of the members, this worker being one of them; none of one alone.

        Args:
            members: who are in it.
            greeted: whether all of them show before that its connections work; of a new one they always do.

        Raises:
            RuntimeError: if one does not.
        """
        if len(members) == 1:
            return None
        if self._group is None or self._group[0] != members:
            self._group, greeted = None, True  # one that is connected itself waits for others that are not
            membership, place = self._membership, self._place_among(members)
            # Each attempt has a name of its own: all the members have just agreed on one operation.
            name = f"group/{membership.place}"
            store = membership.connect(name)
            options = gloo_options(self._connecting_for(members), kept=True)
            connect = partial(dist.ProcessGroupGloo, store, place, len(members), options)
            group: dist.ProcessGroupGloo = self._connected(members, connect)
        else:
            group = self._group[1]
        if greeted:
            self._watched(members, (group,), partial(self._greet, members, group))
        self._group = members, group
        return group

    def _greet(self, members: tuple[Member, ...], group: dist.ProcessGroupGloo) -> None:
        """Send each other something small, in the time in which connections are made."""
        others = [place for place in range(len(members)) if place != group.rank()]
        works = [group.recv([torch.zeros(1, dtype=torch.uint8)], place, _GREETING) for place in others]
        works += [group.send([torch.zeros(1, dtype=torch.uint8)], place, _GREETING) for place in others]
        deadline = time.monotonic() + self._connecting_for(members).total_seconds()
        for work in works:
            work.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))

    def _connected(self, members: tuple[Member, ...], connect: Callable[[], Any]) -> Any:
        """Return what connects the members; raises soon when one of them is lost, for whom it would wait, and when that
        takes too long: gloo tries for several times as long as it is told."""
        seconds = self._connecting_for(members).total_seconds()
        deadline = time.monotonic() + seconds

        def look() -> None:
            if self._is_broken(members):
                raise RuntimeError("A worker was lost while all were connecting.")
            if time.monotonic() > deadline:
                raise RuntimeError(f"Not all were connected within {seconds:g} s.")

        return beside(connect, "decentral-connecting", _LOOK_SECONDS, look)

    def _is_broken(self, members: tuple[Member, ...]) -> bool:
        """Tell whether one of the members is lost, or this worker cannot go on."""
        lives = {member.life for member in members}
        return not lives <= self._membership.members.lives or self._membership.failure is not None

    def _watched(
        self, members: tuple[Member, ...], groups: Sequence[dist.ProcessGroupGloo], work: Callable[[], Any]
    ) -> None:
        """Do something on some groups; break their connections when a member is lost, on which others would wait."""

        def look() -> None:
            if self._is_broken(members):
                raise RuntimeError("A worker was lost while all did something together.")

        try:
            beside(work, "decentral-mean", _LOOK_SECONDS, look)  # for gloo may not wake who waits for a broken one
        except BaseException:
            for group in groups:
                _break(group)  # nothing may come later, into memory that has become another's
            raise


class LivingExchanges(Exchanges):
    """Exchanges with neighbours among the living: made by all of them, or by nobody.

    Args:
        connections: of this worker.
        collectives: of the living.
    """

    def __init__(self, connections: AbstractConnections, collectives: LivingCollectives) -> None:
        super().__init__(connections)
        self._collectives = collectives

    def begin(
        self, request: NeighborExchange, index: int, average: NeighborAverage | None = None, number: int = 0
    ) -> Future[dict[int, Vector] | Vector]:
        return self._links.submit(partial(finished, self.work(request, index, average, number)))

    def work(
        self, request: NeighborExchange, index: int, average: NeighborAverage | None = None, number: int = 0
    ) -> Pausing[dict[int, Vector] | Vector]:
        yield None
        value = request.value
        assert isinstance(value, Vector)
        received = {source: self._links.leases.new(value) for source in request.receive_from}
        self._collectives.exchange(value, request.send_to, received)
        self.inspect(received, value, index)
        return received


def _reached_by_all(members: tuple[Member, ...], parted: set[frozenset[int]]) -> int:
    """Return the place of one whom all reach.

    Raises:
        RuntimeError: if there is none.
    """
    for place, member in enumerate(members):
        if not any(member.life in two for two in parted):
            return place
    raise RuntimeError("There is no worker whom all others reach.")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Tell in which precision a mean is made."""
    return torch.promote_types(dtype, torch.float32)


def _break(group: dist.ProcessGroupGloo) -> None:
    """Close all connections of a group."""
    for place in range(group.size()):
        if place != group.rank():
            break_connection(group, place)


def never_averages(rank: int, members: Sequence[Member], seconds: float) -> PeerLost:
    """Make the error of a worker that has tried to average with others for too long, though all of them live.

    Args:
        rank: of the worker.
        members: it and the others.
        seconds: for which it has tried.
    """
    others = tuple(member.rank for member in members if member.rank != rank)
    return PeerLost(
        f"Worker {rank} could not average with workers {list(others)} for {seconds:g} s, though they live. A "
        "connection between them does not work, or is too slow: raise exchange_timeout_seconds, or start this worker "
        "elsewhere.",
        others,
    )
