"""Proved here: `Placed` is its graph between other workers; `placed` finds the order that costs least where trying all
of them tells which it is, and never one that costs more than that of the ranks."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology import (
    AbstractTopology,
    BipartiteRing,
    DirectedGraph,
    HypercubeMatching,
    OnePeerExponential,
    Placed,
    RandomMatching,
    Ring,
    Sites,
    Star,
    mean_cost,
    placed,
)

DIRECTED = DirectedGraph([[1, 2], [2], [3], [4, 1], [0]])
GRAPHS = [Ring(5), Star(6), DIRECTED, OnePeerExponential(6), HypercubeMatching(8), BipartiteRing(6), Sites(8)]


def drawn(size: int, seed: int) -> Tensor:
    """Costs without any structure, and other ones back."""
    return torch.rand(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of_sites(size: int, sites: int) -> list[list[float]]:
    """Costs of workers that are numbered across the sites: worker i is at site i mod sites."""
    return [[1.0 if (i - j) % sites == 0 else 50.0 for j in range(size)] for i in range(size)]


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_it_is_the_graph_between_other_workers(graph: AbstractTopology) -> None:
    ranks = tuple(torch.randperm(graph.size, generator=torch.Generator().manual_seed(3)).tolist())
    other = Placed(graph, ranks)
    for step in range(graph.period):
        assert torch.equal(other.mixing_matrix(step)[ranks, :][:, ranks], graph.mixing_matrix(step))
    assert other.spectral_gap == pytest.approx(graph.spectral_gap, abs=1e-12)  # of another order of additions
    assert other.rounds_to_consensus(0.011) == graph.rounds_to_consensus(0.011)
    for name in ("size", "period", "stochastic", "is_symmetric", "is_connected", "is_bipartite"):
        assert getattr(other, name) == getattr(graph, name)
    for place, rank in enumerate(ranks):
        assert other.initiates(rank) == graph.initiates(place)
        assert other.peers(rank) == tuple(sorted(ranks[each] for each in graph.peers(place)))


def test_two_orders_become_one() -> None:
    once, twice = (1, 2, 3, 4, 0), (4, 2, 0, 1, 3)
    nested = Placed(Placed(DIRECTED, once), twice)
    assert nested == Placed(DIRECTED, tuple(twice[place] for place in once))
    inner = Placed(DIRECTED, once).mixing_matrix()
    assert torch.equal(nested.mixing_matrix()[twice, :][:, twice], inner)


@pytest.mark.parametrize(("size", "sites"), [(4, 2), (6, 2), (12, 2), (12, 3), (30, 5)])
def test_a_ring_of_sites_crosses_once_per_site(size: int, sites: int) -> None:
    ring = placed(Ring(size), of_sites(size, sites))
    assert sum((i - j) % sites != 0 for i, j in ring.edges()) == 2 * sites  # a link is two messages
    assert placed(ring, of_sites(size, sites)) is ring


@pytest.mark.parametrize("graph", GRAPHS[:4], ids=repr)
def test_few_workers_take_the_best_places_of_all(graph: AbstractTopology) -> None:
    for seed in range(4):
        costs = drawn(graph.size, seed) if seed else torch.tensor(of_sites(graph.size, 2))
        table = costs.clone().fill_diagonal_(0.0)
        flows = sum((graph.mixing_matrix(step) > 0).double().fill_diagonal_(0.0) for step in range(graph.period)).T
        every = torch.tensor(list(permutations(range(graph.size))))
        sums = (flows * table[every[:, :, None], every[:, None, :]]).sum((1, 2))
        found = mean_cost(placed(graph, costs), costs)
        assert found == pytest.approx(float(sums.min() / flows.sum()), rel=1e-9)


def test_it_never_costs_more_than_the_order_of_the_ranks() -> None:
    for size, graph in ((7, Ring(7)), (8, HypercubeMatching(8)), (11, OnePeerExponential(11))):
        costs = drawn(size, seed=size)
        found = placed(graph, costs)
        assert mean_cost(found, costs) < mean_cost(graph, costs)
        assert placed(graph, 1000 * costs) == found  # of any unit
        assert placed(graph, torch.ones(size, size)) is graph  # nothing to gain
        in_order = Placed(graph, tuple(range(size)))
        assert placed(in_order, torch.zeros(size, size)) is in_order


def test_what_it_refuses() -> None:
    with pytest.raises(TopologyError, match=r"Placed got the ranks \(0, 0, 1\) for Ring.*needs each of 0 to 2 once"):
        Placed(Ring(3), (0, 0, 1))
    for ranks in (("0", "1", "2"), 3, (0.0, 1, 2), ()):
        with pytest.raises(TopologyError, match="needs each of 0 to 2 once"):
            Placed(Ring(3), ranks)  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match=r"Placed got RandomMatching.*needs a graph with a period"):
        Placed(RandomMatching(4), (0, 1, 2, 3))
    with pytest.raises(TopologyError, match="placed got 'ring', needs a topology"):
        placed("ring", [[0.0]])  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match=r"placed got costs of shape \(2, 2\) for Ring.*needs \(3, 3\)"):
        placed(Ring(3), torch.zeros(2, 2))
    with pytest.raises(TopologyError, match="mean_cost got costs that are no matrix of numbers"):
        mean_cost(Ring(3), [[0.0, "a"]])  # type: ignore[list-item]
    for wrong in (-1.0, float("inf"), float("nan")):
        costs = torch.ones(3, 3)
        costs[0, 1] = wrong
        with pytest.raises(TopologyError, match="placed got a cost below zero, or one that is not finite"):
            placed(Ring(3), costs)
