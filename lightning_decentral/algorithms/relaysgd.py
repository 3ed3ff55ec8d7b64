"""RelaySGD (Vogels, He, Koloskova, Lin, Karimireddy, Stich, Jaggi, 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import networkx as nx
import torch

from lightning_decentral.algorithms.base import AbstractGossip
from lightning_decentral.errors import TopologyError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import Gradient, LocalStep, Mixing, NeighborExchange, Start
from lightning_decentral.topology import AbstractTopology, Complete, FromGraph, TopologyLike
from lightning_decentral.worker import Worker


def binary_tree(size: int) -> AbstractTopology:
    """Return the tree in which worker i has the children ``2 i + 1`` and ``2 i + 2``; `Complete` for one worker."""
    return FromGraph([((rank - 1) // 2, rank) for rank in range(1, size)]) if size > 1 else Complete(size)


@dataclass(frozen=True, repr=False)
class RelaySGD(AbstractGossip):
    r"""RelaySGD: on a tree, models are relayed until every worker has heard of each one, exactly once.

    Update rule, for the neighbours j of worker i in a tree; messages and counts are zero before the first step::

        x_i            <- x_i - learning_rate * gradient_i(x_i)
        message_{i->j} <- x_i + sum_{k != j} message_{k->i}    of the step before
        count_{i->j}   <- 1 + sum_{k != j} count_{k->i}        of the step before
        x_i            <- (x_i + sum_j message_{j->i}) / (1 + sum_j count_{j->i})

    So a worker takes the uniform mean of all models; those of its neighbours as they are, and others a step older for
    each further edge on the way. No weights of the graph are used, only who is joined with whom. Nothing moves any more
    where all models are equal and the gradient of the whole problem is zero, whatever data each worker has.

    Any optimizer may make the update; its state stays local. Momentum moves no fixed point. Adam does: its steps depend
    on the size of each worker's own gradient, which does not vanish.

    Args:
        topology: a tree, or a function of the number of workers that makes one; `binary_tree` by default. On a `Star`
            no model is older than one step.

    Cost:
        One model, and a number, to each neighbour per step, each another one, after the update. Extra memory: a copy of
        the model for each neighbour, in float32 for half precision, and as many messages on their way. A lost peer
        raises `PeerLost`.

    Raises:
        TopologyError: for a graph that is no tree.

    References:
        Thijs Vogels, Lie He, Anastasia Koloskova, Tao Lin, Sai Praneeth Karimireddy, Sebastian U. Stich, Martin Jaggi.
        RelaySum for Decentralized Deep Learning on Heterogeneous Data. NeurIPS 2021, arXiv:2110.04175.

    Example:
        >>> RelaySGD().resolved(4)
        RelaySGD(topology=FromGraph(graph=((0, 1), (0, 2), (1, 3)), lazy=False))
    """

    topology: TopologyLike = binary_tree

    def check(self, graph: AbstractTopology | None) -> None:
        if graph is None:
            return
        edges = graph.edges() if graph.period == 1 else []
        if len(edges) != 2 * (graph.size - 1) or any(edge[::-1] not in edges for edge in edges):
            raise TopologyError(
                f"RelaySGD needs a tree: {2 * (graph.size - 1)} messages along {graph.size - 1} edges that stay the "
                f"same, got {graph!r}. Use Star, FromGraph with the edges of a tree, or leave the topology out."
            )

    def mixing(self, world_size: int) -> Mixing:
        return _mixing(tuple(self.graph.edges()), world_size)

    def init(self, worker: Worker) -> None:
        neighbors = self.graph.in_neighbors(worker.rank)
        worker.state["received"] = [_with_count(worker, 0.0) for _ in neighbors]

    async def step(self, worker: Worker) -> None:
        neighbors, received = self.graph.in_neighbors(worker.rank), worker.state["received"]
        await Gradient()
        await LocalStep()
        own = _with_count(worker, 1.0, worker.x)
        tickets = []
        for neighbor in neighbors:
            message = own.clone()
            for source, earlier in zip(neighbors, received, strict=True):
                if source != neighbor:
                    message.add_(earlier)
            tickets.append(await Start(NeighborExchange(message, (neighbor,), (neighbor,))))
        for neighbor, ticket, earlier in zip(neighbors, tickets, received, strict=True):
            earlier.copy_((await ticket)[neighbor])
        for arrived in received:
            own.add_(arrived)
        total, count = own.apart(worker.x, worker.x.new_numbers(0.0))
        worker.x.copy_(total.mul_(1.0 / count.numbers()[0]))


def _with_count(worker: Worker, count: float, model: AbstractVector | None = None) -> AbstractVector:
    """Put a model, or zeros, together with a number beside it; as wide as sums need."""
    vector = worker.x.zeros_like()
    return (vector if model is None else vector.copy_(model)).beside(worker.x.new_numbers(count))


@lru_cache(maxsize=64)
def _mixing(edges: tuple[tuple[int, int], ...], size: int) -> Mixing:
    """Compute the mixing by the second eigenvalue of ``x_i(t+1) = (1/n) sum_j x_j(t - delay_ij)``."""
    if size == 1:
        return Mixing(1.0, 1)
    distances = dict(nx.all_pairs_shortest_path_length(nx.Graph(edges)))
    depth = max(1, *(max(row.values()) for row in distances.values()))  # of the oldest models
    matrix = torch.zeros(size * depth, size * depth, dtype=torch.float64)
    for i, row in distances.items():
        for j, distance in row.items():
            matrix[i, max(distance - 1, 0) * size + j] = 1 / size
    matrix[size:, :-size] = torch.eye(size * (depth - 1), dtype=torch.float64)
    factor = float(torch.linalg.eigvals(matrix).abs().sort(descending=True).values[1])
    return Mixing(1.0 - factor, max(depth, math.ceil(math.log(1e-3) / math.log(factor))) if factor > 1e-6 else depth)
