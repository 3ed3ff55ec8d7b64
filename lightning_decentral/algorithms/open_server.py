"""A-PSGD whose workers come and go; the server stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from lightning_decentral.algorithms.server import SERVER, summed
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Call, Gradient, LocalStep, Mixing
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class OpenServer(AbstractAsynchronousAlgorithm):
    """A-PSGD of which every worker but the server, which is worker 0, may be lost, and come back.

    The server applies what comes, and owes nobody an answer: who is lost is not missed. A worker whose call breaks does
    not know whether its gradient was applied. It does not send it again, so nothing is applied twice; it counts the
    call, and goes on with the model that it has.

    In ``worker.state`` of the server are ``version``, ``accepted`` and ``staleness`` as of `AbstractServer`; of the
    others ``unanswered``: calls that came to nothing.

    Args:
        gradients: ``M`` of `APSGD`.
        ranks: of those that are there.
    """

    updates_in_answers = True
    tolerates_loss = True
    needs = (SERVER,)

    gradients: int
    ranks: tuple[int, ...] = ()

    def resolved(self, world_size: int) -> Self:
        return self.among(range(world_size), world_size)

    def among(self, ranks: Sequence[int], size: int) -> Self:
        """Return the algorithm for those that are there."""
        return type(self)(self.gradients, tuple(ranks))

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return (SERVER,)

    def peers(self, rank: int) -> tuple[int, ...]:
        return (SERVER,) if rank != SERVER and SERVER in self.ranks else ()

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, 1)  # there is one model

    def init(self, worker: Worker) -> None:
        if worker.rank == SERVER:
            worker.state.update(version=0, given={}, heard=0, accepted={}, staleness={})
        else:
            worker.state.update(unanswered=0)

    async def step(self, worker: Worker) -> None:
        state = worker.state
        if worker.rank == SERVER:
            state["given"][SERVER] = state["version"]
            await Gradient()
            direction = self._taken(worker, SERVER, worker.gradient)
            if direction is not None:
                # Gradients of others may come before the optimizer is there, and begin the next sum.
                await LocalStep(gradient=direction if self.gradients == 1 else direction.clone())
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

    def _taken(self, worker: Worker, source: int, gradient: AbstractVector) -> AbstractVector | None:
        """Count a gradient; return what is applied now, if it is time."""
        state = worker.state
        staleness = state["version"] - state["given"].get(source, state["version"])  # who joins has a fresh copy
        state["accepted"][source] = state["accepted"].get(source, 0) + 1
        state["staleness"][staleness] = state["staleness"].get(staleness, 0) + 1
        return summed(worker, gradient, 1.0, self.gradients)

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Tell how many gradients of whom the server has used, how stale, and its version; or what came to nothing."""
        state = worker.state
        if worker.rank != SERVER:
            return {"unanswered": state["unanswered"]}
        told = {name: state[name] for name in ("version", "accepted", "staleness")}
        return {**told, "dropped": dict.fromkeys(state["accepted"], 0)}


def _learn(worker: Worker, answer: AbstractVector) -> None:
    """Take the server's model."""
    worker.x.copy_(answer)
    worker.state["unanswered"] -= 1
