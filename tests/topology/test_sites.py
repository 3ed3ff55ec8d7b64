"""Proved here: `Sites` sends between the sites exactly what it says and when, and the sites' means approach each other
by the factor that its description gives.
"""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.topology import OnePeerExponential, Sites

GRAPHS = [Sites(4), Sites(8), Sites(8, 4, 3), Sites(12, 3, 5), Sites(15, 5, 3), Sites(16, 2, 8), Sites(20, 2)]


def crosses(graph: Sites, edge: tuple[int, int]) -> bool:
    members = graph.size // graph.sites
    return edge[0] // members != edge[1] // members


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_one_step_of_a_crossing_period_crosses_and_carries_one_model_per_site(graph: Sites) -> None:
    members = graph.size // graph.sites
    first = [rank for rank in range(graph.size) if rank % members == 0]
    for begin in range(0, graph.period, graph.crossing_period):
        steps = range(begin, begin + graph.crossing_period)
        crossing = [step for step in steps if any(crosses(graph, edge) for edge in graph.edges(step))]
        assert len(crossing) == 1
        senders, receivers = zip(*graph.edges(crossing[0]), strict=True)
        assert sorted(senders) == sorted(receivers) == first
        matrix = graph.mixing_matrix(crossing[0])
        assert torch.equal(matrix @ matrix.T, torch.eye(graph.size).double())  # a permutation


@pytest.mark.parametrize("graph", GRAPHS, ids=repr)
def test_each_site_averages_in_between_as_a_graph_of_its_own(graph: Sites) -> None:
    members = graph.size // graph.sites
    own = OnePeerExponential(members)
    crossing = graph.crossing_period // 2
    for since in range(1, graph.crossing_period):
        expected = torch.block_diag(*[own.mixing_matrix(since - 1)] * graph.sites)
        assert torch.equal(graph.mixing_matrix(crossing + since), expected)


@pytest.mark.parametrize("members", [2, 4, 8])
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_two_sites_approach_by_1_minus_2_over_m_per_crossing(members: int, spare: int) -> None:
    period = max(3, members.bit_length() + spare)  # more than log2 m
    graph = Sites(2 * members, crossing_period=period)
    values = torch.tensor([1.0] * members + [-1.0] * members, dtype=torch.float64)
    for number in range(1, 5):
        for step in range(period):
            values = graph.mixing_matrix(period // 2 + step) @ values
        expected = (1 - 2 / members) ** number  # binary fractions: exact
        assert values.tolist() == [expected] * members + [-expected] * members


def test_several_sites_mix_as_their_exponential_graph_says() -> None:
    sites, members, period = 4, 2, 3
    graph, between = Sites(sites * members, sites, period), OnePeerExponential(sites)
    values = torch.arange(sites, dtype=torch.float64).repeat_interleave(members) ** 2
    means = torch.arange(sites, dtype=torch.float64) ** 2
    for crossing in range(5):
        for step in range(period):
            values = graph.mixing_matrix(period // 2 + crossing * period + step) @ values
        means = between.mixing_matrix(crossing) @ means  # m = 2: half of a site is what came
        assert torch.equal(values, means.repeat_interleave(members))


@pytest.mark.parametrize(("size", "sites"), [(4, 2), (8, 2), (8, 4), (15, 3), (64, 2)])
@pytest.mark.parametrize("period", [3, 4, 9])
def test_all_agree_in_the_end(size: int, sites: int, period: int) -> None:
    graph = Sites(size, sites, period)
    assert 0 < graph.spectral_gap <= 1
    assert graph.rounds_to_consensus() < float("inf")
