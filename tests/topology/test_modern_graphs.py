"""Proved here: base-(k+1) graphs are exact after a period, for any number of workers and peers, within the bound of
their paper; the rates of EquiTopo and of one peer at a random distance are their closed forms; directed rounds are
column stochastic, and push-sum on them comes to the mean at the rate that is stated; the fastest weights of a graph are
as fast as closed forms of the optimum say; MATCHA's draws, weight and probabilities are those of its paper."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Sequence

import networkx as nx
import pytest
import torch
from reference import methods
from reference.runs import assert_steps_equal

from lightning_decentral.algorithms import SGP
from lightning_decentral.errors import TopologyError
from lightning_decentral.topology import (
    BaseGraph,
    DirectedRounds,
    EquiStatic,
    FastestGraph,
    FromGraph,
    Matcha,
    OnePeerEqui,
)

ROUNDS = DirectedRounds([[[1, 2], [], [3], []], [[], [2], [], [0]], [[], [3], [0, 1], [1]]])


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_base_graphs_are_exact_after_a_period_for_any_number_of_workers(degree: int) -> None:
    for size in [*range(2, 41), 63, 97]:
        graph = BaseGraph(size, degree)
        product = torch.eye(size, dtype=torch.float64)
        for step in range(graph.period):
            product = graph.mixing_matrix(step) @ product
            assert max(len(graph.in_neighbors(rank, step)) for rank in range(size)) <= degree
        assert graph.is_symmetric
        assert float((product - 1 / size).abs().max()) < 1e-12, size
        assert graph.period <= 2 * math.log(size, degree + 1) + 2
        assert graph.spectral_gap == 1.0


def test_a_power_of_two_takes_as_long_as_a_hypercube() -> None:
    assert [BaseGraph(size).period for size in (2, 4, 8, 16, 32)] == [1, 2, 3, 4, 5]
    assert BaseGraph(9, degree=2).period == 2


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [5, 12, 33])
def test_the_rate_of_equitopo_is_its_closed_form(size: int, symmetric: bool) -> None:
    graph = EquiStatic(size, symmetric=symmetric, seed=3)
    sums = [
        sum(cmath.exp(2j * math.pi * j * u / size) for u in graph.shifts) / len(graph.shifts) for j in range(1, size)
    ]
    eigenvalues = [1 / size + (size - 1) / size * (each.real if symmetric else each) for each in sums]
    assert graph.spectral_gap == pytest.approx(1 - max(map(abs, eigenvalues)), abs=1e-12)
    assert graph.is_symmetric == symmetric
    torch.testing.assert_close(graph.mixing_matrix().sum(0), torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [2, 7, 16])
def test_the_rate_of_a_random_distance_is_its_closed_form(size: int) -> None:
    graph = OnePeerEqui(size, eta=0.53)
    c, identity = 0.53 * (size - 1) / size, torch.eye(size, dtype=torch.float64)
    matrices = [(1 - c) * identity + c * identity.roll(u, 1) for u in range(1, size)]  # all are equally likely
    drawn = [graph.mixing_matrix(step) for step in range(40)]
    assert all(any(torch.allclose(one, matrix) for matrix in matrices) for one in drawn)
    expected = torch.stack([matrix.T @ matrix for matrix in matrices]).mean(0) - 1 / size
    assert graph.spectral_gap == pytest.approx(1 - float(torch.linalg.eigvalsh(expected)[-1]) ** 0.5, abs=1e-12)
    assert graph.rounds_to_consensus() < 40


@pytest.mark.parametrize("size", [2, 3, 9, 12])
def test_the_rate_of_pairs_at_a_random_distance_is_its_closed_form(size: int) -> None:
    graph = OnePeerEqui(size, eta=0.53, symmetric=True)
    share = 0.53 * (size - 1) / size
    matrices = []  # of all shifts and starts, which are equally likely
    for shift in range(1, size):
        for start in range(size):
            matrix, met = torch.eye(size, dtype=torch.float64), [False] * size
            for one in [*range(start, size), *range(start)]:
                other = (one + shift) % size
                if not (met[one] or met[other]):
                    met[one] = met[other] = True
                    matrix[one, one] = matrix[other, other] = 1 - share
                    matrix[one, other] = matrix[other, one] = share
            matrices.append(matrix)
    for step in range(40):
        drawn = graph.mixing_matrix(step)
        assert any(torch.allclose(drawn, matrix) for matrix in matrices)
    expected = torch.stack([matrix @ matrix for matrix in matrices]).mean(0) - 1 / size
    assert graph.spectral_gap == pytest.approx(1 - float(torch.linalg.eigvalsh(expected)[-1]) ** 0.5, abs=1e-12)
    assert graph.smallest_eigenvalue == pytest.approx(min(float(torch.linalg.eigvalsh(m)[0]) for m in matrices))


def _laplacian(matching: tuple[tuple[int, int], ...], size: int) -> torch.Tensor:
    incidence = torch.zeros(len(matching), size, dtype=torch.float64)
    for row, (a, b) in zip(incidence, matching, strict=True):
        row[a], row[b] = 1.0, -1.0
    return incidence.T @ incidence


@pytest.mark.parametrize("graph", [nx.barbell_graph(3, 0), nx.petersen_graph(), nx.wheel_graph(6)])
def test_matcha_draws_matchings_and_its_rate_is_that_of_all_draws(graph: nx.Graph) -> None:
    matcha, size = Matcha(graph, seed=1), len(graph)
    assert sorted(edge for matching in matcha.matchings for edge in matching) == list(FromGraph(graph).graph)
    for matching in matcha.matchings:
        ranks = [rank for edge in matching for rank in edge]
        assert len(set(ranks)) == len(ranks)
    assert sum(matcha.probabilities) == pytest.approx(0.5 * len(matcha.matchings), abs=0.01)
    laplacians = [_laplacian(matching, size) for matching in matcha.matchings]
    identity = torch.eye(size, dtype=torch.float64)

    def factor(weight: float) -> float:
        expected = torch.zeros(size, size, dtype=torch.float64)
        for used in itertools.product([False, True], repeat=len(laplacians)):
            odds = math.prod(p if one else 1 - p for p, one in zip(matcha.probabilities, used, strict=True))
            drawn = sum((each for each, one in zip(laplacians, used, strict=True) if one), torch.zeros_like(expected))
            expected += odds * (identity - weight * drawn).matrix_power(2)
        return float(torch.linalg.eigvalsh(expected - 1 / size)[-1])

    assert matcha.spectral_gap == pytest.approx(1 - factor(matcha.alpha) ** 0.5, abs=1e-9)
    others = [matcha.alpha * scale for scale in (0.9, 0.95)]  # more may be more than the busiest worker has
    assert all(factor(weight) >= factor(matcha.alpha) - 1e-4 for weight in others)


def test_matcha_has_the_best_probabilities_and_draws_by_them() -> None:
    graph = Matcha([(0, 1), (1, 2), (0, 2), (2, 3)], budget=0.6)
    laplacians = torch.stack([_laplacian(matching, 4) for matching in graph.matchings])

    def connected(probabilities: Sequence[float]) -> float:
        mean = (torch.tensor(probabilities, dtype=torch.float64)[:, None, None] * laplacians).sum(0)
        return float(torch.linalg.eigvalsh(mean)[1])

    grid = [(a / 40, b / 40) for a in range(41) for b in range(41)]
    best = max(connected((a, b, 1.8 - a - b)) for a, b in grid if 0 <= 1.8 - a - b <= 1)
    assert connected(graph.probabilities) > 0.99 * best
    for matching, probability in zip(graph.matchings, graph.probabilities, strict=True):
        (a, b), steps = matching[0], 600
        often = sum(b in graph.in_neighbors(a, step) for step in range(steps)) / steps
        assert abs(often - probability) < 4 * (0.25 / steps) ** 0.5
    whole = Matcha(nx.cycle_graph(8), budget=1.0)
    assert torch.equal(whole.mixing_matrix(0), whole.mixing_matrix(7))


def test_directed_rounds_are_column_stochastic_and_correct_for_push_sum() -> None:
    product = torch.eye(4, dtype=torch.float64)
    for step in range(3):
        matrix = ROUNDS.mixing_matrix(step)
        torch.testing.assert_close(matrix.sum(0), torch.ones(4, dtype=torch.float64))
        product = matrix @ product
    second = torch.linalg.eigvals(product).abs().sort(descending=True).values[1]
    assert ROUNDS.spectral_gap == pytest.approx(1 - float(second) ** (1 / 3), abs=1e-9)
    assert_steps_equal(SGP(ROUNDS), methods.sgp, 4)
    assert_steps_equal(SGP(ROUNDS, overlap=2), methods.sgp, 4, overlap=2)


def _by_laplacian(smallest: float, largest: float) -> float:
    """Of the best weight that all edges have: the optimum where all edges are alike."""
    return (largest - smallest) / (largest + smallest)


@pytest.mark.parametrize(
    ("graph", "norm"),
    [
        (nx.path_graph(4), math.cos(math.pi / 4)),
        (nx.path_graph(9), math.cos(math.pi / 9)),
        (nx.star_graph(4), 3 / 4),  # weights of 1/4: more would be negative at the centre
        (nx.petersen_graph(), _by_laplacian(2, 5)),
        (nx.cycle_graph(5), _by_laplacian(2 - 2 * math.cos(0.4 * math.pi), 2 - 2 * math.cos(0.8 * math.pi))),
        (nx.complete_graph(4), 0.0),
    ],
    ids=["path of 4", "path of 9", "star", "petersen", "ring", "complete"],
)
def test_the_fastest_weights_are_as_fast_as_the_closed_form(graph: nx.Graph, norm: float) -> None:
    fastest = FastestGraph(graph)
    # The optimum of a smooth bound, which is ln(2 n) / 10000 above the norm at most, and weights rounded to 1e-6.
    assert -1e-9 <= 1 - fastest.spectral_gap - norm <= 4e-4 + 1e-5
    assert fastest.is_symmetric


def test_the_fastest_weights_are_faster_where_edges_are_not_alike() -> None:
    graph = nx.barbell_graph(4, 0)
    assert FastestGraph(graph).spectral_gap > 1.4 * FromGraph(graph).spectral_gap


def test_what_they_refuse() -> None:
    with pytest.raises(TopologyError, match="needs a way from every worker to all others"):
        DirectedRounds([[[1], []], [[1], []]])
    with pytest.raises(TopologyError, match=r"rounds for one number of workers, got rounds for \[2, 3\]"):
        DirectedRounds([[[1], [0]], [[1], [2], [0]]])
    with pytest.raises(TopologyError, match="degree from 1 to 3"):
        EquiStatic(4, degree=4)
    with pytest.raises(TopologyError, match="degree of at least 1, got 0"):
        BaseGraph(4, 0)
    with pytest.raises(TopologyError, match="budget above 0 and at most 1, got 0"):
        Matcha(nx.cycle_graph(4), budget=0)
