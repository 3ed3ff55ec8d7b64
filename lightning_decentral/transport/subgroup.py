"""Some workers of a run, as a run of their own: an algorithm knows them by their places, and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from lightning_decentral.flat import Vector
from lightning_decentral.protocol import NeighborAverage, NeighborExchange, Receive, Send
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.lanes import Pausing


@dataclass
class _Answer:
    """What was begun by the run's ranks, whose answer goes by places."""

    future: Any


class Subgroup:
    """A communicator of some workers, for methods that exchange, average and send; nobody is called.

    Whatever is not said here is the run's own: its lane, its memory, its counts.

    Args:
        communicator: of the run.
        ranks: of the workers, this one among them, in the order of their places.
    """

    def __init__(self, communicator: Communicator, ranks: Sequence[int]) -> None:
        self._whole = communicator
        self.ranks = tuple(ranks)
        self.rank, self.world_size = self.ranks.index(communicator.rank), len(self.ranks)
        self.places = {rank: place for place, rank in enumerate(self.ranks)}
        self.exchanges, self.collectives, self.mail = _Exchanges(self), _Collectives(self), _Mail(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    @property
    def whole(self) -> Communicator:
        """The communicator of the run."""
        return self._whole

    @property
    def as_communicator(self) -> Communicator:
        """The same, for who asks for a communicator."""
        return cast("Communicator", self)

    def wait(self, future: Any) -> Any:
        """Return the result of something submitted or started; see `Communicator.wait`."""
        if not isinstance(future, _Answer):
            return self._whole.wait(future)
        return self.by_places(self._whole.wait(future.future))

    def mean(self, value: Vector) -> Vector:
        """Take the mean of a vector over these workers, added in float32 at least. All of them together."""
        wide = Vector(buffer.to(torch.promote_types(buffer.dtype, torch.float32)) for buffer in value.buffers)
        reduced = self._whole.submit(lambda: self._whole.collectives.all_reduce(wide, self.ranks))
        return value.copy_(self._whole.wait(reduced))

    def by_ranks(self, places: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks of workers at some places."""
        return tuple(self.ranks[place] for place in places)

    def by_places(self, answer: Any) -> Any:
        """Return an answer that goes by ranks as one that goes by places."""
        return {self.places[rank]: value for rank, value in answer.items()} if isinstance(answer, dict) else answer


class _Exchanges:
    def __init__(self, group: Subgroup) -> None:
        self._group, self._exchanges = group, group.whole.exchanges

    def _translated(
        self, request: NeighborExchange, average: NeighborAverage | None
    ) -> tuple[NeighborExchange, NeighborAverage | None]:
        ranks = self._group.by_ranks
        exchange = NeighborExchange(request.value, ranks(request.send_to), ranks(request.receive_from))
        if average is None:
            return exchange, None
        weights = dict(zip(ranks(tuple(average.weights)), average.weights.values(), strict=True))
        return exchange, NeighborAverage(average.value, ranks(average.send_to), average.own_weight, weights)

    def begin(
        self, request: NeighborExchange, index: int, average: NeighborAverage | None = None, number: int = 0
    ) -> _Answer:
        exchange, average = self._translated(request, average)
        return _Answer(self._exchanges.begin(exchange, index, average, number))

    def work(
        self, request: NeighborExchange, index: int, average: NeighborAverage | None = None, number: int = 0
    ) -> Pausing[Any]:
        exchange, average = self._translated(request, average)
        answer = yield from self._exchanges.work(exchange, index, average, number)
        return self._group.by_places(answer)

    def release(self, index: int) -> None:
        self._exchanges.release(index)


class _Collectives:
    def __init__(self, group: Subgroup) -> None:
        self._group = group

    def all_reduce(self, value: Vector, among: Sequence[int] | None = None, weight: float = 1.0) -> Vector:
        group = self._group
        members = group.ranks if among is None else group.by_ranks(among)
        return group.whole.collectives.all_reduce(value, members, weight)


class _Mail:
    def __init__(self, group: Subgroup) -> None:
        self._group, self._mail = group, group.whole.mail

    def send(self, request: Send) -> None:
        self._mail.send(dataclasses.replace(request, to=self._group.ranks[request.to]))

    def receive(self, request: Receive, check: Callable[[Receive, Vector], None]) -> Vector:
        ranks = self._group.ranks
        asked = {(ranks[each.source], each.tag): each for each in (request, *request.before)}

        def of_whole(one: Receive) -> Receive:
            return dataclasses.replace(one, source=ranks[one.source], before=tuple(map(of_whole, one.before)))

        return self._mail.receive(of_whole(request), lambda one, message: check(asked[one.source, one.tag], message))
