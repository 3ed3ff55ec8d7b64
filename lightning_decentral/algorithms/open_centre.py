"""Asynchronous local updates around a server, of workers that come and go; the server stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from lightning_decentral.algorithms.compressed_calls import SERVER
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, AllReduce, Call, Gradient, LocalStep, Mixing
from lightning_decentral.worker import Worker


class LocalRounds(Protocol):
    """What a method decides about rounds of local steps; see `AbstractBufferedUpdates`."""

    @property
    def steps_between(self) -> int:
        """The local steps of a round, of a worker as fast as any."""

    @property
    def adapts(self) -> bool:
        """Whether slow workers make fewer local steps."""

    def resolved(self, world_size: int) -> Any:
        """Fill in what depends on how many workers there are; check the hyper-parameters."""

    def messages(self, worker: Worker) -> Mapping[str, AbstractVector]:
        """Return what answers are like."""

    def init_centre(self, worker: Worker) -> None:
        """Let a server have a model of its own."""

    def go_on(self, worker: Worker) -> None:
        """Begin a step after a rest."""

    def leave_rest(self, worker: Worker) -> bool:
        """Let a server's model be the one that it trains; tell whether it had rested."""

    def show_centre(self, worker: Worker) -> None:
        """Let a server show the model that it keeps."""

    def weight(self, staleness: int) -> float:
        """Tell what a difference of this staleness counts, in the sum of the server's model and what waits."""

    def receive(self, worker: Worker, difference: AbstractVector, staleness: int) -> None:
        """Let the server's model have what a worker has sent; count its versions."""

    def answer_of(self, worker: Worker, due: int) -> AbstractVector:
        """Return the server's model, with how many local steps follow where that is told."""

    def told(self, worker: Worker, answer: AbstractVector) -> tuple[AbstractVector, int]:
        """Return the model of an answer, and how many local steps follow."""


@dataclass(frozen=True)
class OpenCentre(AbstractAsynchronousAlgorithm):
    """Workers make rounds of local steps around a server; each but the server, which is worker 0, may be lost.

    Whoever brings a round is answered at once: who is lost is not missed. A worker whose call breaks does not know
    whether its round counts. It does not send it again, so nothing counts twice; it notes the call, and begins a round
    with the model that it has. One that joins begins a round with the model that it was given.

    What by default depends on the number of workers, as FedBuff's ``buffer``, follows who is there.

    In ``worker.state`` of the server are ``version``, ``given``, ``accepted``, ``dropped`` and ``staleness`` as of
    `AbstractServer`, ``centre`` and what the method keeps; of the others ``anchor``, and ``unanswered``: calls that
    came to nothing.

    Args:
        method: that decides, with hyper-parameters as the user gave them.
        ranks: of those that are there.
        decides: the method with what depends on their number.
    """

    tolerates_loss = True
    needs = (SERVER,)

    method: LocalRounds
    ranks: tuple[int, ...] = field(default=(), repr=False)
    decides: LocalRounds | None = field(default=None, repr=False)

    def resolved(self, world_size: int) -> Self:
        self.method.resolved(world_size)
        return self.among(range(world_size), world_size)

    def among(self, ranks: Sequence[int], size: int) -> Self:
        """Return the algorithm for those that are there."""
        return type(self)(self.method, tuple(ranks), self.method.resolved(len(ranks)))

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return (SERVER,)

    def peers(self, rank: int) -> tuple[int, ...]:
        return (SERVER,) if rank != SERVER and SERVER in self.ranks else ()

    def period(self, world_size: int) -> int:
        return self.method.steps_between

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, self.method.steps_between)  # each takes the one model

    def messages(self, worker: Worker) -> Mapping[str, AbstractVector]:
        return self.method.messages(worker)

    def init(self, worker: Worker) -> None:
        state, due = worker.state, self.method.steps_between
        state.update(steps=0, due=due, anchor=worker.x.clone(), shown=worker.x.clone())
        if worker.rank == SERVER:
            state.update(version=0, given={}, made={}, dues={}, accepted={}, dropped={}, staleness={})
            self.method.init_centre(worker)
        else:
            state.update(unanswered=0)

    async def step(self, worker: Worker) -> None:
        state = worker.state
        self.method.go_on(worker)
        if worker.rank == SERVER:
            for name in ("given", "made", "dues"):  # who comes back begins anew
                state[name] = {rank: value for rank, value in state[name].items() if rank in self.ranks}
        await Gradient()
        await LocalStep()
        state["steps"] += 1
        if state["steps"] < state["due"]:
            return
        state["steps"] = 0
        difference: AbstractVector = state["anchor"].mul_(-1.0).add_(worker.x)
        if worker.rank == SERVER:
            state["due"] = self._received(worker, SERVER, difference)
            worker.x.copy_(state["centre"])
        else:
            state["unanswered"] += 1
            if self.peers(worker.rank):
                await Call(SERVER, difference, then=self._learn)
        state["anchor"].copy_(worker.x)

    async def rest(self, worker: Worker) -> None:
        """Let the server show its model with what all that are there have made since their last calls, on average.

        Training goes on from its model alone.
        """
        state = worker.state
        self.method.leave_rest(worker)
        progress = worker.x.clone().add_(state["anchor"], alpha=-1.0)
        await AllReduce(progress)
        self.method.show_centre(worker)
        if worker.rank == SERVER:
            worker.x.add_(progress)
        state["shown"] = worker.x.clone()

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        due = self._received(worker, source, theirs)
        return self.method.answer_of(worker, due)

    def weight_of(self, worker: Worker, source: int) -> float:
        """Tell what a round of a worker would count at the server if it came now."""
        assert self.decides is not None  # `among` has been called
        return self.decides.weight(self.staleness_of(worker, source))

    def staleness_of(self, worker: Worker, source: int) -> int:
        """Tell how many updates the server has made since a worker was answered."""
        state = worker.state
        given: dict[int, int] = state["given"]
        version: int = state["version"]
        for rank in (*self.ranks, source):
            if rank not in given:  # who joins has a copy of now, and is taken for as fast as any
                given[rank], state["made"][rank] = version, max(state["made"].values(), default=0)
        return version - given[source]

    def mass(self, worker: Worker) -> AbstractVector:
        """Return a copy of the model: of the server what it keeps, with what waits to be added."""
        if worker.rank != SERVER:
            return worker.x.clone()
        kept: AbstractVector = worker.state["centre"].clone()
        return kept.add_(worker.state["buffered"]) if "buffered" in worker.state else kept

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Tell of the server what that of `AbstractServer` tells; of another worker what came to nothing."""
        state = worker.state
        if worker.rank != SERVER:
            return {"unanswered": state["unanswered"]}
        return {name: state[name] for name in ("version", "accepted", "dropped", "staleness")}

    def _received(self, worker: Worker, source: int, difference: AbstractVector) -> int:
        """Take a round of a worker; return how many local steps it makes next."""
        assert self.decides is not None  # `among` has been called
        state, staleness = worker.state, self.staleness_of(worker, source)
        state["accepted"][source] = state["accepted"].get(source, 0) + 1
        state["dropped"].setdefault(source, 0)
        state["staleness"][staleness] = state["staleness"].get(staleness, 0) + 1
        self.decides.receive(worker, difference, staleness)
        state["given"][source] = state["version"]
        made, usual = state["made"], self.method.steps_between
        made[source] += state["dues"].get(source, usual)
        if self.method.adapts:
            state["dues"][source] = max(1, usual * made[source] // max(made.values()))
        due: int = state["dues"].setdefault(source, usual)
        return due

    def _learn(self, worker: Worker, answer: AbstractVector) -> None:
        """Begin a round with the server's model."""
        model, worker.state["due"] = self.method.told(worker, answer)
        worker.x.copy_(model)
        worker.state["unanswered"] -= 1
