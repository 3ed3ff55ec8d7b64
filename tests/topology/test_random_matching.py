"""Proved here: random pairings are agreed on without communication, differ between steps and seeds, are uniform, and
contract as fast as their closed form says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lightning_decentral.topology import RandomMatching


@pytest.mark.parametrize("size", [2, 5, 8])
def test_equal_seeds_pair_equally_on_separate_instances(size: int) -> None:
    one, other = RandomMatching(size, seed=7), RandomMatching(size, seed=7)
    forwards = [one.edges(step) for step in range(100)]
    backwards = [other.edges(step) for step in reversed(range(100))][::-1]  # more steps than are kept in memory
    assert forwards == backwards


def test_steps_and_seeds_differ() -> None:
    pairings = {str(RandomMatching(16, seed).edges(step)) for seed in range(5) for step in range(20)}
    assert len(pairings) == 100  # 2 million pairings exist: a repetition has probability 0.002, and seeds are fixed


@pytest.mark.parametrize("size", [2, 3, 8, 9])
def test_every_step_is_a_matching(size: int) -> None:
    topology = RandomMatching(size, seed=1)
    for step in range(50):
        partners = [topology.in_neighbors(rank, step) for rank in range(size)]
        assert sum(not partner for partner in partners) == size % 2
        assert all(partners[partner[0]] == (rank,) for rank, partner in enumerate(partners) if partner)


def test_pairings_are_uniform() -> None:
    topology, draws = RandomMatching(4, seed=0), 3000
    counts = Counter(topology.in_neighbors(0, step)[0] for step in range(draws))
    # Three partners, 1000 each; the standard deviation is 26, so 130 is five of them.
    assert all(abs(counts[partner] - draws / 3) < 130 for partner in (1, 2, 3))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_gap_equals_the_mean_over_all_steps(size: int) -> None:
    topology, draws = RandomMatching(size, seed=0), 4000
    second_moment = torch.zeros(size, size, dtype=torch.float64)
    for step in range(draws):
        matrix = topology.mixing_matrix(step)
        second_moment += matrix.T @ matrix / draws
    factor = torch.linalg.matrix_norm(second_moment - 1 / size, ord=2).item()
    # The mean of 4000 matrices with entries of standard deviation at most 0.25 is off by some 0.004 per entry.
    assert (1 - topology.spectral_gap) ** 2 == pytest.approx(factor, abs=0.04)


def test_everyone_else_is_a_peer() -> None:
    assert RandomMatching(5).peers(2) == (0, 1, 3, 4)
    assert RandomMatching(5).period == 0
    assert RandomMatching(5).is_connected
    assert [RandomMatching(size).is_bipartite for size in (2, 3, 4)] == [True, False, False]
