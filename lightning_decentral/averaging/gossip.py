"""Gossip: the weighted average with the neighbours in a graph."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import NeighborExchange
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker


def neighbor_exchange(worker: Worker, topology: AbstractTopology, value: AbstractVector) -> NeighborExchange:
    """Send ``value`` to this step's out-neighbours and receive from its in-neighbours."""
    rank, step = worker.rank, worker.step
    return NeighborExchange(value, topology.out_neighbors(rank, step), topology.in_neighbors(rank, step))


def combine_(
    worker: Worker, topology: AbstractTopology, value: AbstractVector, received: Mapping[int, AbstractVector]
) -> None:
    """``value <- sum_j W[i, j] value_j`` over this step's in-neighbours and the worker itself, in place, in one pass.

    Args:
        worker: i.
        topology: W.
        value: value_i.
        received: the answer to `neighbor_exchange`, value_j for each in-neighbour j.
    """
    if received:
        weights = topology.weights(worker.rank, worker.step)
        others = [(theirs, weights[source]) for source, theirs in received.items()]
        value.mix_(value, weights.get(worker.rank, 0.0), others)
