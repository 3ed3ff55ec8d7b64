"""Topologies from the user's own graph or mixing matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import networkx as nx
import torch
from torch import Tensor

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractPeriodicTopology
from lightning_decentral.topology.rows import Row, lazy_rows, metropolis_rows
from lightning_decentral.topology.validation import (
    STOCHASTIC_TOLERANCE,
    require_bool,
    require_doubly_stochastic,
)

_ROUNDING = 1e-6  # what a matrix of the user's may be off by: solvers stop at 1e-8, and float32 rounds to 6e-8
_SCALINGS = 200  # at most; a few are needed


@final
@dataclass(frozen=True)
class FromGraph(AbstractPeriodicTopology):
    r"""Any connected undirected graph, with Metropolis-Hastings weights `W[i, j] = 1 / (1 + max(degree_i, degree_j))`.

    The rest of each row stays with the worker itself, so W is symmetric and doubly stochastic on every graph.

    Cost: as many peers per step as a worker has neighbours; the best-connected worker sets the pace.

    Args:
        graph: a networkx `Graph`, or a list of edges between ranks 0 .. n-1 (each edge once or twice). Nodes of a
            networkx graph that are not 0 .. n-1 are numbered in sorted order. Kept as a sorted tuple of edges.
        lazy: use `(I + W) / 2`: no negative eigenvalues, half the gap.

    Attributes:
        size: number of nodes, at least 2.

    Raises:
        TopologyError: if the graph is directed, not connected, has self-loops or nodes that cannot be sorted.

    Example:
        >>> import networkx as nx
        >>> from lightning_decentral.topology import FromGraph
        >>> FromGraph([(0, 1), (1, 2)])
        FromGraph(graph=((0, 1), (1, 2)), lazy=False)
        >>> FromGraph(nx.petersen_graph(), lazy=True).in_neighbors(0)
        (1, 4, 5)

    References:
        Xiao, Boyd, Lall, *A scheme for robust distributed sensor fusion based on average consensus*, IPSN 2005.
    """

    size: int = field(init=False, repr=False)
    graph: Sequence[tuple[int, int]] | nx.Graph
    lazy: bool = False

    def _prepare(self) -> None:
        require_bool("FromGraph", "lazy", self.lazy)
        graph = _numbered(self.graph) if isinstance(self.graph, nx.Graph) else _from_edges(self.graph)
        if len(graph) < 2:
            raise TopologyError(
                f"FromGraph needs a graph of at least 2 nodes, got {len(graph)}. Use Complete(1) for a single worker."
            )
        loops = sorted(node for node in graph if graph.has_edge(node, node))
        if loops:
            raise TopologyError(
                f"FromGraph needs a graph without self-loops, got one at node {loops[0]}. Remove it: a worker always "
                f"keeps a share of its own value."
            )
        if not nx.is_connected(graph):
            parts = sorted(sorted(part) for part in nx.connected_components(graph))
            raise TopologyError(
                f"FromGraph needs a connected graph, got {len(parts)} parts, one with only node(s) "
                f"{_shorten(min(parts, key=len))}. Add an edge between the parts, or the workers never agree."
            )
        object.__setattr__(self, "size", len(graph))
        object.__setattr__(self, "graph", tuple(sorted((min(edge), max(edge)) for edge in graph.edges())))

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        neighbors: list[list[int]] = [[] for _ in range(self.size)]
        for a, b in self.graph:
            neighbors[a].append(b)
            neighbors[b].append(a)
        rows = metropolis_rows(neighbors)
        return lazy_rows(rows) if self.lazy else rows


@final
@dataclass(frozen=True)
class FromMatrix(AbstractPeriodicTopology):
    r"""The user's own mixing matrix: `x_i <- sum_j W[i, j] x_j` at every step. May be directed.

    W must be square, non-negative, doubly stochastic and connected. Connected is not yet convergent: a permutation
    matrix passes and never averages, so look at `spectral_gap`.

    What rounding and solvers leave is taken away, if it is at most 1e-6: weights of that size, negative or not, become
    0; rows and columns are scaled until their sums are one; what is nearly symmetric becomes exactly so. A matrix that
    is exact stays as it is, and what is further off is refused.

    Cost: one peer per non-zero entry of a row, the diagonal excepted.

    Args:
        matrix: [n, n] weights, as nested lists, a tensor or a numpy array, of any real type. Kept as nested tuples.

    Attributes:
        size: number of rows n.

    Raises:
        TopologyError: if the matrix does not have one of the properties above; the message names the entry or sum.

    Example:
        >>> from lightning_decentral.topology import FromMatrix
        >>> FromMatrix([[0.75, 0.25], [0.25, 0.75]]).smallest_eigenvalue
        0.5
    """

    size: int = field(init=False, repr=False)
    matrix: Sequence[Sequence[float]] | Tensor

    def _prepare(self) -> None:
        matrix = _as_tuples(self.matrix)
        uneven = next((row for row in matrix if len(row) != len(matrix)), None)
        if uneven is not None or not matrix:
            got = "an empty one" if uneven is None else f"{len(matrix)} rows, one of them with {len(uneven)} entries"
            raise TopologyError(
                f"FromMatrix needs a square matrix, got {got}. Give one row and one column for every worker."
            )
        matrix = _without_rounding(matrix)
        object.__setattr__(self, "size", len(matrix))
        object.__setattr__(self, "matrix", matrix)
        # Negative and non-finite entries are edges here too, so that the check that follows finds and names them.
        graph = nx.Graph((i, j) for i, row in enumerate(matrix) for j, weight in enumerate(row) if weight != 0)
        graph.add_nodes_from(range(self.size))
        if not nx.is_connected(graph):
            part = min((sorted(part) for part in nx.connected_components(graph)), key=len)
            raise TopologyError(
                f"FromMatrix needs a connected matrix, got worker(s) {_shorten(part)} without a weight from or to the "
                f"others. Add weights between them, or the workers never agree."
            )

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        return tuple({source: weight for source, weight in enumerate(row) if weight != 0} for row in self.matrix)


def _numbered(graph: nx.Graph) -> nx.Graph:
    if graph.is_directed():
        raise TopologyError(
            "FromGraph needs an undirected graph, got a directed one. Use graph.to_undirected(), or give a doubly "
            "stochastic matrix to FromMatrix."
        )
    try:
        nodes = sorted(graph.nodes)
    except TypeError:
        raise TopologyError(
            "FromGraph needs nodes that can be sorted, to number the workers, got nodes of types "
            f"{sorted({type(node).__name__ for node in graph.nodes})}. "
            f"Use networkx.relabel_nodes to name them 0 .. n-1."
        ) from None
    return nx.Graph(nx.relabel_nodes(graph, {node: rank for rank, node in enumerate(nodes)}))


def _from_edges(edges: object) -> nx.Graph:
    if not isinstance(edges, Sequence) or isinstance(edges, str):
        raise TopologyError(
            f"FromGraph needs a networkx Graph or a list of edges, got {type(edges).__name__}. "
            f"Write for instance FromGraph([(0, 1), (1, 2)])."
        )
    graph = nx.Graph()
    for edge in edges:
        if not (isinstance(edge, Sequence) and len(edge) == 2 and all(type(node) is int for node in edge)):
            raise TopologyError(
                f"FromGraph needs edges that are pairs of ranks, got {edge!r}. Write for instance (0, 1)."
            )
        graph.add_edge(*edge)
    missing = sorted(set(range(max(graph, default=-1) + 1)) - set(graph))
    if missing or min(graph, default=0) < 0:
        got = f"no edge for {_shorten(missing)}" if missing else f"rank {min(graph)}"
        raise TopologyError(
            f"FromGraph needs edges between ranks 0 .. n-1 that leave none of them out, got {got}. "
            f"Number the workers from 0 without gaps."
        )
    return graph


def _as_tuples(matrix: Any) -> tuple[tuple[float, ...], ...]:
    """Nested tuples of floats from nested sequences, a tensor or a numpy array (both have ``tolist``)."""
    try:
        nested = matrix if isinstance(matrix, Sequence) else matrix.tolist()
        return tuple(tuple(float(weight) for weight in row) for row in nested)
    except (TypeError, ValueError, AttributeError):
        shape = tuple(getattr(matrix, "shape", ()))
        got = f"{type(matrix).__name__} of shape {shape}" if shape else type(matrix).__name__
        raise TopologyError(
            f"FromMatrix needs a matrix of numbers, got {got}. Give nested lists, a tensor or a numpy array of shape "
            f"[n, n], of real numbers."
        ) from None


def _without_rounding(matrix: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    """Return the doubly stochastic matrix that is meant, which this one is up to rounding.

    Raises:
        TopologyError: if it is further off.
    """
    require_doubly_stochastic("FromMatrix", tuple(dict(enumerate(row)) for row in matrix), _ROUNDING)
    weights = torch.tensor(matrix, dtype=torch.float64)
    weights[weights <= _ROUNDING] = 0.0
    symmetric = bool(((weights - weights.t()).abs() <= _ROUNDING).all())
    if symmetric:
        weights = (weights + weights.t()) / 2
        diagonal = weights.diagonal() + 1 - weights.sum(1)
        if not _is_stochastic(weights) and bool((diagonal >= 0).all()):
            weights.diagonal().copy_(diagonal)
    for _ in range(_SCALINGS):
        if _is_stochastic(weights):
            break
        if symmetric:
            weights /= torch.outer(weights.sum(1), weights.sum(1)).sqrt()
        else:  # Sinkhorn's
            weights /= weights.sum(1, keepdim=True)
            weights /= weights.sum(0)
    return tuple(tuple(row) for row in weights.tolist())


def _is_stochastic(weights: Tensor) -> bool:
    sums = torch.cat([weights.sum(0), weights.sum(1)])
    return bool(((sums - 1).abs() <= STOCHASTIC_TOLERANCE / 2).all())


def _shorten(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:5]))
    return f"{shown}, ... ({len(ranks)} of them)" if len(ranks) > 5 else shown
