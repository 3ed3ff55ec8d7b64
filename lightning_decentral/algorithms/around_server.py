"""What methods around a server have in common whose workers come and go; the server stays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from lightning_decentral.algorithms.compressed_calls import SERVER
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class AbstractAroundServer(AbstractAsynchronousAlgorithm):
    """A method around a server of which every worker but the server itself, which is worker 0, may be lost.

    A worker whose call breaks does not know whether what it has sent counts. It does not send it again, so nothing
    counts twice; it notes the call, and goes on with the model that it has.

    What by default depends on the number of workers, as Rennala's ``gradients``, follows who is there.

    In ``worker.state`` of the server are ``version``, ``given``, by the ranks of those that are there, ``accepted``,
    ``dropped`` and ``staleness`` as of `AbstractServer`; of the others ``unanswered``: calls that came to nothing.

    Args:
        method: that decides, with hyper-parameters as the user gave them.
        ranks: of those that are there.
        decides: the method with what depends on their number.
    """

    tolerates_loss = True
    needs = (SERVER,)

    method: Any
    ranks: tuple[int, ...] = field(default=(), repr=False)
    decides: Any = field(default=None, repr=False)

    def resolved(self, world_size: int) -> Self:
        self.method.resolved(world_size)  # which checks the hyper-parameters
        return self.among(range(world_size), world_size)

    def among(self, ranks: Sequence[int], size: int) -> Self:
        """Return the algorithm for those that are there."""
        return type(self)(self.method, tuple(ranks), self.method.for_trainers(len(ranks)))

    @property
    def has_outer_gradient(self) -> bool:
        return bool(self.method.has_outer_gradient)

    def keepers(self, world_size: int) -> tuple[int, ...]:
        return (SERVER,)

    def peers(self, rank: int) -> tuple[int, ...]:
        return (SERVER,) if rank != SERVER and SERVER in self.ranks else ()

    def begin_books(self, worker: Worker) -> None:
        """Begin the books of a worker."""
        if worker.rank == SERVER:
            nothing: dict[str, dict[int, int]] = {"accepted": {}, "dropped": {}, "staleness": {}}
            worker.state.update(version=0, given=dict.fromkeys(self.ranks, 0), **nothing)
        else:
            worker.state.update(unanswered=0)

    @abstractmethod
    def mass(self, worker: Worker) -> AbstractVector:
        """Return a copy of what counts of a worker: of the server the model that it keeps for all."""

    def count(self, worker: Worker, source: int, staleness: int, used: bool = True) -> None:
        """Note in the server's books what has come, and whether it counts."""
        state = worker.state
        became = state["accepted" if used else "dropped"]
        became[source] = became.get(source, 0) + 1
        state["staleness"][staleness] = state["staleness"].get(staleness, 0) + 1

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Tell of the server what that of `AbstractServer` tells; of another worker what came to nothing."""
        state = worker.state
        if worker.rank != SERVER:
            return {"unanswered": state["unanswered"]}
        told = {name: state[name] for name in ("version", "staleness")}
        whose = sorted({*state["accepted"], *state["dropped"]})
        return told | {name: {rank: state[name].get(rank, 0) for rank in whose} for name in ("accepted", "dropped")}
