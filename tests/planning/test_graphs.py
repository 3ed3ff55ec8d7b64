"""Proved here: the graph that is recommended for a number of messages sends no more, averages as fast as any that was
considered, is what a method needs; on a slow network fewer messages are worth more; what does not exist is refused."""

from __future__ import annotations

import pytest

from lightning_decentral.algorithms import D2, ChocoSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.graphs import recommend_graph
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import AbstractTopology, BaseGraph, OnePeerExponential, Placed, Ring, Sites


def messages(graph: AbstractTopology) -> int:
    return max(len(graph.out_neighbors(rank, step)) for rank in range(graph.size) for step in range(graph.period or 20))


@pytest.mark.parametrize(("workers", "degree"), [(2, 1), (7, 1), (8, 1), (12, 2), (12, 3), (16, 4)])
def test_no_more_messages_and_none_is_faster(workers: int, degree: int) -> None:
    for kinds in ({}, {"static": True, "symmetric": True}) if degree > 1 else ({},):
        choice = recommend_graph(workers, degree, **kinds)
        best = choice.topology
        assert messages(best) <= degree
        assert best.size == workers
        assert best in choice.considered
        assert best.spectral_gap >= max(each.spectral_gap for each in choice.considered) - 1e-9
        assert f"{len(choice.considered)} graphs" in choice.reason
        if kinds:
            ChocoSGD(best)  # which refuses others, as D2 does
            D2(recommend_graph(workers, degree, smallest_eigenvalue=-1 / 3, static=True).topology)


def test_well_known_graphs_are_found() -> None:
    assert recommend_graph(8).topology == OnePeerExponential(8)
    assert recommend_graph(12, 2).topology == BaseGraph(12, 2)
    assert recommend_graph(9, 2, smallest_eigenvalue=-1 / 3, static=True).topology == Ring(9)
    larger = recommend_graph(32, 4, static=True, symmetric=True).topology
    assert larger.spectral_gap > 2 * Ring(32).spectral_gap


def test_a_slow_network_is_worth_fewer_messages() -> None:
    slow = Cluster(compute_seconds=0.1, bandwidth_bytes_per_second=1e8)
    fast = Cluster(compute_seconds=0.1, bandwidth_bytes_per_second=1e12)
    few, many = (recommend_graph(8, 3, cluster, static=True, symmetric=True) for cluster in (slow, fast))
    assert messages(few.topology) < messages(many.topology)
    assert few.topology.spectral_gap < many.topology.spectral_gap
    assert few.plan is not None
    assert "steps/s" in few.reason


def test_a_slow_link_between_sites_is_crossed_seldom() -> None:
    sites = ((0, 2, 4, 6), (1, 3, 5, 7))  # which `Sites` alone does not fit
    cluster = Cluster(1, bandwidth_bytes_per_second=1e9, sites=sites, site_bandwidth_bytes_per_second=2e7)
    choice = recommend_graph(8, 2, cluster)
    assert choice.topology == Placed(Sites(8, 2), (0, 2, 4, 6, 1, 3, 5, 7))
    assert f", the best of {len(choice.considered)} graphs" in choice.reason
    assert choice.topology.spectral_gap < recommend_graph(8, 2).topology.spectral_gap  # it is faster, and agrees less


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs at least 2 and 1"):
        recommend_graph(8, 0)
    with pytest.raises(ConfigurationError, match="Use degree=2, or static=False"):
        recommend_graph(8, 1, static=True, symmetric=True)
