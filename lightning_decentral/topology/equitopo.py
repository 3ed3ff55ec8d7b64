"""EquiTopo: graphs of random shifts, whose rate does not depend on the number of workers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import ceil, cos, log2, pi, sqrt
from random import Random
from typing import final

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractPeriodicTopology, AbstractTopology
from lightning_decentral.topology.rows import Row
from lightning_decentral.topology.spectrum import rounds_until_unrepeated
from lightning_decentral.topology.validation import require_bool, require_integer, require_workers

_ALONE = "Use Complete(1): with one worker there is nothing to exchange."


@final
@dataclass(frozen=True)
class EquiStatic(AbstractPeriodicTopology):
    r"""Worker i receives from `i + u (mod n)` for a few random shifts u: `W = sum_u ((n-1)/n S_u + I/n) / M`.

    With a number M of shifts that grows like log n, `||W - J||_2` is below a constant, whatever n is. W is circulant:
    `||W - J||_2` is the largest of `|1/n + (n-1)/(nM) sum_u exp(2 pi i j u / n)|` over `j = 1, ..., n - 1`.

    Cost: M messages sent per worker and step; up to 2 M if symmetric.

    Args:
        size: number of workers, at least 2.
        degree: the paper's M, from 1 to n - 1. 0: `ceil(log2 n)`.
        symmetric: use `(W + W^T) / 2`, the paper's U-EquiStatic; otherwise D-EquiStatic.
        seed: number that all workers must share.

    Example:
        >>> from lightning_decentral.topology import EquiStatic
        >>> graph = EquiStatic(16, seed=1)
        >>> len(graph.in_neighbors(0)), round(graph.spectral_gap, 2)
        (4, 0.16)
        >>> EquiStatic(6, degree=5).spectral_gap  # all shifts: the complete graph
        1.0

    References:
        Song, Li, Jin, Shi, Yan, Yin, Yuan, *Communication-Efficient Topologies for Decentralized Learning with O(1)
        Consensus Rate*, NeurIPS 2022, arXiv:2210.07881. There a shift may be drawn twice; here all are different.
    """

    degree: int = 0
    symmetric: bool = False
    seed: int = 0

    def _prepare(self) -> None:
        require_workers("EquiStatic", self.size, 2, _ALONE)
        require_integer("EquiStatic", "degree", self.degree)
        require_integer("EquiStatic", "seed", self.seed)
        require_bool("EquiStatic", "symmetric", self.symmetric)
        if not 0 <= self.degree < self.size:
            raise TopologyError(
                f"EquiStatic needs a degree from 1 to {self.size - 1}, or 0 for the default, got {self.degree}. Use "
                "fewer, or Complete."
            )

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """The random shifts u."""
        degree = self.degree or min(ceil(log2(self.size)), self.size - 1)
        return tuple(sorted(Random(f"equitopo {self.seed}").sample(range(1, self.size), degree)))

    def _rows(self, step: int) -> tuple[Row, ...]:
        n, share = self.size, (self.size - 1) / self.size / len(self.shifts)
        return tuple(_row(rank, n, dict.fromkeys(self.shifts, share), self.symmetric) for rank in range(n))


@final
@dataclass(frozen=True)
class OnePeerEqui(AbstractTopology):
    r"""In each step all workers receive from the same random distance: `x_i <- (1 - c) x_i + c x_j`, `j = i + u (mod
    n)`.

    The paper's OD-EquiDyn, with `c = eta (n - 1) / n`. What step t draws comes from `(seed, t)`, so that workers agree
    on it without a message; the rounds never repeat (`period` is 0). The expected squared distance from consensus
    shrinks in each by `(1 - c)^2 + c^2 - 2 c (1 - c) / (n - 1)`, which is about 1/2 whatever n is.

    With ``symmetric=True``, the paper's OU-EquiDyn, workers at that distance meet in pairs: from a random worker on,
    each that is free takes the one at distance u, if that is free, too. At most one in three stays alone. The factor is
    `1 - 2 c (1 - c) min_k sum_u q_u (1 - cos(2 pi k u / n))` over `k = 1, ..., n - 1`, with `q_u` the probability that
    a worker meets the one at distance u; about 0.6.

    Cost: 1 message sent and 1 received per worker and step.

    Args:
        size: number of workers, at least 2.
        eta: in (0, 1): how much of what comes is taken; 0.5, the published runs have 0.53.
        seed: number that all workers must share.
        symmetric: whether workers exchange in pairs.

    Example:
        >>> from lightning_decentral.topology import OnePeerEqui
        >>> graph = OnePeerEqui(16)
        >>> graph.period, round(graph.spectral_gap, 3)
        (0, 0.315)
        >>> round(OnePeerEqui(16, symmetric=True).spectral_gap, 3)
        0.264

    References:
        Song, Li, Jin, Shi, Yan, Yin, Yuan, *Communication-Efficient Topologies for Decentralized Learning with O(1)
        Consensus Rate*, NeurIPS 2022, arXiv:2210.07881.
    """

    eta: float = 0.5
    seed: int = 0
    symmetric: bool = False

    def _prepare(self) -> None:
        require_workers("OnePeerEqui", self.size, 2, _ALONE)
        require_integer("OnePeerEqui", "seed", self.seed)
        require_bool("OnePeerEqui", "symmetric", self.symmetric)
        if not (isinstance(self.eta, int | float) and 0.0 < self.eta < 1.0):
            raise TopologyError(f"OnePeerEqui needs eta in (0, 1), got {self.eta!r}. Use 0.5.")

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 0, as they never do."""
        return 0

    @property
    def _taken(self) -> float:
        return self.eta * (self.size - 1) / self.size

    def _rows(self, step: int) -> tuple[Row, ...]:
        draw = Random(f"equitopo {self.seed} {step}")
        shift = draw.randrange(1, self.size)
        if not self.symmetric:
            return tuple(_row(rank, self.size, {shift: self._taken}, symmetric=False) for rank in range(self.size))
        rows: list[Row] = [{rank: 1.0} for rank in range(self.size)]
        for a, b in _pairs(self.size, shift, draw.randrange(self.size)):
            for one, other in ((a, b), (b, a)):
                rows[one] = dict(sorted({one: 1.0 - self._taken, other: self._taken}.items()))
        return tuple(rows)

    def peers(self, rank: int) -> tuple[int, ...]:
        """Everyone else: every distance comes sooner or later."""
        self._require_rank(rank)
        return tuple(other for other in range(self.size) if other != rank)

    @property
    def is_symmetric(self) -> bool:
        """Whether W equals its transpose: with more than two workers only if they meet in pairs."""
        return self.symmetric or self.size == 2

    @property
    def is_connected(self) -> bool:
        """Whether everybody hears of everybody: yes, every distance comes sooner or later."""
        return True

    @property
    def is_bipartite(self) -> bool:
        """Whether workers fall into two halves that only talk to each other: not with more than two."""
        return self.size == 2

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue: `1 - 2 c` in pairs.

        Raises:
            TopologyError: if W is not symmetric.
        """
        if not self.is_symmetric:
            raise TopologyError(
                "smallest_eigenvalue needs a symmetric mixing matrix, got the directed OnePeerEqui. Use "
                "OnePeerEqui(symmetric=True), or another undirected topology such as Ring or RandomMatching."
            )
        return 1 - 2 * self._taken

    @cached_property
    def spectral_gap(self) -> float:
        """The gap `1 - sqrt(lambda_max(E[W^T W] - J))`: the mean-square factor of one round, in closed form."""
        n, c = self.size, self._taken
        if not self.symmetric:
            return 1 - sqrt((1 - c) ** 2 + c**2 - 2 * c * (1 - c) / (n - 1))
        # As every start is equally likely, a worker meets that at distance u as often as there are pairs.
        met = {shift: len(_pairs(n, shift, 0)) / n / (n - 1) for shift in range(1, n)}
        mean = min(
            sum(2 * often * (1 - cos(2 * pi * k * shift / n)) for shift, often in met.items())
            for k in range(1, n // 2 + 1)
        )
        return 1 - sqrt(1 - 2 * c * (1 - c) * mean)

    def rounds_to_consensus(self, tolerance: float = 1e-3) -> int | float:
        """Rounds until consensus with the shifts of this seed, from step 0; another seed may need a few more."""
        matrices = (self.mixing_matrix(step) for step in count())
        return rounds_until_unrepeated(self.size, matrices, tolerance)


def _pairs(size: int, shift: int, start: int) -> list[tuple[int, int]]:
    """Pair workers at one distance, from one of them on: each that is free with the next, if it is free."""
    free = [True] * size
    pairs = []
    for one in (*range(start, size), *range(start)):
        other = (one + shift) % size
        if free[one] and free[other]:
            free[one] = free[other] = False
            pairs.append((one, other))
    return pairs


def _row(rank: int, size: int, shares: dict[int, float], symmetric: bool) -> Row:
    """Tell what a worker takes of those at some distances, and of itself."""
    row: Row = {}
    for shift, share in shares.items():
        for distance in (shift, -shift) if symmetric else (shift,):
            source = (rank + distance) % size
            row[source] = row.get(source, 0.0) + (share / 2 if symmetric else share)
    row[rank] = 1 - sum(row.values())
    return dict(sorted(row.items()))
