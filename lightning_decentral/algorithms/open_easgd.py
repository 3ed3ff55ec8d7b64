"""Asynchronous elastic averaging of workers that come and go; the server, and with it the centre, stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_decentral.algorithms.around_server import AbstractAroundServer
from lightning_decentral.algorithms.compressed_calls import SERVER
from lightning_decentral.algorithms.easgd import elastic_mixing
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import Call, Gradient, LocalStep, Mixing, Start
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class OpenEASGD(AbstractAroundServer):
    """Workers tied to a centre by springs, as an `AsyncEASGD` says; each but worker 0, which keeps it, may be lost.

    A lost worker's replica is lost with what it has learnt since its last exchanges; the centre stays where it was
    pulled. One that joins begins with a copy of another replica. The server answers with the step of both ends, ``alpha
    d``, of which ``alpha`` is ``moving_rate`` over the number of those that are there. An exchange conserves the sum of
    a replica and the centre, unless the call breaks: then the centre may have moved, and the replica has not.
    """

    def pull(self) -> float:
        """Return ``alpha``."""
        rate: float = self.method.moving_rate
        return rate / len(self.ranks)

    def period(self, world_size: int) -> int:
        return int(self.method.steps_between)

    def mixing(self, world_size: int) -> Mixing:
        return elastic_mixing(self.method.moving_rate / world_size, self.method.steps_between)

    def init(self, worker: Worker) -> None:
        worker.state.update(steps=0, shown=worker.x.clone())
        self.begin_books(worker)
        if worker.rank == SERVER:
            self.method.init_centre(worker)

    def notice(self, worker: Worker) -> None:
        if worker.rank == SERVER:  # who comes back begins anew
            given = worker.state["given"]
            worker.state["given"] = {rank: given[rank] for rank in self.ranks if rank in given}

    async def step(self, worker: Worker) -> None:
        state, exchanging = worker.state, None
        self.method.go_on(worker)
        if state["steps"] % self.method.steps_between == 0 and worker.rank == SERVER:
            worker.x.add_(self._pulled(worker, SERVER, worker.x.clone()), alpha=-1.0)
        elif state["steps"] % self.method.steps_between == 0:
            state["unanswered"] += 1
            if self.peers(worker.rank):
                exchanging = await Start(Call(SERVER, worker.snapshot, then=_move))
        state["steps"] += 1
        await Gradient()
        if exchanging is not None:
            await exchanging
        await LocalStep()

    async def depart(self, worker: Worker, neighbors: Sequence[int]) -> None:
        """Pull the centre once more."""
        if worker.rank != SERVER and SERVER in neighbors:
            worker.state["unanswered"] += 1
            await Call(SERVER, worker.x.clone(), then=_move)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        return self._pulled(worker, source, theirs)

    async def rest(self, worker: Worker) -> None:
        """Let the server show the centre."""
        await self.method.rest(worker)

    def mass(self, worker: Worker) -> AbstractVector:
        """Return a copy of what exchanges keep the sum of: of the server the centre with its own replica."""
        state = worker.state
        replica: AbstractVector = state.get("aside", worker.x)
        return replica.clone().add_(state["centre"]) if worker.rank == SERVER else replica.clone()

    def _pulled(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        """Let a worker pull the centre; return, in the place of its model, the step by which it moves to the centre."""
        state = worker.state
        step = theirs.add_(state["centre"], alpha=-1.0).mul_(self.pull())
        self.count(worker, source, state["version"] - state["given"].get(source, state["version"]))
        state["centre"].add_(step)
        state["version"] += 1
        state["given"][source] = state["version"]
        return step


def _move(worker: Worker, step: AbstractVector) -> None:
    """Go a step towards the centre."""
    worker.x.add_(step, alpha=-1.0)
    worker.state["unanswered"] -= 1
