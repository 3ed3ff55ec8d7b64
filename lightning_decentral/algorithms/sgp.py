"""Stochastic gradient push (Assran, Loizou, Ballas, Rabbat, 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import AbstractGossip
from lightning_decentral.averaging import neighbor_average
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import Gradient, LocalStep, NeighborExchange, Start
from lightning_decentral.topology import AbstractTopology, TopologyLike, one_peer_or_complete
from lightning_decentral.topology.validation import Stochastic
from lightning_decentral.worker import Worker

_COLUMN: Stochastic = "column"


@dataclass(frozen=True, repr=False)
class SGP(AbstractGossip):
    r"""Stochastic gradient push: gossip on any directed graph; a weight travels with each model and corrects it.

    Update rule. A worker has the mass ``m_i = w_i x_i``, with a weight ``w_i`` of 1 in the beginning; the gradient is
    taken at ``x_i``, the de-biased model, and what the optimizer makes of it is added to the mass::

        m_i      <- w_i x_i - learning_rate * gradient_i(x_i)
        m_i, w_i <- sum_j P[i, j] m_j, sum_j P[i, j] w_j
        x_i      <- m_i / w_i

    ``P`` is column stochastic: a worker splits its mass among those it sends to, who need not send anything back. The
    sum of all masses moves by the sum of all updates, and the weights sum up to the number of workers.

    With ``overlap=T``, the paper's tau-overlap SGP, what is sent in a step arrives T steps later, and is hidden behind
    these; a worker sends in every T-th step, and goes on with the share that it has kept. The weight comes late with
    its mass, so that neither is biased.

    Any optimizer may make the update, of ``x``; its state stays local. On a doubly stochastic graph without overlap all
    weights are 1, none is sent, and the method is D-PSGD that adapts and then combines.

    Args:
        topology: any graph that is strongly connected over its period, as `DirectedGraph` or
            `DirectedRounds`, or one
            that is doubly stochastic; or a function of the number of workers. By default `OnePeerExponential`, the
            paper's, for 3 and more workers; `Complete` below.
        overlap: the paper's tau, in steps; 0: messages are waited for in the step that sends them.

    Raises:
        ConfigurationError: for an overlap below 0.

    Cost:
        One model to each out-neighbour per step, and a number of 8 bytes where it is needed; with overlap in every T-th
        step, hidden. Extra memory: a receive buffer per in-neighbour; where weights are not 1 a copy of the model
        during the update; with overlap a copy of what is sent. A lost peer raises `PeerLost`.

    References:
        Mahmoud Assran, Nicolas Loizou, Nicolas Ballas, Mike Rabbat. Stochastic Gradient Push for Distributed Deep
        Learning. ICML 2019, arXiv:1811.10792.

    Example:
        >>> from lightning_decentral.topology import DirectedGraph
        >>> SGP(DirectedGraph([[1, 2], [2], [0]])).resolved(3).graph.stochastic
        'column'
    """

    stochastic = _COLUMN

    topology: TopologyLike = one_peer_or_complete
    overlap: int = field(default=0, repr=False)

    def check(self, graph: AbstractTopology | None) -> None:
        if not (isinstance(self.overlap, int) and self.overlap >= 0):
            raise ConfigurationError(
                f"SGP got overlap={self.overlap!r}, needs a number of steps, or 0. Use 1 to hide messages "
                "behind one step."
            )

    def period(self, world_size: int) -> int:
        return max(self.overlap, 1) * super().period(world_size)

    def init(self, worker: Worker) -> None:
        worker.state["weight"] = worker.x.new_numbers(1.0)

    async def step(self, worker: Worker) -> None:
        x, weight = worker.x, worker.state["weight"]
        (was,) = weight.numbers()
        await Gradient()
        before = None if was == 1.0 else x.clone()
        await LocalStep()
        if before is not None:
            x.add_(before, alpha=was - 1.0)  # the mass, moved by the update
            del before
        if self.overlap:
            if worker.step % self.overlap == 0:
                await self._push(worker)
        elif self.graph.stochastic == "doubly":
            await neighbor_average(worker, self.graph, x)
        else:
            both = x.beside(weight)
            await neighbor_average(worker, self.graph, both)
            if not self.graph.in_neighbors(worker.rank, worker.step):  # an average of nothing leaves all where it was
                both.mul_(self.graph.weights(worker.rank, worker.step)[worker.rank])
        (now,) = weight.numbers()
        if now != 1.0:
            x.mul_(1.0 / now)

    async def rest(self, worker: Worker) -> None:
        """Let what is under way arrive; it counts when it is due."""
        state = worker.state
        if "ticket" in state:
            received, weights = await state.pop("ticket"), self.graph.weights(worker.rank, state["round"])
            late = worker.x.zeros_like().beside(worker.x.new_numbers(0.0))
            for source, theirs in received.items():
                late.add_(theirs, alpha=weights[source])
            state["late"] = late

    async def _push(self, worker: Worker) -> None:
        """Send the mass, keep a share of it, and take in what was sent at the last time."""
        rank, state, number = worker.rank, worker.state, worker.step // self.overlap
        both = worker.x.beside(state["weight"])
        to, source = self.graph.out_neighbors(rank, number), self.graph.in_neighbors(rank, number)
        ticket = await Start(NeighborExchange(both.clone(), to, source))
        both.mul_(self.graph.weights(rank, number).get(rank, 0.0))
        await self.rest(worker)
        if "late" in state:
            both.add_(state.pop("late"))
        state.update(ticket=ticket, round=number)
        if not math.isfinite(state["weight"].numbers()[0]) or state["weight"].numbers()[0] <= 0.0:
            raise ConfigurationError(
                f"SGP got {self.graph!r}, of which worker {rank} keeps nothing of its mass in round {number}; with "
                "overlap it needs a share to go on with. Use a graph whose workers send to themselves, too."
            )
