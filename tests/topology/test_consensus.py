"""Proved here: how many rounds of mixing a topology needs is what multiplying its matrices one by one shows.

The finite-time schedules average exactly, from any starting step, and only for powers of two; D2 is stable exactly
where the description of a topology says that it may be used.
"""

from __future__ import annotations

from math import inf

import pytest
import torch

from lightning_decentral.topology import (
    AbstractTopology,
    AlternatingMatching,
    Complete,
    Exponential,
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


def product(topology: AbstractTopology, first: int, rounds: int) -> torch.Tensor:
    result = torch.eye(topology.size, dtype=torch.float64)
    for step in range(first, first + rounds):
        result = topology.mixing_matrix(step) @ result
    return result


def test_the_gap_of_rounds_that_were_drawn_is_that_of_their_product() -> None:
    graph = RandomMatching(6, seed=3)
    few = torch.linalg.matrix_norm(product(graph, 4, 5) - 1 / 6, ord=2)
    assert graph.gap_over(4, 9) == pytest.approx(1 - float(few) ** (1 / 5))
    taken = next(t for t in range(1, 100) if torch.linalg.matrix_norm(product(graph, 90 - t, t) - 1 / 6) < 1e-3)
    last = torch.linalg.matrix_norm(product(graph, 90 - taken, taken) - 1 / 6, ord=2)
    assert graph.gap_over(0, 90) == pytest.approx(1 - float(last) ** (1 / taken))
    assert graph.gap_over(5, 5) == graph.spectral_gap
    assert OnePeerExponential(6).gap_over(1, 2) == OnePeerExponential(6).spectral_gap


def brute_force_rounds(topology: AbstractTopology, tolerance: float) -> int:
    state, rounds = torch.eye(topology.size, dtype=torch.float64), 0
    while torch.linalg.matrix_norm(state - 1 / topology.size, ord=2) > tolerance:
        state = topology.mixing_matrix(rounds) @ state
        rounds += 1
    return rounds


@pytest.mark.parametrize(
    "each",
    [
        Complete(1),
        Complete(3),
        Ring(3),
        Ring(9),
        Torus(3, 4),
        Star(5),
        Exponential(7),
        OnePeerExponential(6),
        OnePeerExponential(12),
        AlternatingMatching(10),
        HypercubeMatching(8),
        RandomMatching(9),
        RandomMatching(8, seed=3),
        Sites(8),
        Sites(12, sites=3, crossing_period=5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-7])
def test_rounds_to_consensus_equals_brute_force(each: AbstractTopology, tolerance: float) -> None:
    assert each.rounds_to_consensus(tolerance) == brute_force_rounds(each, tolerance)


def test_rounds_to_consensus_over_long_times() -> None:
    # A symmetric static W contracts by the same factor every round, so this has a closed form.
    ring = Ring(64)
    factor = torch.tensor(1 - ring.spectral_gap, dtype=torch.float64)
    expected = torch.ceil(torch.tensor(1e-3, dtype=torch.float64).log() / factor.log())
    assert ring.rounds_to_consensus() == expected


def test_a_permutation_never_agrees() -> None:
    shift = FromMatrix([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert shift.is_connected
    assert shift.rounds_to_consensus() == inf
    assert shift.spectral_gap == pytest.approx(0, abs=1e-12)
    assert "never" in str(shift)


@pytest.mark.parametrize("kind", [OnePeerExponential, HypercubeMatching])
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_exact_average_after_log2_n_rounds(kind: type[OnePeerExponential | HypercubeMatching], size: int) -> None:
    topology = kind(size)
    for first in range(topology.period):
        # Products of halves are exact in binary, so equality is exact, too.
        assert torch.equal(product(topology, first, topology.period), torch.full((size, size), 1 / size).double())
    assert topology.spectral_gap == 1
    assert topology.rounds_to_consensus(1e-12) == topology.period


@pytest.mark.parametrize("size", [3, 6, 12])
def test_no_exact_average_for_other_numbers(size: int) -> None:
    topology = OnePeerExponential(size)
    assert (product(topology, 0, topology.period) - 1 / size).abs().max() > 0.04
    assert topology.spectral_gap < 1


def largest_disagreement_under_d2(topology: AbstractTopology, steps: int = 400) -> float:
    """D2 without gradients, `x(t+1) = W(t) (2 x(t) - x(t-1))`, from random values."""
    before = torch.randn(topology.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    now = topology.mixing_matrix(0) @ before
    for step in range(1, steps):
        before, now = now, topology.mixing_matrix(step) @ (2 * now - before)
    return (now - now.mean(0)).abs().max().item()


@pytest.mark.parametrize(
    "each",
    [
        Complete(4),
        Ring(5),
        Ring(6),
        Ring(8, lazy=True),
        Torus(3, 4),
        Torus(3, 4, lazy=True),
        Hypercube(8),
        Star(5),
        HypercubeMatching(4),
        HypercubeMatching(8),
        AlternatingMatching(8),
    ],
    ids=repr,
)
def test_description_tells_whether_d2_is_stable(each: AbstractTopology) -> None:
    allowed = "D2 may use it" in str(each)
    assert allowed != ("D2 cannot use it" in str(each))
    assert (largest_disagreement_under_d2(each) < 1e-6) == allowed
