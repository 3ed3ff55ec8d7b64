"""The weights that average fastest on a given graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import networkx as nx
import torch
from torch import Tensor

from lightning_decentral.topology.base import AbstractPeriodicTopology
from lightning_decentral.topology.custom import FromGraph
from lightning_decentral.topology.rows import Row

_GRID = 2.0**-20  # weights are multiples of it: sums are exact, and machines that round differently agree
_SHARPNESS = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)  # with which the largest eigenvalue is approached


@final
@dataclass(frozen=True)
class FastestGraph(AbstractPeriodicTopology):
    r"""Any connected undirected graph, with the symmetric, non-negative weights that average fastest on it.

    They make `||W - J||_2` as small as it can be, by about 0.1 % of its distance from 1: where `FromGraph` has weights
    that need to know degrees only, these are the solution of a convex problem (the fastest mixing Markov chain; FDLA
    with non-negative weights). Edges that do not help get the weight 0, and send nothing.

    Cost: as many peers per step as a worker has neighbours; the best-connected worker sets the pace. Making one takes
    seconds for a hundred edges.

    Args:
        graph: a networkx `Graph`, or a list of edges, as for `FromGraph`.

    Attributes:
        size: number of nodes, at least 2.

    Raises:
        TopologyError: as `FromGraph` does.

    Example:
        >>> from lightning_decentral.topology import FastestGraph, FromGraph
        >>> path = [(0, 1), (1, 2), (2, 3)]
        >>> round(FastestGraph(path).spectral_gap, 3), round(FromGraph(path).spectral_gap, 3)
        (0.293, 0.195)

    References:
        Boyd, Diaconis, Xiao, *Fastest mixing Markov chain on a graph*, SIAM Review 2004. Xiao, Boyd, *Fast linear
        iterations for distributed averaging*, Systems & Control Letters 2004.
    """

    size: int = field(init=False, repr=False)
    graph: Sequence[tuple[int, int]] | nx.Graph

    def _prepare(self) -> None:
        known = FromGraph(self.graph)
        object.__setattr__(self, "size", known.size)
        object.__setattr__(self, "graph", known.graph)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    @cached_property
    def _edges(self) -> list[tuple[int, int]]:
        return list(self.graph)  # `_prepare` has made edges of it

    def _rows(self, step: int) -> tuple[Row, ...]:
        rows: list[Row] = [{} for _ in range(self.size)]
        for (a, b), weight in zip(self._edges, _fastest(self._edges, self.size), strict=True):
            if weight:
                rows[a][b] = rows[b][a] = weight
        for rank, row in enumerate(rows):
            own = 1.0 - sum(row.values())
            if own:
                row[rank] = own
        return tuple(dict(sorted(row.items())) for row in rows)


def _fastest(edges: Sequence[tuple[int, int]], size: int) -> list[float]:
    """Weights of the edges, by minimizing smooth bounds of the norm, each sharper than the one before."""
    rows = torch.tensor(edges, device="cpu")
    touches = torch.zeros(len(edges), size, dtype=torch.float64, device="cpu")
    touches[torch.arange(len(edges)), rows[:, 0]] = touches[torch.arange(len(edges)), rows[:, 1]] = 1.0
    start = 1.0 / (1.0 + touches.sum(0).max())  # inside the bounds: where they hold weights back, scale has no slope
    logits = start.log().repeat(len(edges)).requires_grad_()
    best, smallest = torch.zeros(0), float("inf")
    for sharpness in _SHARPNESS:
        optimizer = torch.optim.LBFGS([logits], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

        def bound(sharpness: float = sharpness, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                values = torch.linalg.eigvalsh(_deviation(_weights(logits, touches, sharpness), rows, size))
                loss = torch.logsumexp(torch.cat([values, -values]) * sharpness, 0) / sharpness
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(bound)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            weights = _weights(logits, touches, sharpness)
            norm = float(torch.linalg.matrix_norm(_deviation(weights, rows, size), ord=2))
        if norm < smallest:
            best, smallest = weights, norm
    return [float(weight) for weight in (best / _GRID).floor() * _GRID]


def _weights(logits: Tensor, touches: Tensor, sharpness: float) -> Tensor:
    """Find non-negative weights of edges, of which those of a worker sum up to at most 1."""
    weights = logits.exp()
    sums = weights @ touches  # of each worker
    largest = torch.where(touches > 0, sums, 0.0).amax(1)  # of the two ends of an edge
    return weights / torch.nn.functional.softplus(largest - 1.0, beta=sharpness).add(1.0)


def _deviation(weights: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return ``W - J``."""
    matrix = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    matrix = matrix.index_put((rows[:, 0], rows[:, 1]), weights)
    matrix = matrix + matrix.T
    return matrix + (1.0 - matrix.sum(0)).diag() - 1.0 / size
