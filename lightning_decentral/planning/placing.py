"""Which worker takes which place of a method's graph, on a cluster whose links are not alike."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

from lightning_decentral.planning.planner import topology_of
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import AbstractTopology, placed

_placed = lru_cache(maxsize=64)(placed)  # several methods run on the same graphs

Costs = tuple[tuple[float, ...], ...]
"""Seconds of a message, by sender and receiver."""


def costs_of(cluster: Cluster, workers: int, num_bytes: int) -> Costs:
    """Tell what a message costs from each worker to each other one, if nothing else is on its way: for `placed`.

    Args:
        cluster: how fast its links send.
        workers: how many.
        num_bytes: of the message.

    Returns:
        Seconds, latency included, by sender and receiver.

    Example:
        >>> sites = Cluster(sites=[[0, 2], [1, 3]], site_bandwidth_bytes_per_second=1e6, site_latency_seconds=0.02)
        >>> costs_of(sites, 4, 1_000_000)[0]
        (0.0, 1.02, 0.0, 1.02)
    """
    return tuple(
        tuple(
            0.0 if i == j else cluster.transfer_seconds(num_bytes, i, j) + cluster.message_latency_seconds(i, j)
            for j in range(workers)
        )
        for i in range(workers)
    )


def on_places(algorithm: AbstractAlgorithm, costs: Costs) -> AbstractAlgorithm | None:
    """Return an algorithm whose workers have places in its graph that make messages cheaper than the present ones.

    Args:
        algorithm: resolved.
        costs: as of `costs_of`.

    Returns:
        It; ``None`` if all places cost the same, or nothing better was found, or the algorithm has no graph of all
        workers, or one whose rounds never repeat.
    """
    graph = topology_of(algorithm)
    if graph is None or not graph.period or graph.size != len(costs):
        return None
    if len({cost for i, row in enumerate(costs) for j, cost in enumerate(row) if i != j}) < 2:
        return None
    better = _placed(graph, costs)
    return None if better is graph else on_graph(algorithm, better)


def on_graph(algorithm: AbstractAlgorithm, graph: AbstractTopology) -> AbstractAlgorithm:
    """Return the algorithm on another graph."""
    values: Any = algorithm
    names = (field.name for field in dataclasses.fields(values))
    name = next(name for name in names if isinstance(getattr(algorithm, name), AbstractTopology))
    other: AbstractAlgorithm = dataclasses.replace(values, **{name: graph})
    return other
