"""Servers of workers that come and go; the server stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_decentral.algorithms.around_server import AbstractAroundServer
from lightning_decentral.algorithms.compressed_calls import SERVER
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import Call, Gradient, LocalStep, Mixing, Until
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class OpenServer(AbstractAroundServer):
    """A server that takes gradients of workers that come and go, by the decisions of an `AbstractServer`.

    The method decides which gradients count, how much, when they are applied, and who waits for what; it counts who is
    there in ``given``, and never waits for one that is not. A gradient travels with the version of the model at which
    it was taken, and an answer with that of the model that it brings; who joins has both from the worker of which its
    copy is. So the server knows how stale a gradient is whoever was lost meanwhile.

    Where those that are left were waiting for a lost one, one of them makes the update that is due. Once one of them
    has no more batches in an epoch, nobody waits in it any more.
    """

    updates_in_answers = True

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, 1)  # there is one model

    def messages(self, worker: Worker) -> Mapping[str, AbstractVector]:
        return {"a gradient or a model, with a version": worker.x.beside(worker.x.new_numbers(0.0))}

    def init(self, worker: Worker) -> None:
        self.begin_books(worker)
        worker.state.update(version=0)
        if worker.rank == SERVER:
            worker.state.update(heard=0, busy=0)  # how many updates are being made
            self.method.regroup(worker)

    def notice(self, worker: Worker) -> None:
        state = worker.state
        if worker.rank == SERVER and state["given"].keys() != set(self.ranks):
            state["given"] = {rank: state["given"].get(rank, state["version"]) for rank in self.ranks}
            self.method.regroup(worker)

    def handed_over(self, worker: Worker) -> dict[str, Any]:
        return {"version": worker.state["version"]}

    def join(self, worker: Worker, given: Mapping[str, Any]) -> None:
        worker.state.update(given)

    async def step(self, worker: Worker) -> None:
        state = worker.state
        if worker.rank == SERVER:
            if worker.version != worker.snapshot_version:  # updated since the copy was made
                worker.snapshot.copy_(worker.x)
            state["given"][SERVER] = state["version"]
            await Gradient()
            direction = self._taken(worker, SERVER, worker.gradient, state["given"][SERVER])
            if direction is not None:
                # Gradients of others may come before the optimizer is there, and begin the next sum.
                await self._update(worker, worker.gradient.copy_(direction))
            await self._may_go_on(worker, SERVER)
            return
        await Gradient()
        state["unanswered"] += 1
        if self.peers(worker.rank):
            await Call(SERVER, worker.gradient.beside(worker.x.new_numbers(float(state["version"]))), then=_learn)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        state = worker.state
        gradient, version = self.taken_apart(worker, theirs)
        direction = self._taken(worker, source, gradient, version)
        if direction is not None:
            await self._update(worker, direction)
        del theirs, gradient, direction  # their memory is another gradient's, while this answer waits
        await self._may_go_on(worker, source)
        return worker.x.beside(worker.x.new_numbers(float(state["version"])))

    async def _may_go_on(self, worker: Worker, source: int) -> None:
        """Wait until a worker is answered; make what is due meanwhile, because others are lost."""
        state, decides = worker.state, self.decides

        def is_due() -> bool:
            return bool(decides.is_due(state)) and not state["busy"]

        while not decides.answers(state, source):
            if not await Until(lambda: decides.answers(state, source) or is_due()):
                return
            if is_due():
                await self._update(worker, decides.due(worker))

    async def _update(self, worker: Worker, direction: AbstractVector) -> None:
        """Let the optimizer apply a direction."""
        state = worker.state
        state["busy"] += 1
        await LocalStep(gradient=direction)
        state.update(busy=state["busy"] - 1, version=state["version"] + 1)

    def taken_apart(self, worker: Worker, message: AbstractVector) -> tuple[AbstractVector, int]:
        """Return the gradient or the model of a message, and its version."""
        vector, version = message.apart(worker.x, worker.x.new_numbers(0.0))
        return vector, int(version.numbers()[0])

    def mass(self, worker: Worker) -> AbstractVector:
        return worker.x.clone()

    def weight_of(self, worker: Worker, source: int, version: int) -> float | None:
        """Tell what a gradient at a version of the model would count at the server now; ``None``: it is dropped."""
        weight: float | None = self.decides.weight(worker.state, source, self.staleness_of(worker, version))
        return weight

    def staleness_of(self, worker: Worker, version: int) -> int:
        """Tell how many updates the server has made since a version, with those that are being made."""
        now: int = worker.state["version"] + worker.state["busy"]
        return now - version

    def _taken(self, worker: Worker, source: int, gradient: AbstractVector, version: int) -> AbstractVector | None:
        """Count a gradient; return what is applied now, if it is time."""
        weight, staleness = self.weight_of(worker, source, version), self.staleness_of(worker, version)
        worker.state["given"][source] = version
        self.count(worker, source, staleness, weight is not None)
        if weight is None:
            return None
        direction: AbstractVector | None = self.decides.direction(worker, source, gradient, weight)
        return direction


def _learn(worker: Worker, answer: AbstractVector) -> None:
    """Take the server's model."""
    model, version = answer.apart(worker.x, worker.x.new_numbers(0.0))
    worker.x.copy_(model)
    worker.state.update(version=int(version.numbers()[0]), unanswered=worker.state["unanswered"] - 1)
