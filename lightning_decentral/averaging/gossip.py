"""Gossip: the weighted average with the neighbours in a graph."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.averaging.base import AbstractAverager
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import NeighborAverage, NeighborExchange
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker


def neighbor_exchange(worker: Worker, topology: AbstractTopology, value: AbstractVector) -> NeighborExchange:
    """Send ``value`` to this step's out-neighbours and receive from its in-neighbours."""
    rank, step = worker.rank, worker.step
    return NeighborExchange(value, topology.out_neighbors(rank, step), topology.in_neighbors(rank, step))


def neighbor_average(
    worker: Worker, topology: AbstractTopology, value: AbstractVector, step: int | None = None
) -> NeighborAverage:
    """Return ``value <- sum_j W[i, j] value_j`` over this step's in-neighbours j and the worker i itself.

    Args:
        worker: i.
        topology: W.
        value: value_i.
        step: of which the graph is, if that is another number than the worker's steps.
    """
    rank, step = worker.rank, worker.step if step is None else step
    weights = topology.weights(rank, step)
    received = {source: weights[source] for source in topology.in_neighbors(rank, step)}
    return NeighborAverage(value, topology.out_neighbors(rank, step), weights.get(rank, 0.0), received)


@dataclass(frozen=True)
class Gossip(AbstractAverager):
    r"""Average with the neighbours, who get the value as it is: ``x_i <- sum_j W[i, j] x_j``.

    Cost:
        One value to each out-neighbour. Nothing is remembered. One receive buffer per in-neighbour, or one for all
        workers of the same host.
    """

    @property
    def share(self) -> float:
        """The share of the way that one average goes: 1, the whole."""
        return 1.0

    @property
    def lag(self) -> float:
        """The lag: 0."""
        return 0.0

    def check(self, graph: AbstractTopology) -> None:
        pass

    def init(self, worker: Worker, value: AbstractVector, adds_up: bool = False) -> None:
        pass

    def average(self, worker: Worker, graph: AbstractTopology, value: AbstractVector) -> NeighborAverage:
        return neighbor_average(worker, graph, value)

    def combine_(self, worker: Worker, value: AbstractVector, heard: None) -> None:
        pass  # a `NeighborAverage` has replaced the value

    async def exchange(
        self, worker: Worker, graph: AbstractTopology, value: AbstractVector
    ) -> list[tuple[AbstractVector, float]]:
        received = await neighbor_exchange(worker, graph, value)
        weights = graph.weights(worker.rank, worker.step)
        return [(theirs, weights[source]) for source, theirs in received.items()]

    def pull_(
        self,
        worker: Worker,
        value: AbstractVector,
        heard: list[tuple[AbstractVector, float]],
        total: AbstractVector,
        rest: AbstractVector,
    ) -> None:
        value.pull_(heard, total, rest)
