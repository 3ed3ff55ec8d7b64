"""How fast repeated mixing averages: norms of products of mixing matrices, in float64.

``J`` is the matrix with all entries ``1 / n``: multiplying by it replaces every value with the exact mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from math import inf, sqrt

import torch
from torch import Tensor

from lightning_decentral.errors import TopologyError

# A product of doubly stochastic float64 matrices that equals J in exact arithmetic is off by a few 1e-17; its p-th root
# would look like a real contraction factor (1e-17 ** (1/3) = 2e-6), so it counts as zero.
ROUNDING = 1e-13
# Squaring the map of one period this often means 2^40 = 1e12 periods: what has not averaged by then never will.
MAX_DOUBLINGS = 40


def consensus_deviation(size: int) -> Tensor:
    """Return ``I - J``, the distance from consensus before the first round; [size, size]."""
    return torch.eye(size, dtype=torch.float64, device="cpu") - 1 / size


def contraction(matrices: Sequence[Tensor]) -> float:
    """Return ``||W[p-1] ... W[0] - J||_2 ^ (1/p)``, the factor by which one round shrinks the distance from
    consensus."""
    deviation = consensus_deviation(len(matrices[0]))
    for matrix in matrices:
        deviation = matrix @ deviation
    norm = float(torch.linalg.matrix_norm(deviation, ord=2))
    return 0.0 if norm < ROUNDING else norm ** (1 / len(matrices))


def contraction_before(size: int, matrices: Iterable[Tensor], enough: float = 1e-3) -> float:
    """Return the factor per round of the rounds before some step, latest first, until they leave less than enough."""
    deviation, rounds = consensus_deviation(size), 0
    for matrix in matrices:
        deviation = deviation @ matrix
        rounds += 1
        if float(torch.linalg.matrix_norm(deviation)) < enough:
            break
    norm = float(torch.linalg.matrix_norm(deviation, ord=2))
    return 0.0 if norm < ROUNDING else norm ** (1 / rounds)


def push_sum_contraction(matrices: Sequence[Tensor]) -> float:
    """Return the second-largest absolute eigenvalue of ``W[p-1] ... W[0]``, per round, of weights whose columns sum
    to one."""
    product = torch.eye(len(matrices[0]), dtype=torch.float64, device="cpu")
    for matrix in matrices:
        product = matrix @ product
    sizes = torch.linalg.eigvals(product).abs().sort(descending=True).values
    second = float(sizes[1]) if len(sizes) > 1 else 0.0
    return 0.0 if second < ROUNDING else second ** (1 / len(matrices))


def rounds_until(matrices: Sequence[Tensor], tolerance: float) -> int | float:
    """Smallest t with ``||W[t-1] ... W[0] - J||_2 <= tolerance`` when the given rounds repeat for ever.

    The norm never grows with t, so whole periods are skipped by repeated squaring and the rest is counted.
    """
    _require_tolerance(tolerance)
    deviation = consensus_deviation(len(matrices[0]))
    if _norm_at_most(deviation, tolerance):
        return 0
    period_map = deviation
    for matrix in matrices:
        period_map = matrix @ period_map
    powers = [period_map]  # powers[k]: 2^k periods
    while not _norm_at_most(powers[-1], tolerance):
        if len(powers) > MAX_DOUBLINGS:
            return inf
        powers.append(powers[-1] @ powers[-1])
    rounds = 0
    for exponent in reversed(range(len(powers) - 1)):
        further = powers[exponent] @ deviation
        if not _norm_at_most(further, tolerance):
            deviation = further
            rounds += 2**exponent * len(matrices)
    return rounds + _count_rounds(cycle(matrices), deviation, tolerance)


def rounds_until_unrepeated(size: int, matrices: Iterable[Tensor], tolerance: float) -> int:
    """Return the same for an endless stream of rounds that do not repeat; counts them one by one."""
    _require_tolerance(tolerance)
    return _count_rounds(matrices, consensus_deviation(size), tolerance)


def _count_rounds(matrices: Iterable[Tensor], deviation: Tensor, tolerance: float) -> int:
    rounds = 0
    for matrix in matrices:
        if _norm_at_most(deviation, tolerance):
            break
        deviation = matrix @ deviation
        rounds += 1
    return rounds


def _norm_at_most(matrix: Tensor, tolerance: float) -> bool:
    """Tell whether the spectral norm is at most ``tolerance``; the Frobenius norm settles nearly all cases cheaply."""
    frobenius = float(torch.linalg.matrix_norm(matrix))
    if frobenius <= tolerance:
        return True
    if frobenius > sqrt(len(matrix)) * tolerance * (1 + 1e-9):
        return False
    return float(torch.linalg.matrix_norm(matrix, ord=2)) <= tolerance


def _require_tolerance(tolerance: float) -> None:
    if not ROUNDING <= tolerance < 1:
        raise TopologyError(
            f"rounds_to_consensus needs a tolerance between {ROUNDING:g} and 1, got {tolerance}. "
            f"It is the share of the initial disagreement that may remain: use for instance 1e-3."
        )


def pairwise_gap(peers: Sequence[Sequence[int]]) -> float:
    r"""Spectral gap of random pairwise averaging, per step in which every worker that calls makes one call.

    One call averages a random caller i with a random peer j of it. Its matrix is a projector, so the squared distance
    from consensus shrinks on average by ``rho``, the second-largest eigenvalue of the mean matrix
    ``I - mean_ij (e_i - e_j)(e_i - e_j)^T / 2``, and by ``rho^m`` in a step with m callers (Boyd, Ghosh, Prabhakar,
    Shah, *Randomized gossip algorithms*, 2006). The gap is ``1 - rho^(m / 2)``.

    Args:
        peers: by worker: whom it calls, each with the same probability; nobody if it only answers.
    """
    callers = [rank for rank, others in enumerate(peers) if others]
    expected = torch.eye(len(peers), dtype=torch.float64, device="cpu").tolist()
    for rank in callers:
        share = 0.5 / (len(callers) * len(peers[rank]))
        for peer in peers[rank]:
            for row, column, sign in ((rank, rank, -1), (peer, peer, -1), (rank, peer, 1), (peer, rank, 1)):
                expected[row][column] += sign * share
    matrix = torch.tensor(expected, dtype=torch.float64, device="cpu")
    rho = float(torch.linalg.eigvalsh(matrix - 1 / len(peers))[-1])
    return float(1 - max(rho, 0.0) ** (len(callers) / 2))
