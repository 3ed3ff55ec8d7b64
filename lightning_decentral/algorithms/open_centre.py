"""Asynchronous local updates around a server, of workers that come and go; the server stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_decentral.algorithms.around_server import AbstractAroundServer
from lightning_decentral.algorithms.compressed_calls import SERVER
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AllReduce, Call, Gradient, LocalStep, Mixing
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class OpenCentre(AbstractAroundServer):
    """Workers make rounds of local steps around a server, as an `AbstractBufferedUpdates` says.

    Whoever brings a round is answered at once: who is lost is not missed. One whose call breaks begins a round with the
    model that it has, and one that joins with the model that it was given.

    In ``worker.state`` are besides ``anchor``, and at the server ``centre`` and what the method keeps.
    """

    def period(self, world_size: int) -> int:
        every: int = self.method.steps_between
        return every

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, self.method.steps_between)  # each takes the one model

    def messages(self, worker: Worker) -> Mapping[str, AbstractVector]:
        forms: Mapping[str, AbstractVector] = self.method.messages(worker)
        return forms

    def init(self, worker: Worker) -> None:
        state, due = worker.state, self.method.steps_between
        state.update(steps=0, due=due, anchor=worker.x.clone(), shown=worker.x.clone())
        self.begin_books(worker)
        if worker.rank == SERVER:
            state.update(made=dict.fromkeys(state["given"], 0), dues={})
            self.method.init_centre(worker)

    def notice(self, worker: Worker) -> None:
        if worker.rank == SERVER:
            for name in ("given", "made", "dues"):  # who comes back begins anew
                worker.state[name] = {rank: each for rank, each in worker.state[name].items() if rank in self.ranks}

    async def step(self, worker: Worker) -> None:
        state = worker.state
        self.method.go_on(worker)
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

    async def depart(self, worker: Worker, neighbors: Sequence[int]) -> None:
        """Send the local steps of the round that has begun, as a round."""
        state = worker.state
        if worker.rank != SERVER and state["steps"] and SERVER in neighbors:
            state["unanswered"] += 1
            await Call(SERVER, state["anchor"].mul_(-1.0).add_(worker.x), then=self._learn)
            state["anchor"].copy_(worker.x)
            state["steps"] = 0

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        due = self._received(worker, source, theirs)
        answer: AbstractVector = self.method.answer_of(worker, due)
        return answer

    def weight_of(self, worker: Worker, source: int) -> float:
        """Tell what a round of a worker would count at the server if it came now."""
        weight: float = self.decides.weight(self.staleness_of(worker, source))
        return weight

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
        """Return a copy of what counts: of the server what it keeps, with what waits to be added."""
        if worker.rank != SERVER:
            return worker.x.clone()
        kept: AbstractVector = worker.state["centre"].clone()
        return kept.add_(worker.state["buffered"]) if "buffered" in worker.state else kept

    def _received(self, worker: Worker, source: int, difference: AbstractVector) -> int:
        """Take a round of a worker; return how many local steps it makes next."""
        state, staleness = worker.state, self.staleness_of(worker, source)
        self.count(worker, source, staleness)
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
