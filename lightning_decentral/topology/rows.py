"""Mixing weights as sparse rows: the usual rules that turn a graph into a doubly stochastic matrix.

A *row* maps each source (the worker itself included) to the weight its message gets, sources in increasing order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

Row: TypeAlias = dict[int, float]


def uniform_rows(neighbors: Sequence[Iterable[int]]) -> tuple[Row, ...]:
    """Return the same weight ``1 / (1 + neighbours)`` for every in-neighbour and for oneself.

    Doubly stochastic only where every worker has equally many in- and out-neighbours.
    """
    rows = []
    for rank, sources in enumerate(neighbors):
        members = sorted({rank, *sources})
        rows.append(dict.fromkeys(members, 1 / len(members)))
    return tuple(rows)


def metropolis_rows(neighbors: Sequence[Iterable[int]]) -> tuple[Row, ...]:
    r"""Return Metropolis-Hastings weights of an undirected graph: ``W[i, j] = 1 / (1 + max(degree_i, degree_j))``.

    What is left of each row stays on the diagonal, which is therefore positive.

    References:
        Xiao, Boyd, Lall, *A scheme for robust distributed sensor fusion based on average consensus*, IPSN 2005.
    """
    sets = [set(sources) for sources in neighbors]
    rows = []
    for rank, sources in enumerate(sets):
        row = {source: 1 / (1 + max(len(sources), len(sets[source]))) for source in sources}
        row[rank] = 1 - sum(row.values())
        rows.append(dict(sorted(row.items())))
    return tuple(rows)


def pair_rows(size: int, pairs: Iterable[tuple[int, int]]) -> tuple[Row, ...]:
    """Return both members of a pair take the average of the two; a worker in no pair keeps its own value."""
    rows: list[Row] = [{rank: 1.0} for rank in range(size)]
    for a, b in pairs:
        low, high = min(a, b), max(a, b)
        rows[low] = {low: 0.5, high: 0.5}
        rows[high] = {low: 0.5, high: 0.5}
    return tuple(rows)


def lazy_rows(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return ``(I + W) / 2``: no eigenvalue is below zero any more, and the gap of a slow graph is halved."""
    halves = []
    for rank, row in enumerate(rows):
        half = {source: weight / 2 for source, weight in row.items()}
        half[rank] = half.get(rank, 0.0) + 0.5
        halves.append(dict(sorted(half.items())))
    return tuple(halves)


def renumbered(rows: Iterable[Row], ranks: Sequence[int]) -> dict[int, Row]:
    """Return the rows of a graph whose vertices have other numbers: those of ``ranks``, in the order of the rows."""
    return {
        ranks[place]: dict(sorted((ranks[source], weight) for source, weight in row.items()))
        for place, row in enumerate(rows)
    }
