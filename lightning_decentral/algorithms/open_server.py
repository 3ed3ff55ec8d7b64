"""Servers that take what comes, of workers that come and go; the server stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from lightning_decentral.algorithms.compressed_calls import SERVER
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Call, Gradient, LocalStep, Mixing
from lightning_decentral.worker import Worker


class Decisions(Protocol):
    """What a method decides about a gradient that has come; see `AbstractServer`."""

    def resolved(self, world_size: int) -> Any:
        """Check the hyper-parameters for so many workers."""

    def for_trainers(self, trainers: int) -> Decisions:
        """Fill in what depends on how many workers train."""

    def weight(self, state: Mapping[str, Any], source: int, staleness: int) -> float | None:
        """Tell what a gradient counts; ``None``: it is dropped."""

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        """Take a gradient that counts; return what is applied now, if it is time."""


@dataclass(frozen=True)
class OpenServer(AbstractAsynchronousAlgorithm):
    """A server of which every worker but the server itself, which is worker 0, may be lost, and come back.

    The method decides which gradients count, how much, and when they are applied. All are answered at once: who is lost
    is not missed. A worker whose call breaks does not know whether its gradient was applied. It does not send it again,
    so nothing is applied twice; it counts the call, and goes on with the model that it has.

    What by default depends on the number of workers, as Rennala's ``gradients``, follows who is there.

    In ``worker.state`` of the server are ``version``, ``given``, ``accepted``, ``dropped`` and ``staleness`` as of
    `AbstractServer`; of the others ``unanswered``: calls that came to nothing.

    Args:
        method: that decides, with hyper-parameters as the user gave them.
        ranks: of those that are there.
        decides: the method with what depends on their number.
    """

    updates_in_answers = True
    tolerates_loss = True
    needs = (SERVER,)

    method: Decisions
    ranks: tuple[int, ...] = field(default=(), repr=False)
    decides: Decisions | None = field(default=None, repr=False)

    def resolved(self, world_size: int) -> Self:
        self.method.resolved(world_size)
        return self.among(range(world_size), world_size)

    def among(self, ranks: Sequence[int], size: int) -> Self:
        """Return the algorithm for those that are there."""
        return type(self)(self.method, tuple(ranks), self.method.for_trainers(len(ranks)))

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return (SERVER,)

    def peers(self, rank: int) -> tuple[int, ...]:
        return (SERVER,) if rank != SERVER and SERVER in self.ranks else ()

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, 1)  # there is one model

    def init(self, worker: Worker) -> None:
        if worker.rank == SERVER:
            worker.state.update(version=0, given={}, heard=0, accepted={}, dropped={}, staleness={})
        else:
            worker.state.update(unanswered=0)

    async def step(self, worker: Worker) -> None:
        state = worker.state
        if worker.rank == SERVER:
            if worker.version != worker.snapshot_version:  # updated since the copy was made
                worker.snapshot.copy_(worker.x)
            state["given"] = {rank: version for rank, version in state["given"].items() if rank in self.ranks}
            state["given"][SERVER] = state["version"]
            await Gradient()
            direction = self._taken(worker, SERVER, worker.gradient)
            if direction is not None:
                # Gradients of others may come before the optimizer is there, and begin the next sum.
                await LocalStep(gradient=direction.clone() if "total" in state else direction)
                state["version"] += 1
            return
        await Gradient()
        state["unanswered"] += 1
        if self.peers(worker.rank):
            await Call(SERVER, worker.gradient, then=_learn)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        state = worker.state
        direction = self._taken(worker, source, theirs)
        if direction is not None:
            await LocalStep(gradient=direction)
            state["version"] += 1
        state["given"][source] = state["version"]
        return worker.x

    def mass(self, worker: Worker) -> AbstractVector:
        """Return a copy of the model, of which the server's is the one that counts."""
        return worker.x.clone()

    def weight_of(self, worker: Worker, source: int) -> float | None:
        """Tell what a gradient of a worker would count at the server if it came now; ``None``: it would be dropped."""
        assert self.decides is not None  # `among` has been called
        return self.decides.weight(worker.state, source, self._staleness(worker, source))

    def _staleness(self, worker: Worker, source: int) -> int:
        given: dict[int, int] = worker.state["given"]
        version: int = worker.state["version"]
        for rank in (*self.ranks, source):
            given.setdefault(rank, version)  # who joins has a fresh copy
        return version - given[source]

    def _taken(self, worker: Worker, source: int, gradient: AbstractVector) -> AbstractVector | None:
        """Count a gradient; return what is applied now, if it is time."""
        assert self.decides is not None
        state, weight, staleness = worker.state, self.weight_of(worker, source), self._staleness(worker, source)
        became = state["dropped" if weight is None else "accepted"]
        became[source] = became.get(source, 0) + 1
        state["staleness"][staleness] = state["staleness"].get(staleness, 0) + 1
        return None if weight is None else self.decides.direction(worker, source, gradient, weight)

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Tell of the server what that of `AbstractServer` tells; of another worker what came to nothing."""
        state = worker.state
        if worker.rank != SERVER:
            return {"unanswered": state["unanswered"]}
        told = {name: state[name] for name in ("version", "staleness")}
        whose = sorted({*state["accepted"], *state["dropped"]})
        return told | {name: {rank: state[name].get(rank, 0) for rank in whose} for name in ("accepted", "dropped")}


def _learn(worker: Worker, answer: AbstractVector) -> None:
    """Take the server's model."""
    worker.x.copy_(answer)
    worker.state["unanswered"] -= 1
