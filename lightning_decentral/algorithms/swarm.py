"""SwarmSGD: asynchronous gossip with local steps and quantized messages (Nadiradze et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from lightning_decentral.algorithms.adpsgd import complete_or_sparse
from lightning_decentral.algorithms.base import AbstractGossip
from lightning_decentral.algorithms.local_updates import Rounds
from lightning_decentral.algorithms.pairwise import pairwise_mixing
from lightning_decentral.averaging import LatticePairs
from lightning_decentral.averaging.pairs import Opened, largest
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import (
    AbstractAsynchronousAlgorithm,
    Call,
    Gradient,
    LocalStep,
    Mixing,
    Start,
    Until,
)
from lightning_decentral.topology import AbstractTopology, Among, TopologyLike
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class Swarm(AbstractGossip, AbstractAsynchronousAlgorithm):
    r"""SwarmSGD: some local steps, then the average with one random neighbour, in 8 bits; nobody waits for anybody.

    Worker ``i`` has its model ``x_i``, with which it computes, and a *shared copy* ``c_i``, which others see. With
    ``b_i`` what both were when its local steps began, a round ends with a meeting with neighbour ``j``, whatever that
    is doing::

        c_i, c_j <- (c_i + c_j) / 2         # while the last of the local steps is computed
        c_i      <- c_i + (x_i - b_i)       # the local steps, which the average did not have
        x_i, b_i <- c_i

    The neighbour's local steps go on from where they began; it finds the average in ``c_j`` at the end of its own
    round. The sum of all ``c_i + (x_i - b_i)`` changes by the workers' updates only. In the *blocking* form a call is
    answered when the called worker has ended its round too, so that both average with all their local steps.

    With ``levels`` the two send digits of lattice points, as `LatticePairs` says: both move by the same whole number of
    steps, and the sum stays. How far apart they will be is expected from what was seen at the last meeting and from
    one's own last local steps. A vector farther away is noticed, and sent again in full precision; ``repaired`` in
    ``worker.state`` counts how often.

    Args:
        topology: who may meet whom; a partner is drawn uniformly from ``topology.peers(rank)``. As for `ADPSGD`.
        every: ``H``, local steps of a round, at least 1; the paper uses 1 to 5.
        geometric: whether the number of local steps is drawn for each round, geometrically with the mean ``every``.
        blocking: whether both of a meeting have to have ended their round.
        levels: 256, 16 or 4: 8, 4 or 2 bits per element. ``None``: full precision.
        margin: a lattice reaches so many times as far as two workers are expected to be apart. Rounding errors are
            proportional to it; full-precision repairs become rarer.

    Raises:
        ConfigurationError: for numbers out of range.

    Cost:
        One message each way in ``every`` steps, of one byte per parameter (``levels=256``), and the same again for each
        call that is answered. Memory: three copies of the model (the snapshot, ``c`` and ``b``), and the messages. A
        lost partner raises `PeerLost`, but with `OpenStrategy`, where the others go on, on the graph of those that are
        there: a meeting with a lost worker comes to nothing, and whoever joins begins with a shared copy that is its
        model. The blocking form is not for `OpenStrategy`.

    Differences with the paper:
        The step of the lattice follows the distance of the workers and is not a constant. Its shift is random, but it
        is not rotated. A meeting's messages travel while the last local step is computed.

    References:
        Giorgi Nadiradze, Amirmojtaba Sabour, Peter Davies, Shigang Li, Dan Alistarh. Asynchronous Decentralized SGD
        with Quantized and Local Updates. NeurIPS 2021, arXiv:1910.12308.

    Example:
        >>> Swarm().resolved(4)
        Swarm(topology=Complete(size=4), every=4, geometric=False, blocking=False, levels=256, margin=4.0)
    """

    tolerates_loss = True

    topology: TopologyLike = complete_or_sparse
    every: int = 4
    geometric: bool = False
    blocking: bool = False
    levels: int | None = 256
    margin: float = 4.0

    def check(self, graph: AbstractTopology | None) -> None:
        Rounds(self.every).check("Swarm")
        _ = self.pairs  # which checks the levels and the margin
        if self.blocking and isinstance(graph, Among):
            raise ConfigurationError(
                "Swarm got blocking=True for workers that come and go, but an answer that waits for the end of a round "
                "keeps whoever has called from leaving and from coming to the end of an epoch. Leave it out."
            )

    @cached_property
    def pairs(self) -> LatticePairs | None:
        """How two workers average in few bits; none in full precision."""
        return None if self.levels is None else LatticePairs(self.levels, self.margin)

    def peers(self, rank: int) -> tuple[int, ...]:
        return self.graph.peers(rank) if self.graph.initiates(rank) else ()

    def messages(self, worker: Worker) -> Mapping[str, AbstractVector]:
        return {} if self.pairs is None else self.pairs.messages(worker.x)

    def for_buffers(self) -> None:
        """Return nothing: its averages are of shared copies, in a few steps only."""
        return

    def period(self, world_size: int) -> int:
        return self.every

    def mixing(self, world_size: int) -> Mixing:
        mixing = pairwise_mixing([self.peers(rank) for rank in range(world_size)])
        gap = 1.0 - (1.0 - mixing.spectral_gap) ** (1.0 / self.every)
        return Mixing(gap, mixing.rounds_to_consensus * self.every)

    def init(self, worker: Worker) -> None:
        worker.state.update(shared=worker.x.clone(), began=worker.x.clone(), ready=False)
        worker.state.update(steps=0, due=self._drawn(worker), apart=0.0, moved=0.0, repaired=0)

    def mass(self, worker: Worker) -> AbstractVector:
        return worker.x.clone().add_difference_(worker.state["shared"], worker.state["began"], 1.0)

    async def step(self, worker: Worker) -> None:
        state = worker.state
        state["steps"] += 1
        ends = state["steps"] >= state["due"]
        meeting = await Start(self._meet(worker, self.peers(worker.rank))) if ends and not self.blocking else None
        await Gradient()
        await LocalStep()
        if not ends:
            return
        if meeting is not None:
            await meeting
        else:
            self._publish(worker)
            state["ready"] = True
            await self._meet(worker, self.peers(worker.rank))
            state["ready"] = False
        self._publish(worker)
        state.update(steps=0, due=self._drawn(worker))

    async def rest(self, worker: Worker) -> None:
        self._publish(worker)

    async def depart(self, worker: Worker, neighbors: Sequence[int]) -> None:
        """Meet a neighbour with the local steps of the round that has begun."""
        self._publish(worker)
        await self._meet(worker, sorted(neighbors))
        self._publish(worker)

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        state = worker.state
        if self.blocking:
            await Until(lambda: state["ready"])  # or this worker has come to its end, and will not be
        shared: AbstractVector = state["shared"]
        if theirs.form == worker.x.form:
            shared.approach_(theirs)
            self._expect(state, theirs)
            return theirs  # c_i - c_j: one end moves by half of it, the other one by minus that
        assert self.pairs is not None
        reply, apart = self.pairs.answer_(worker, shared, theirs)
        self._expect(state, apart)
        return reply

    async def _meet(self, worker: Worker, peers: Sequence[int]) -> None:
        """Average the shared copy with that of a random one of some neighbours."""
        state = worker.state
        if not peers:
            return
        peer, shared = worker.rng.choice(peers), state["shared"]
        if self.pairs is not None:
            opened = self.pairs.opened(worker, shared, state["apart"] + state["moved"])
            state["refused"] = False
            await Call(peer, opened.vector, then=partial(self._close, opened))
            if not state.pop("refused"):
                return
            state["repaired"] += 1
        await Call(peer, shared.clone(), then=self._approach)

    def _close(self, opened: Opened, worker: Worker, reply: AbstractVector) -> None:
        """Move half way to who has answered in few bits, unless it has refused."""
        assert self.pairs is not None
        apart = self.pairs.close_(worker.state["shared"], opened, reply)
        self._expect(worker.state, apart)
        worker.state["refused"] = apart is None

    def _approach(self, worker: Worker, difference: AbstractVector) -> None:
        """Move half way to who has answered in full precision."""
        worker.state["shared"].add_(difference, alpha=-0.5)
        self._expect(worker.state, difference)

    def _publish(self, worker: Worker) -> None:
        """Let the shared copy have what the local steps have made, and the model what the meetings have."""
        state = worker.state
        worker.x.add_difference_(state["shared"], state["began"], 1.0)
        if self.pairs is not None:
            state["moved"] = largest(state["shared"].add_(worker.x, alpha=-1.0))
        state["shared"].copy_(worker.x)
        state["began"].copy_(worker.x)

    def _expect(self, state: dict[str, Any], apart: AbstractVector | float | None) -> None:
        """Expect at the next meeting what was seen at this one, but at least half of what was expected.

        Args:
            state: of the worker.
            apart: by how much two shared copies differed; none if it could not be told.
        """
        if self.pairs is not None and apart is not None:
            seen = apart if isinstance(apart, float) else largest(apart)
            state["apart"] = max(seen, state["apart"] / 2)

    def _drawn(self, worker: Worker) -> int:
        """Draw how many local steps the next round has."""
        if not self.geometric or self.every == 1:
            return self.every
        return 1 + int(math.log(1.0 - worker.rng.random()) / math.log(1.0 - 1.0 / self.every))

    def report(self, worker: Worker) -> Mapping[str, Any]:
        """Tell how many meetings had to be repeated in full precision, and how far apart the last two were."""
        return {name: worker.state[name] for name in ("repaired", "apart")}
