"""Undirected topologies in two sides, even and odd ranks, for asynchronous pairwise averaging.

Odd ranks start exchanges and even ranks answer them, so a worker that waits for an answer never owes one: a circle of
workers that wait for each other cannot form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lightning_decentral.topology.base import AbstractPeriodicTopology
from lightning_decentral.topology.rows import Row, metropolis_rows
from lightning_decentral.topology.validation import require_even, require_workers

_ALONE = "Use Complete(1): with one worker there is nothing to exchange."
_ODD = "Add or remove one worker: on an odd circle two workers of the same side would be neighbours."


@final
@dataclass(frozen=True)
class BipartiteRing(AbstractPeriodicTopology):
    r"""A ring whose odd ranks start the exchanges and whose even ranks answer. Weights as in `Ring` (1/3).

    Cost: 2 peers; a pairwise method talks to one of them at a time.

    Args:
        size: number of workers, even, at least 2.

    Example:
        >>> from lightning_decentral.topology import BipartiteRing
        >>> ring = BipartiteRing(6)
        >>> ring.peers(3), [rank for rank in range(6) if ring.initiates(rank)]
        ((2, 4), [1, 3, 5])

    References:
        Lian, Zhang, Zhang, Liu, *Asynchronous Decentralized Parallel Stochastic Gradient Descent*, ICML 2018,
        arXiv:1710.06952.
    """

    odd_ranks_initiate: ClassVar[bool] = True

    def _prepare(self) -> None:
        require_workers("BipartiteRing", self.size, 2, _ALONE)
        require_even("BipartiteRing", self.size, _ODD)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        return metropolis_rows([{(rank - 1) % self.size, (rank + 1) % self.size} for rank in range(self.size)])


@final
@dataclass(frozen=True)
class BipartiteExponential(AbstractPeriodicTopology):
    r"""Neighbours at distance 1 and `1 + 2^i < n` (i >= 1: 3, 5, 9, ...), both ways; odd ranks start, even answer.

    All distances are odd, so every edge joins an odd and an even rank. Undirected, Metropolis-Hastings weights (all
    equal, since all workers have as many neighbours). Up to n = 12 every odd rank meets every even rank.

    Cost: about 2 log2 n peers; a pairwise method talks to one of them at a time.

    Args:
        size: number of workers, even, at least 2.

    Example:
        >>> from lightning_decentral.topology import BipartiteExponential
        >>> BipartiteExponential(32).peers(1)
        (0, 2, 4, 6, 10, 16, 18, 24, 28, 30)

    References:
        Lian, Zhang, Zhang, Liu, *Asynchronous Decentralized Parallel Stochastic Gradient Descent*, ICML 2018,
        arXiv:1710.06952 (bipartite communication). The distances are those commonly used for it; the paper leaves the
        graph open.
    """

    odd_ranks_initiate: ClassVar[bool] = True

    def _prepare(self) -> None:
        require_workers("BipartiteExponential", self.size, 2, _ALONE)
        require_even("BipartiteExponential", self.size, _ODD)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        hops = [1, *(1 + 2**i for i in range(1, self.size.bit_length()) if 1 + 2**i < self.size)]
        return metropolis_rows(
            [{(rank + way * hop) % self.size for hop in hops for way in (-1, 1)} for rank in range(self.size)]
        )
