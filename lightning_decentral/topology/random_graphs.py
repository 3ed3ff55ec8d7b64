"""Random graphs that stay the same: every worker with as many random neighbours, and a ring with shortcuts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import final

import networkx as nx

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractPeriodicTopology
from lightning_decentral.topology.rows import Row, lazy_rows, metropolis_rows, uniform_rows
from lightning_decentral.topology.validation import require_bool, require_integer, require_workers

_DRAWS = 10_000  # until a graph is connected and has no edge twice: of a random regular one nearly always a few do
_USUAL_DEGREE = 4


@final
@dataclass(frozen=True)
class RandomRegular(AbstractPeriodicTopology):
    r"""A random graph in which every worker has as many neighbours, with weights `W = (I + A) / (degree + 1)`.

    It is drawn again until it is connected. W is symmetric, and its rate follows from the second-largest eigenvalue of
    the neighbours' matrix A, which for nearly all such graphs of many workers is close to `2 sqrt(degree - 1)`, the
    least that is possible: `1 - gap` is close to `(1 + 2 sqrt(degree - 1)) / (degree + 1)`, however many workers there
    are.

    Cost: `degree` messages sent per worker and step.

    Args:
        size: number of workers, at least 2.
        degree: neighbours of each worker, at most n - 1; at least 2, or 1 of two workers. With an odd number of workers
            it has to be even. 0: 4, or n - 1 of at most four.
        seed: number that all workers must share.
        lazy: use `(I + W) / 2`: no negative eigenvalues, about half the gap. For D2.

    Raises:
        TopologyError: for another degree, or one that no graph of so many workers has.

    Example:
        >>> from lightning_decentral.topology import RandomRegular
        >>> graph = RandomRegular(16, degree=4, seed=1)
        >>> {len(graph.out_neighbors(rank)) for rank in range(16)}
        {4}
        >>> RandomRegular(16, degree=15).spectral_gap
        1.0

    References:
        Joel Friedman. *A Proof of Alon's Second Eigenvalue Conjecture.* STOC 2003, arXiv:cs/0405020.
    """

    degree: int = 0
    seed: int = 0
    lazy: bool = False

    def _prepare(self) -> None:
        require_workers("RandomRegular", self.size, 2, "Use Complete(1): with one worker there is nothing to exchange.")
        require_integer("RandomRegular", "degree", self.degree)
        require_integer("RandomRegular", "seed", self.seed)
        require_bool("RandomRegular", "lazy", self.lazy)
        least = min(2, self.size - 1)
        if self.degree and not least <= self.degree < self.size:
            raise TopologyError(
                f"RandomRegular of {self.size} workers needs a degree from {least} to {self.size - 1}, or 0 for the "
                f"default, got {self.degree}. Use {min(_USUAL_DEGREE, self.size - 1)}, or RandomMatching for one peer."
            )
        if self._neighbors * self.size % 2:
            raise TopologyError(
                f"RandomRegular with an odd number of workers, {self.size}, needs an even degree, got {self.degree}: "
                f"every link has two ends. Use {self.degree - 1} or {self.degree + 1}."
            )

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    @property
    def _neighbors(self) -> int:
        return self.degree or min(_USUAL_DEGREE, self.size - 1)

    @cached_property
    def links(self) -> tuple[tuple[int, int], ...]:
        """The pairs of neighbours, sorted."""
        size, degree = self.size, self._neighbors
        if 2 * degree >= size:  # of a dense graph the one of those that are no neighbours is drawn
            for draw in range(_DRAWS):
                left_out = _regular(size, size - 1 - degree, Random(f"random regular {self.seed} {draw}"))
                links = {(a, b) for a in range(size) for b in range(a + 1, size)} - (left_out or set())
                if left_out is not None and _is_connected(size, links):
                    return tuple(sorted(links))
        for draw in range(_DRAWS):
            found = _regular(size, degree, Random(f"random regular {self.seed} {draw}"))
            if found is not None and _is_connected(size, found):
                return tuple(sorted(found))
        raise TopologyError(
            f"RandomRegular({size}, degree={degree}, seed={self.seed}) found no connected graph in {_DRAWS} draws. Use "
            "another seed or degree."
        )

    def _rows(self, step: int) -> tuple[Row, ...]:
        rows = uniform_rows(_neighbors(self.size, self.links))
        return lazy_rows(rows) if self.lazy else rows


@final
@dataclass(frozen=True)
class SmallWorld(AbstractPeriodicTopology):
    r"""A ring in which everybody knows the nearest few, and some links lead far away instead (Watts, Strogatz, 1998).

    Each link from a worker to one of the `degree / 2` that follow it is given, with the probability `rewired`, another
    end, which is nobody that it knows already; the graph is drawn again until it is connected. Weights are those of
    `FromGraph` (Metropolis-Hastings). Few long links make a ring fast, and most links stay short: for workers in a row,
    of which near ones are near in the network.

    With `rewired=0` W is circulant, and its eigenvalues are `(1 + 2 sum_m cos(2 pi j m / n)) / (degree + 1)` over
    `m = 1, ..., degree / 2`.

    Cost: `degree` messages sent per worker and step on average; the best-connected worker sets the pace.

    Args:
        size: number of workers, at least 3.
        degree: mean number of neighbours, even and below n. 0: 4, or 2 of three and four workers.
        rewired: the share of links that lead far away, in [0, 1].
        seed: number that all workers must share.

    Raises:
        TopologyError: for other numbers.

    Example:
        >>> from lightning_decentral.topology import SmallWorld
        >>> ring, small_world = SmallWorld(32, rewired=0.0), SmallWorld(32)
        >>> len(ring.edges()) == len(small_world.edges())
        True
        >>> small_world.spectral_gap > 2 * ring.spectral_gap
        True

    References:
        Duncan J. Watts, Steven H. Strogatz. *Collective dynamics of 'small-world' networks.* Nature 393, 1998.
    """

    degree: int = 0
    rewired: float = 0.2
    seed: int = 0

    def _prepare(self) -> None:
        require_workers("SmallWorld", self.size, 3, "Use Complete(2): two workers have one link.")
        require_integer("SmallWorld", "degree", self.degree)
        require_integer("SmallWorld", "seed", self.seed)
        if self.degree and (self.degree % 2 or not 2 <= self.degree < self.size):
            raise TopologyError(
                f"SmallWorld of {self.size} workers needs an even degree from 2 to {self.size - 1}, or 0 for the "
                f"default, got {self.degree}. Use {self._usual}."
            )
        if isinstance(self.rewired, bool) or not (isinstance(self.rewired, int | float) and 0.0 <= self.rewired <= 1.0):
            raise TopologyError(f"SmallWorld needs a share of rewired links in [0, 1], got {self.rewired!r}. Use 0.2.")

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    @property
    def _usual(self) -> int:
        return _USUAL_DEGREE if self.size > _USUAL_DEGREE else 2

    @cached_property
    def links(self) -> tuple[tuple[int, int], ...]:
        """The pairs of neighbours, sorted."""
        for draw in range(_DRAWS):
            found = _rewired(
                self.size, self.degree or self._usual, self.rewired, Random(f"small world {self.seed} {draw}")
            )
            if _is_connected(self.size, found):
                return tuple(sorted(found))
        raise TopologyError(
            f"{self!r} found no connected graph in {_DRAWS} draws. Use a larger degree, or rewire fewer links."
        )

    def _rows(self, step: int) -> tuple[Row, ...]:
        return metropolis_rows(_neighbors(self.size, self.links))


def _regular(size: int, degree: int, draw: Random) -> set[tuple[int, int]] | None:
    """Draw a regular graph, or nothing where no two of the ends that are left may meet (Steger, Wormald, 1999)."""
    found: set[tuple[int, int]] = set()
    ends = [rank for rank in range(size) for _ in range(degree)]
    while ends:
        draw.shuffle(ends)
        left = []
        for a, b in zip(ends[0::2], ends[1::2], strict=True):
            link = (min(a, b), max(a, b))
            if a == b or link in found:
                left += [a, b]
            else:
                found.add(link)
        distinct = sorted(set(left))
        if left and all((a, b) in found for place, a in enumerate(distinct) for b in distinct[place + 1 :]):
            return None
        ends = left
    return found


def _rewired(size: int, degree: int, share: float, draw: Random) -> set[tuple[int, int]]:
    """Give some links of a ring of near neighbours another end."""
    lattice = [(rank, (rank + far) % size) for far in range(1, degree // 2 + 1) for rank in range(size)]
    known: list[set[int]] = [set() for _ in range(size)]
    for a, b in lattice:
        known[a].add(b)
        known[b].add(a)
    for a, b in lattice:
        if draw.random() >= share or len(known[a]) >= size - 1:
            continue
        new = draw.choice([rank for rank in range(size) if rank != a and rank not in known[a]])
        known[a].remove(b)
        known[b].remove(a)
        known[a].add(new)
        known[new].add(a)
    return {(a, b) for a in range(size) for b in known[a] if a < b}


def _neighbors(size: int, links: tuple[tuple[int, int], ...]) -> list[list[int]]:
    neighbors: list[list[int]] = [[] for _ in range(size)]
    for a, b in links:
        neighbors[a].append(b)
        neighbors[b].append(a)
    return neighbors


def _is_connected(size: int, links: set[tuple[int, int]]) -> bool:
    graph = nx.Graph(links)
    return len(graph) == size and nx.is_connected(graph)
