"""Proved here: what cannot work is refused when it is built, and the message says what was got, needed, and to do."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import pytest
import torch

from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.topology import (
    AbstractTopology,
    AlternatingMatching,
    BipartiteExponential,
    BipartiteRing,
    Complete,
    Exponential,
    FromGraph,
    FromMatrix,
    Hypercube,
    HypercubeMatching,
    OnePeerExponential,
    RandomMatching,
    Ring,
    Sites,
    Star,
    Torus,
)

CASES: list[tuple[Callable[[], object], str]] = [
    (lambda: Ring(1), r"Ring needs at least 3 workers, got 1\. Use Complete\(1\)"),
    (lambda: Ring(-4), r"Ring needs at least 3 workers, got -4\. Use 3 or more\."),
    (lambda: Ring("3"), r"needs `size` to be an int, got '3' \(str\)\. Pass"),  # type: ignore[arg-type]
    (lambda: Ring(True), r"needs `size` to be an int, got True \(bool\)"),
    (lambda: Ring(4.0), r"needs `size` to be an int, got 4\.0 \(float\)"),  # type: ignore[arg-type]
    (lambda: Ring(8, 3), r"needs `lazy` to be True or False, got 3"),  # type: ignore[arg-type]
    (lambda: Torus(0, 3), r"at least one row and one column, got rows=0\. Choose"),
    (lambda: Torus(1, 1), r"Torus needs at least 2 workers, got 1\. Use Complete\(1\)"),
    (lambda: Torus(2, "3"), r"needs `columns` to be an int, got '3'"),  # type: ignore[arg-type]
    (lambda: Hypercube(6), r"needs a power of two .* got 6\. Use Exponential"),
    (lambda: HypercubeMatching(12), r"needs a power of two .* got 12\. Use OnePeerExponential"),
    (lambda: Complete(0), r"needs at least 1 worker, got 0\. Use 1 or more"),
    (lambda: AlternatingMatching(5), r"needs an even number of workers, got 5\. Use"),
    (lambda: BipartiteRing(5), r"needs an even number of workers, got 5\. Add or remove one"),
    (lambda: BipartiteExponential(9), r"needs an even number of workers, got 9\. Add or remove one"),
    (lambda: Sites(8, sites=1), r"needs at least 2 sites, got 1\. Use OnePeerExponential"),
    (lambda: Sites(8, crossing_period=2), r"crossing period of at least 3 steps, got 2\. Use 3 or more"),
    (lambda: Sites(3), r"needs at least 4 workers, got 3\. Use OnePeerExponential"),
    (lambda: Sites(9), r"equally many workers at each of the 2 sites, got 9 in all\. Start 8 workers, or use OnePeer"),
    (lambda: Sites(8, sites=2.0), r"needs `sites` to be an int, got 2\.0 \(float\)"),  # type: ignore[arg-type]
    (lambda: RandomMatching(4, seed=0.5), r"needs `seed` to be an int"),  # type: ignore[arg-type]
    (lambda: FromGraph([(0, 1), (2, 3)]), r"connected graph, got 2 parts, one with only node\(s\) 0, 1\. Add an edge"),
    (lambda: FromGraph([(0, 2)]), r"got no edge for 1\. Number the workers"),
    (lambda: FromGraph([(-1, 0)]), r"got rank -1\. Number the workers"),
    (lambda: FromGraph([]), r"at least 2 nodes, got 0"),
    (lambda: FromGraph([(0, 1), (1, 1)]), r"without self-loops, got one at node 1\. Remove it"),
    (lambda: FromGraph([(0, 1, 2)]), r"pairs of ranks, got \(0, 1, 2\)"),  # type: ignore[list-item]
    (lambda: FromGraph([("a", "b")]), r"pairs of ranks, got \('a', 'b'\)"),  # type: ignore[list-item]
    (lambda: FromGraph("0-1"), r"networkx Graph or a list of edges, got str"),  # type: ignore[arg-type]
    (lambda: FromGraph(nx.DiGraph([(0, 1)])), r"undirected graph, got a directed one\. Use graph\.to_undirected"),
    (lambda: FromGraph(nx.Graph([(0, "a")])), r"nodes that can be sorted.*\['int', 'str'\]\. Use networkx"),
    (lambda: FromMatrix([[0.5, 0.5]]), r"square matrix, got 1 rows, one of them with 2 entries\. Give"),
    (lambda: FromMatrix([]), r"square matrix, got an empty one"),
    (lambda: FromMatrix([["a"]]), r"matrix of numbers, got list"),  # type: ignore[list-item]
    (lambda: FromMatrix(3), r"matrix of numbers, got int"),  # type: ignore[arg-type]
    (
        lambda: FromMatrix([[1.5, -0.5], [-0.5, 1.5]]),
        r"non-negative weights, got W\[0, 1\] = -0\.5, which is more .* Remove",
    ),
    (lambda: FromMatrix([[float("nan"), 1.0], [1.0, 0.0]]), r"finite, non-negative weights, got W\[0, 0\] = nan"),
    (lambda: FromMatrix([[0.5, 0.4], [0.5, 0.5]]), r"doubly stochastic matrix, got row 0 with sum 0\.9\. Make"),
    (lambda: FromMatrix([[0.5, 0.5], [0.7, 0.3]]), r"doubly stochastic matrix, got column 0 with sum 1\.2: .* Make"),
    (
        lambda: FromMatrix([[1.00001, -1e-5], [-1e-5, 1.00001]]),
        r"W\[0, 1\] = -1e-05, which is more than rounding \(1e-06\)",
    ),
    (lambda: FromMatrix(torch.full((3, 3), 0.3333)), r"row 0 with sum 0\.9998.*Make every row .* within 1e-06"),
    (lambda: FromMatrix(torch.full((2, 3), 0.5)), r"square matrix, got 2 rows, one of them with 3 entries"),
    (lambda: FromMatrix(torch.full((2,), 0.5)), r"matrix of numbers, got Tensor of shape \(2,\).*of shape \[n, n\]"),
    (lambda: FromMatrix(torch.full((2, 2), 0.5j)), r"matrix of numbers, got Tensor of shape \(2, 2\).*of real numbers"),
    (lambda: FromMatrix([[float("inf"), 0.0], [0.0, 1.0]]), r"finite, non-negative weights, got W\[0, 0\] = inf"),
    (lambda: FromMatrix([[1.0, 0.0], [0.0, 1.0]]), r"connected matrix, got worker\(s\) 0 without .* Add weights"),
    (lambda: Exponential(4).smallest_eigenvalue, r"symmetric mixing matrix, got the directed Exponential\. Use"),
    (lambda: Ring(4).in_neighbors(4), r"rank from 0 to 3, got 4\. Build"),
    (lambda: Ring(4).weights(-1, 0), r"rank from 0 to 3, got -1"),
    (lambda: RandomMatching(4).peers(4), r"rank from 0 to 3, got 4"),
    (lambda: Ring(4).rounds_to_consensus(0), r"tolerance between 1e-13 and 1, got 0\. .* use for instance 1e-3"),
    (lambda: RandomMatching(4).rounds_to_consensus(1), r"tolerance between 1e-13 and 1, got 1"),
]


@pytest.mark.parametrize(("build", "message"), CASES, ids=[message[:50] for _, message in CASES])
def test_refused_with_a_reason(build: Callable[[], object], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        build()


def test_the_message_of_the_ring() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Ring(2)
    expected = "Ring needs at least 3 workers, got 2. Use Complete(2): with two workers it is the same graph."
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "kind",
    [
        AlternatingMatching,
        BipartiteExponential,
        BipartiteRing,
        Exponential,
        Hypercube,
        HypercubeMatching,
        OnePeerExponential,
        RandomMatching,
        Star,
    ],
)
def test_one_worker_is_sent_to_the_complete_graph(kind: Callable[[int], AbstractTopology]) -> None:
    with pytest.raises(TopologyError, match=r"needs at least 2 workers, got 1\. Use Complete\(1\)"):
        kind(1)
