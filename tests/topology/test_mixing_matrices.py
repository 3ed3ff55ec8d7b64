"""Proved here, for every topology and many numbers of workers.

Every mixing matrix is doubly stochastic to 1e-12; what one worker sends is what another receives, at every step;
symmetry, connection and sides are what they are said to be; eigenvalues and gaps equal their closed forms.
"""

from __future__ import annotations

from math import ceil, cos, log2, pi, sqrt

import networkx as nx
import pytest
import torch

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
    Star,
    Torus,
)

# Eigenvalue solvers are backward stable: a few 1e-16 times the norm (1), times the number of workers (at most 64).
EIGENVALUE_TOLERANCE = 1e-13


def steps(topology: AbstractTopology) -> range:
    return range(topology.period or 5)


def eigenvalues(topology: AbstractTopology) -> torch.Tensor:
    return torch.linalg.eigvalsh(topology.mixing_matrix())


def union_graph(topology: AbstractTopology) -> nx.Graph:
    graph = nx.empty_graph(topology.size)
    graph.add_edges_from(edge for step in steps(topology) for edge in topology.edges(step))
    return graph


def test_doubly_stochastic(topology: AbstractTopology) -> None:
    for step in steps(topology):
        matrix = topology.mixing_matrix(step)
        assert matrix.shape == (topology.size, topology.size)
        assert matrix.dtype == torch.float64
        assert (matrix >= 0).all()
        assert (matrix.sum(0) - 1).abs().max() <= 1e-12
        assert (matrix.sum(1) - 1).abs().max() <= 1e-12


def test_weights_are_the_rows_of_the_matrix(topology: AbstractTopology) -> None:
    for step in steps(topology):
        matrix = topology.mixing_matrix(step)
        for rank in range(topology.size):
            row = topology.weights(rank, step)
            assert all(weight > 0 for weight in row.values())
            assert list(row) == sorted(row)
            assert matrix[rank].nonzero().flatten().tolist() == list(row)
            assert matrix[rank, list(row)].tolist() == list(row.values())


def test_send_lists_mirror_receive_lists(topology: AbstractTopology) -> None:
    for step in steps(topology):
        sent = {(rank, to) for rank in range(topology.size) for to in topology.out_neighbors(rank, step)}
        received = {(source, rank) for rank in range(topology.size) for source in topology.in_neighbors(rank, step)}
        assert sent == received
        assert sorted(sent) == topology.edges(step)
        assert all(sender != receiver for sender, receiver in sent)


def test_steps_repeat_with_the_period(periodic_topology: AbstractTopology) -> None:
    topology = periodic_topology
    for step in steps(topology):
        assert topology.edges(step) == topology.edges(step + 3 * topology.period)
    for shorter in range(1, topology.period):
        assert any(topology.edges(step) != topology.edges(step + shorter) for step in steps(topology))


def test_peers_are_all_partners_over_a_period(periodic_topology: AbstractTopology) -> None:
    topology = periodic_topology
    graph = union_graph(topology)
    for rank in range(topology.size):
        assert topology.peers(rank) == tuple(sorted(graph[rank]))


def test_connected_and_bipartite_agree_with_networkx(periodic_topology: AbstractTopology) -> None:
    graph = union_graph(periodic_topology)
    assert periodic_topology.is_connected
    assert nx.is_connected(graph)
    assert periodic_topology.is_bipartite == nx.is_bipartite(graph)


def test_symmetric_says_what_the_matrices_say(topology: AbstractTopology) -> None:
    matrices = [topology.mixing_matrix(step) for step in steps(topology)]
    assert topology.is_symmetric == all(torch.allclose(matrix, matrix.T, atol=1e-12) for matrix in matrices)


@pytest.mark.parametrize("kind", [BipartiteRing, BipartiteExponential])
@pytest.mark.parametrize("size", [2, 4, 6, 8, 10, 12, 16, 30, 32, 34, 64])
def test_bipartite_edges_join_a_starting_and_an_answering_worker(
    kind: type[BipartiteRing | BipartiteExponential], size: int
) -> None:
    topology = kind(size)
    assert all(topology.initiates(rank) == (rank % 2 == 1) for rank in range(size))
    assert all(topology.initiates(sender) != topology.initiates(receiver) for sender, receiver in topology.edges())


def test_everyone_initiates_elsewhere() -> None:
    for topology in (Ring(4), Complete(3), HypercubeMatching(8), RandomMatching(5)):
        assert all(topology.initiates(rank) for rank in range(topology.size))


@pytest.mark.parametrize("size", [2, 4, 6, 7, 8, 9, 33])
def test_one_peer_topologies_use_one_peer(size: int) -> None:
    one = {1} if size % 2 == 0 else {0, 1}
    assert {len(RandomMatching(size).in_neighbors(rank, 3)) for rank in range(size)} == one
    graph = OnePeerExponential(size)
    assert {len(graph.in_neighbors(rank, step)) for rank in range(size) for step in steps(graph)} == {1}
    assert graph.period == ceil(log2(size))


@pytest.mark.parametrize("size", [3, 4, 5, 8, 9, 16, 17, 64])
def test_ring_eigenvalues(size: int) -> None:
    expected = sorted((1 + 2 * cos(2 * pi * k / size)) / 3 for k in range(size))
    assert eigenvalues(Ring(size)).tolist() == pytest.approx(expected, abs=EIGENVALUE_TOLERANCE)
    second = max(abs(expected[0]), abs(expected[-2]))
    assert Ring(size).spectral_gap == pytest.approx(1 - second, abs=EIGENVALUE_TOLERANCE)


@pytest.mark.parametrize("size", [4, 6, 8, 16, 32])
def test_even_ring_has_the_eigenvalue_that_d2_cannot_use(size: int) -> None:
    assert Ring(size).smallest_eigenvalue == pytest.approx(-1 / 3, abs=EIGENVALUE_TOLERANCE)
    assert Ring(size, lazy=True).smallest_eigenvalue == pytest.approx(1 / 3, abs=EIGENVALUE_TOLERANCE)


def test_torus_eigenvalues() -> None:
    waves = [2 * cos(2 * pi * r / 4) + 2 * cos(2 * pi * c / 5) for r in range(4) for c in range(5)]
    expected = sorted((1 + wave) / 5 for wave in waves)
    assert eigenvalues(Torus(4, 5)).tolist() == pytest.approx(expected, abs=EIGENVALUE_TOLERANCE)


def test_torus_with_a_short_side() -> None:
    assert torch.equal(Torus(1, 7).mixing_matrix(), Ring(7).mixing_matrix())
    assert torch.equal(Torus(2, 1).mixing_matrix(), Complete(2).mixing_matrix())
    assert Torus(2, 5).weights(0, 0) == {0: 0.25, 1: 0.25, 4: 0.25, 5: 0.25}


@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_hypercube_eigenvalues(size: int) -> None:
    digits = int(log2(size))
    expected = sorted((1 + digits - 2 * rank.bit_count()) / (1 + digits) for rank in range(size))
    assert eigenvalues(Hypercube(size)).tolist() == pytest.approx(expected, abs=EIGENVALUE_TOLERANCE)


@pytest.mark.parametrize("size", [3, 4, 9, 32])
def test_star_and_complete_gaps(size: int) -> None:
    assert Star(size).spectral_gap == pytest.approx(1 / size, abs=EIGENVALUE_TOLERANCE)
    assert Complete(size).spectral_gap == 1


@pytest.mark.parametrize("size", [2, 4, 6, 8, 10, 12, 16, 20, 32, 64])
def test_static_exponential_gap_for_even_numbers(size: int) -> None:
    assert Exponential(size).spectral_gap == pytest.approx(2 / (1 + ceil(log2(size))), abs=EIGENVALUE_TOLERANCE)


@pytest.mark.parametrize("size", [3, 5, 6, 10])
def test_gap_of_a_time_varying_topology_is_per_round(size: int) -> None:
    graph = OnePeerExponential(size)
    product = torch.eye(size, dtype=torch.float64)
    for step in range(graph.period):
        product = graph.mixing_matrix(step) @ product
    norm = torch.linalg.matrix_norm(product - 1 / size, ord=2).item()
    assert graph.spectral_gap == pytest.approx(1 - norm ** (1 / graph.period), abs=EIGENVALUE_TOLERANCE)


@pytest.mark.parametrize("size", [7, 8, 12])
def test_lazy_halves_the_gap_of_a_slow_graph(size: int) -> None:
    for eager, lazy in (
        (Ring(size), Ring(size, lazy=True)),
        (FromGraph(nx.path_graph(size)), FromGraph(nx.path_graph(size), lazy=True)),
    ):
        expected = (torch.eye(size, dtype=torch.float64) + eager.mixing_matrix()) / 2
        # The same sum, rounded once more or less.
        assert torch.allclose(lazy.mixing_matrix(), expected, rtol=0, atol=1e-15)
        assert lazy.spectral_gap == pytest.approx(eager.spectral_gap / 2, abs=EIGENVALUE_TOLERANCE)


def test_matchings_are_projectors() -> None:
    for topology in (HypercubeMatching(8), AlternatingMatching(6), RandomMatching(7)):
        for step in steps(topology):
            matrix = topology.mixing_matrix(step)
            assert torch.equal(matrix @ matrix, matrix)
        assert topology.smallest_eigenvalue == pytest.approx(0, abs=EIGENVALUE_TOLERANCE)


def test_alternating_matching_gap() -> None:
    # Two projectors: the norm of their product on the non-constant vectors is the cosine of the smallest angle
    # between their ranges; for pairs along a ring of n that is cos(2 pi / n). Zero at n = 4, where the root turns an
    # error of 1e-16 into 1e-8.
    for size in (4, 6, 8, 12):
        expected = 1 - sqrt(abs(cos(2 * pi / size)))
        assert AlternatingMatching(size).spectral_gap == pytest.approx(expected, abs=1e-7)


def test_own_matrix_is_kept_as_given() -> None:
    matrix = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.75, 0.0], [0.25, 0.0, 0.75]], dtype=torch.float64)
    for given in (matrix, matrix.numpy(), matrix.tolist()):
        assert torch.equal(FromMatrix(given).mixing_matrix(), matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_what_rounding_and_solvers_leave_in_an_own_matrix_is_taken_away(dtype: torch.dtype) -> None:
    ring, shift = Ring(8).mixing_matrix(), torch.eye(4, dtype=torch.float64).roll(1, 0)
    exact = [ring, shift, Complete(5).mixing_matrix()] if dtype != torch.int64 else [shift]
    for matrix in exact:
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noisy = [matrix] if dtype == torch.int64 else [matrix + size * noise for size in (0.0, 2e-16, 1e-10, 1e-8)]
        for given in noisy:
            for form in (given.to(dtype), given.to(dtype).numpy(), given.to(dtype).tolist()):
                topology = FromMatrix(form)
                assert torch.allclose(topology.mixing_matrix(), matrix, rtol=0, atol=2e-7)
                sums = torch.cat([topology.mixing_matrix().sum(0), topology.mixing_matrix().sum(1)])
                assert torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
                assert topology.is_symmetric == torch.equal(matrix, matrix.t())
                assert torch.equal(topology.mixing_matrix() > 0, matrix > 0)


def test_own_graph_gets_metropolis_weights() -> None:
    path = FromGraph([(0, 1), (2, 1), (1, 2)])
    expected = torch.tensor([[2, 1, 0], [1, 1, 1], [0, 1, 2]], dtype=torch.float64) / 3
    assert torch.allclose(path.mixing_matrix(), expected, rtol=0, atol=1e-15)
    named = nx.Graph([("a", "b"), ("b", "c")])
    assert FromGraph(named) == path


def test_answers_do_not_share_memory() -> None:
    ring = Ring(4)
    ring.mixing_matrix().zero_()
    ring.weights(0, 0).clear()
    assert ring.mixing_matrix().sum() == pytest.approx(4)
    assert len(ring.weights(0, 0)) == 3
