"""Proved here: random regular graphs and small worlds are drawn alike everywhere, have as many links as they say, and
are connected; their rates are what a solver finds in the graph, and closed forms where there are some; near the least
eigenvalue that is possible for many workers; other numbers are refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest
import torch

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology import Complete, RandomRegular, Ring, SmallWorld


@pytest.mark.parametrize(
    ("size", "degree"), [(2, 1), (3, 2), (8, 2), (8, 3), (9, 4), (10, 8), (16, 7), (16, 8), (30, 29), (64, 4)]
)
def test_the_rate_of_a_random_regular_graph_is_that_of_its_neighbours(size: int, degree: int) -> None:
    for seed in range(3):
        graph = RandomRegular(size, degree, seed)
        drawn = nx.Graph(graph.links)
        assert sorted(drawn.degree) == [(rank, degree) for rank in range(size)]
        assert nx.is_connected(drawn)
        eigenvalues = np.linalg.eigvalsh(nx.to_numpy_array(drawn, nodelist=range(size)))
        largest = max(abs(1 + eigenvalues[0]), abs(1 + eigenvalues[-2])) / (degree + 1)
        assert graph.spectral_gap == pytest.approx(1 - largest, abs=1e-9)
        assert RandomRegular(size, degree, seed, lazy=True).smallest_eigenvalue >= -1e-12


def test_two_neighbours_are_a_ring_and_all_are_the_complete_graph() -> None:
    assert RandomRegular(11, 2, seed=4).spectral_gap == pytest.approx(Ring(11).spectral_gap)
    torch.testing.assert_close(RandomRegular(7, 6).mixing_matrix(), Complete(7).mixing_matrix())


def test_few_random_neighbours_average_nearly_as_fast_as_any_can() -> None:
    """Alon and Boppana: no graph is below `2 sqrt(d - 1)` by more than a share that falls with its diameter."""
    for degree in (3, 4, 6):
        least = (1 + 2 * math.sqrt(degree - 1)) / (degree + 1)
        found = [1 - RandomRegular(128, degree, seed).spectral_gap for seed in range(3)]
        assert 0.85 * least < min(found)
        assert max(found) < 1.1 * least


def test_seeds_draw_other_graphs_and_the_same_one_always() -> None:
    for make in (lambda seed: RandomRegular(12, 3, seed), lambda seed: SmallWorld(12, seed=seed)):
        assert make(1) == make(1)
        assert make(1).links == make(1).links
        assert len({make(seed).links for seed in range(5)}) == 5
    regular = ((0, 1), (0, 2), (0, 5), (1, 3), (1, 4), (2, 3), (2, 5), (3, 4), (4, 5))
    world = ((0, 1), (0, 2), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5))
    # Of this release and of all later ones, on all machines: workers of several must agree.
    assert RandomRegular(6, 3).links == regular
    assert SmallWorld(6).links == world


@pytest.mark.parametrize(("size", "degree"), [(3, 2), (7, 4), (12, 4), (20, 6)])
def test_a_small_world_without_shortcuts_has_the_rate_of_its_closed_form(size: int, degree: int) -> None:
    eigenvalues = [
        (1 + 2 * sum(math.cos(2 * math.pi * j * m / size) for m in range(1, degree // 2 + 1))) / (degree + 1)
        for j in range(1, size)
    ]
    assert SmallWorld(size, degree, 0.0).spectral_gap == pytest.approx(1 - max(map(abs, eigenvalues)), abs=1e-9)


@pytest.mark.parametrize("rewired", [0.1, 0.5, 1.0])
def test_shortcuts_keep_the_number_of_links_and_the_rate_is_a_solvers(rewired: float) -> None:
    size, degree = 24, 4
    graphs = [SmallWorld(size, degree, rewired, seed) for seed in range(3)]
    for graph in graphs:
        drawn = nx.Graph(graph.links)
        assert drawn.number_of_edges() == size * degree // 2
        assert nx.is_connected(drawn)
        moved = sum(min(b - a, size - b + a) > degree // 2 for a, b in graph.links)
        assert moved == pytest.approx(rewired * len(graph.links) * 0.8, abs=14)
        laplacian = np.zeros((size, size))
        for a, b in graph.links:
            weight = 1 / (1 + max(drawn.degree[a], drawn.degree[b]))
            laplacian[[a, b], [a, b]] += weight
            laplacian[[a, b], [b, a]] -= weight
        eigenvalues = np.linalg.eigvalsh(np.eye(size) - laplacian)
        assert graph.spectral_gap == pytest.approx(1 - max(abs(eigenvalues[0]), eigenvalues[-2]), abs=1e-9)
        if rewired > 0.2:
            assert graph.spectral_gap > 1.2 * SmallWorld(size, degree, 0.0).spectral_gap


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RandomRegular(1), "at least 2"),
        (lambda: RandomRegular(8, 1), "needs a degree from 2 to 7"),
        (lambda: RandomRegular(8, 8), "needs a degree from 2 to 7"),
        (lambda: RandomRegular(9, 3), "Use 2 or 4"),
        (lambda: SmallWorld(2), "two workers have one link"),
        (lambda: SmallWorld(9, 3), "needs an even degree"),
        (lambda: SmallWorld(9, rewired=1.5), "share of rewired links"),
    ],
)
def test_other_numbers_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(TopologyError, match=words):
        make()
