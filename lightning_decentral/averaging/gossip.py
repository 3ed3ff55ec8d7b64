"""Gossip: the weighted average with the neighbours in a graph."""

from __future__ import annotations

from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import NeighborExchange
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker


async def neighbor_average(worker: Worker, topology: AbstractTopology, value: AbstractVector) -> AbstractVector:
    """``sum_j W[i, j] value_j`` over the neighbours of this step and the worker itself.

    The result lies in the memory of a received message (no further copy of the model); it is ``value`` itself in a step
    in which nobody sends to this worker. Sends one message to each out-neighbour.
    """
    rank, step = worker.rank, worker.step
    weights = topology.weights(rank, step)
    received = await NeighborExchange(value, topology.out_neighbors(rank, step), topology.in_neighbors(rank, step))
    if not received:
        return value
    mixed = next(iter(received.values()))
    return mixed.mix_(value, weights.get(rank, 0.0), [(theirs, weights[source]) for source, theirs in received.items()])
