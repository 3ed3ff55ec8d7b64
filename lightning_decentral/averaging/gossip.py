"""Gossip: the weighted average with the neighbours in a graph."""

from __future__ import annotations

from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import NeighborAverage, NeighborExchange
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker


def neighbor_exchange(worker: Worker, topology: AbstractTopology, value: AbstractVector) -> NeighborExchange:
    """Send ``value`` to this step's out-neighbours and receive from its in-neighbours."""
    rank, step = worker.rank, worker.step
    return NeighborExchange(value, topology.out_neighbors(rank, step), topology.in_neighbors(rank, step))


def neighbor_average(worker: Worker, topology: AbstractTopology, value: AbstractVector) -> NeighborAverage:
    """``value <- sum_j W[i, j] value_j`` over this step's in-neighbours j and the worker i itself.

    Args:
        worker: i.
        topology: W.
        value: value_i.
    """
    rank, step = worker.rank, worker.step
    weights = topology.weights(rank, step)
    received = {source: weights[source] for source in topology.in_neighbors(rank, step)}
    return NeighborAverage(value, topology.out_neighbors(rank, step), weights.get(rank, 0.0), received)
