"""What a topology is: who sends to whom in which round, and with which weight the values are mixed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology import drawing
from lightning_decentral.topology.rows import Row
from lightning_decentral.topology.spectrum import contraction, contraction_before, push_sum_contraction, rounds_until
from lightning_decentral.topology.validation import STOCHASTIC_TOLERANCE, Stochastic, require_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Rounds that never repeat are drawn again when asked for after this many others: synchronous workers are at most a few
# steps apart, and at 512 workers one round takes about 0.2 MB.
UNREPEATED_ROUNDS_KEPT = 32


@dataclass(frozen=True)
class _Round:
    """One round, ready for the questions asked at every training step; all tuples are indexed by rank."""

    rows: tuple[Row, ...]
    sources: tuple[tuple[int, ...], ...]
    destinations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class AbstractTopology(ABC):
    r"""A communication graph with mixing weights, possibly a different one at every step. Pure data.

    One gossip round replaces the value of worker i with the weighted average of what it receives (and its own):

    $$x_i \leftarrow \sum_j W[i, j]\, x_j$$

    `W[i, j]` is the weight worker i gives to what it receives from j. W is *doubly stochastic* (rows and columns sum to
    one), so that equal values stay equal and a round never changes their mean; it need not be symmetric. Or it is
    *column stochastic* alone, as the weights of push-sum on directed graphs: the sum stays, and methods correct what
    the rows lack by a weight that travels along. A method says which it needs.

    A topology never communicates and holds no state: two workers that build it from the same arguments agree on every
    round, and one object may serve many virtual workers. It is hashable, comparable and picklable, and its `repr` is
    what a log or a configuration file says.

    To write your own, derive from `AbstractPeriodicTopology`, as a frozen dataclass, and implement
    `_prepare`, `period` and `_rows`; weights are checked when an instance is built.

    Attributes:
        size: number of workers n.
        odd_ranks_initiate: whether only odd ranks start pairwise exchanges (see `initiates`).
        stochastic: whether rows and columns of every W sum to one, ``"doubly"``, or only the columns, ``"column"``.
    """

    odd_ranks_initiate: ClassVar[bool] = False
    stochastic: ClassVar[Stochastic] = "doubly"

    size: int

    @abstractmethod
    def _prepare(self) -> None:
        """Check the arguments (raise `TopologyError`) and set the fields derived from them."""

    @property
    @abstractmethod
    def period(self) -> int:
        """The number of rounds until they repeat: step t uses round `t % period`. 1: static. 0: they never repeat."""

    @abstractmethod
    def _rows(self, step: int) -> tuple[Row, ...]:
        """Return the non-zero weights of one round by rank; asked for `0 <= step < period`, or any step if that is
        0."""

    @abstractmethod
    def peers(self, rank: int) -> tuple[int, ...]:
        """Return all workers that `rank` ever exchanges with, in either direction, over a period; sorted.

        Asynchronous methods with pairwise averaging sample their partner from these. Not to be confused with
        `in_neighbors`, which is about one step.

        Example:
            >>> from lightning_decentral.topology import OnePeerExponential
            >>> OnePeerExponential(8).peers(0)
            (1, 2, 4, 6, 7)
        """

    @property
    @abstractmethod
    def is_symmetric(self) -> bool:
        """Whether every round has `W[i, j] = W[j, i]`: each message is answered with the same weight."""

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether information from every worker reaches all others, over a period."""

    @property
    @abstractmethod
    def is_bipartite(self) -> bool:
        """Whether the workers split in two sides with all exchanges, over a period, between the sides."""

    @property
    @abstractmethod
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue of W, and over all rounds of a period; in [-1, 1].

        Computed in floating point, to about 1e-14: compare with a margin. D2 (Tang et al., ICML 2018) diverges unless
        it is above -1/3, and the ring with an even number of workers has exactly -1/3.

        Raises:
            TopologyError: if W is not symmetric.
        """

    @property
    @abstractmethod
    def spectral_gap(self) -> float:
        r"""The gap: one minus the factor by which a round shrinks the distance from consensus; in [0, 1], 1 is best.

        Static: `1 - ||W - J||_2`, which for a symmetric W is one minus the second-largest absolute eigenvalue.
        Time-varying: the per-round equivalent over one period, `1 - ||W[p-1] ... W[0] - J||_2 ^ (1/p)`.
        Random: `1 - sqrt(lambda_max(E[W^T W] - J))`, the expected (mean-square) factor.
        """

    @abstractmethod
    def rounds_to_consensus(self, tolerance: float = 1e-3) -> int | float:
        """Smallest number of rounds t, from step 0, with `||W(t-1) ... W(0) - J||_2 <= tolerance`.

        Then every disagreement between the workers, whatever it was, has shrunk to this share of itself.

        Args:
            tolerance: share of the initial disagreement that may remain, in [1e-13, 1).

        Returns:
            The number of rounds; `math.inf` if the workers never agree.

        Example:
            >>> from lightning_decentral.topology import HypercubeMatching, Ring
            >>> Ring(8).rounds_to_consensus(), HypercubeMatching(8).rounds_to_consensus()
            (32, 3)
        """

    @final
    def gap_over(self, first: int, last: int) -> float:
        """Return the spectral gap that the rounds of some steps really have: what a schedule of random rounds was like.

        Of rounds that repeat it is `spectral_gap`. Of others it is one minus the factor per round by which those from
        ``first`` until before ``last`` together shrink the distance from consensus; of the latest of them alone, if
        these leave less than 0.1 %.

        Args:
            first: the first step.
            last: the step after the last one.

        Example:
            >>> from lightning_decentral.topology import RandomMatching
            >>> 0.1 < RandomMatching(8).gap_over(0, 8) < 0.6
            True
        """
        if self.period or last <= first:
            return self.spectral_gap
        return 1 - contraction_before(self.size, (self.mixing_matrix(step) for step in range(last - 1, first - 1, -1)))

    @final
    def __post_init__(self) -> None:
        self._prepare()
        for step in range(max(self.period, 1)):
            require_weights(type(self).__name__, self._round(step).rows, self.stochastic)

    @final
    def __getstate__(self) -> dict[str, Any]:
        # Everything else in __dict__ is cached and can be computed again.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @final
    def mixing_matrix(self, step: int = 0) -> Tensor:
        """Return the mixing matrix W of one step.

        Args:
            step: the training step, counted from 0.

        Returns:
            A new [size, size] float64 tensor on the CPU.

        Example:
            >>> from lightning_decentral.topology import AlternatingMatching
            >>> AlternatingMatching(4).mixing_matrix(step=0)
            tensor([[0.5000, 0.5000, 0.0000, 0.0000],
                    [0.5000, 0.5000, 0.0000, 0.0000],
                    [0.0000, 0.0000, 0.5000, 0.5000],
                    [0.0000, 0.0000, 0.5000, 0.5000]], dtype=torch.float64)
        """
        rows = self._round(self._index(step)).rows
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64, device="cpu")
        targets = [rank * self.size + source for rank, row in enumerate(rows) for source in row]
        weights = [weight for row in rows for weight in row.values()]
        matrix.view(-1)[torch.tensor(targets, device="cpu")] = torch.tensor(weights, dtype=torch.float64, device="cpu")
        return matrix

    @final
    def weights(self, rank: int, step: int) -> dict[int, float]:
        """Return the non-zero weights of one row of W: what `rank` multiplies each value with, its own included.

        Args:
            rank: the worker that mixes.
            step: the training step, counted from 0.

        Returns:
            Source rank to weight, in increasing order of rank; yours to change.

        Example:
            >>> from lightning_decentral.topology import HypercubeMatching
            >>> HypercubeMatching(4).weights(rank=3, step=1)
            {1: 0.5, 3: 0.5}
        """
        self._require_rank(rank)
        return dict(self._round(self._index(step)).rows[rank])

    @final
    def in_neighbors(self, rank: int, step: int = 0) -> tuple[int, ...]:
        """Return the workers that `rank` receives from at this step, sorted, without itself."""
        self._require_rank(rank)
        return self._round(self._index(step)).sources[rank]

    @final
    def out_neighbors(self, rank: int, step: int = 0) -> tuple[int, ...]:
        """Return the workers that `rank` sends to at this step, sorted, without itself; mirrors `in_neighbors`."""
        self._require_rank(rank)
        return self._round(self._index(step)).destinations[rank]

    def initiates(self, rank: int) -> bool:
        """Tell whether `rank` starts pairwise exchanges; the others only answer.

        True for everyone, except on the bipartite topologies: there only odd ranks start and only even ranks answer,
        so that no circle of workers waiting for each other's answer can form.
        """
        self._require_rank(rank)
        return rank % 2 == 1 or not self.odd_ranks_initiate

    @final
    def edges(self, step: int = 0) -> list[tuple[int, int]]:
        """Return all messages of one step as (sender, receiver), sorted; a symmetric exchange is two messages.

        Example:
            >>> from lightning_decentral.topology import AlternatingMatching
            >>> AlternatingMatching(4).edges(step=1)
            [(0, 3), (1, 2), (2, 1), (3, 0)]
        """
        destinations = self._round(self._index(step)).destinations
        return [(sender, receiver) for sender in range(self.size) for receiver in destinations[sender]]

    @final
    def plot(self, ax: Axes | None = None, step: int | None = None) -> Axes:
        """Draw the workers on a circle, with an arrow per message, or a line where every message is answered.

        Args:
            ax: matplotlib axes to draw on; a new figure if not given.
            step: the step to draw; by default all rounds of a period, one colour each (step 0 if they never repeat).

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return drawing.plot(self, ax, step)

    @final
    def __str__(self) -> str:
        """Return several lines for people: cost per step, speed of averaging, what it may be used for, who talks to
        whom.

        Computes eigenvalues, which takes about a second at 512 workers; `repr` is immediate.
        """
        return drawing.describe(self)

    @cached_property
    def _round(self) -> Callable[[int], _Round]:
        return lru_cache(maxsize=self.period or UNREPEATED_ROUNDS_KEPT)(self._build_round)

    @final
    def _build_round(self, index: int) -> _Round:
        rows = self._rows(index)
        destinations: list[list[int]] = [[] for _ in rows]
        for rank, row in enumerate(rows):
            for source in row:
                if source != rank:
                    destinations[source].append(rank)
        sources = tuple(tuple(source for source in row if source != rank) for rank, row in enumerate(rows))
        return _Round(rows, sources, tuple(map(tuple, destinations)))

    @final
    def _index(self, step: int) -> int:
        return step % self.period if self.period else step

    @final
    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise TopologyError(
                f"{type(self).__name__} with {self.size} workers needs a rank from 0 to {self.size - 1}, got {rank}. "
                f"Build the topology with as many workers as the training has."
            )


@dataclass(frozen=True)
class AbstractPeriodicTopology(AbstractTopology):
    """A topology whose rounds repeat after `period` steps, so that everything about it can be computed.

    Derive from this one for your own topologies.

    Example:
        >>> from dataclasses import dataclass
        >>> from lightning_decentral.topology import AbstractPeriodicTopology
        >>> @dataclass(frozen=True)
        ... class PathAndEnds(AbstractPeriodicTopology):  # a path in even steps, and its two ends in odd ones
        ...     period = 2
        ...
        ...     def _prepare(self):  # refuses numbers of workers that it is not for, and computes what it needs once
        ...         pass
        ...
        ...     def _rows(self, step):  # of the mixing matrix of that step: source to weight, for each worker
        ...         rows = [{i: 1.0} for i in range(self.size)]
        ...         edges = [(i, i + 1) for i in range(self.size - 1)] if step % 2 == 0 else [(0, self.size - 1)]
        ...         for i, j in edges:
        ...             for one, other in ((i, j), (j, i)):
        ...                 rows[one][other] = 1 / 3
        ...                 rows[one][one] -= 1 / 3
        ...         return tuple(rows)
        >>> PathAndEnds(4).peers(0), PathAndEnds(4).out_neighbors(0, 1)
        ((1, 3), (3,))
    """

    @final
    def peers(self, rank: int) -> tuple[int, ...]:
        """Return all workers that `rank` ever exchanges with, in either direction, over a period; sorted."""
        self._require_rank(rank)
        return self._peers[rank]

    @cached_property
    def _peers(self) -> tuple[tuple[int, ...], ...]:
        rounds = [self._round(step) for step in range(self.period)]
        return tuple(
            tuple(sorted({*(r for one in rounds for r in (*one.sources[rank], *one.destinations[rank]))}))
            for rank in range(self.size)
        )

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether every round has `W[i, j] = W[j, i]`."""
        return all(
            abs(rows[source].get(rank, 0.0) - weight) <= STOCHASTIC_TOLERANCE
            for rows in (self._round(step).rows for step in range(self.period))
            for rank, row in enumerate(rows)
            for source, weight in row.items()
        )

    @cached_property
    def is_connected(self) -> bool:
        """Whether information from every worker reaches all others, over a period."""
        # A doubly stochastic graph that is connected when directions are ignored is strongly connected; others check.
        reached, frontier = {0}, [0]
        while frontier:
            fresh = set(self._peers[frontier.pop()]) - reached
            reached |= fresh
            frontier.extend(fresh)
        return len(reached) == self.size

    @cached_property
    def is_bipartite(self) -> bool:
        """Whether the workers split in two sides with all exchanges, over a period, between the sides."""
        side: dict[int, int] = {}
        for start in range(self.size):
            if start in side:
                continue
            side[start] = 0
            frontier = [start]
            while frontier:
                rank = frontier.pop()
                for peer in self._peers[rank]:
                    if peer not in side:
                        side[peer] = 1 - side[rank]
                        frontier.append(peer)
                    elif side[peer] == side[rank]:
                        return False
        return True

    @cached_property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue over all rounds of a period; compare with a margin of, say, 1e-9.

        Raises:
            TopologyError: if W is not symmetric.
        """
        if not self.is_symmetric:
            raise TopologyError(
                f"smallest_eigenvalue needs a symmetric mixing matrix, got the directed {type(self).__name__}. "
                f"Use an undirected topology such as Ring, Hypercube or HypercubeMatching."
            )
        return min(float(torch.linalg.eigvalsh(matrix)[0]) for matrix in self._matrices())

    @cached_property
    def spectral_gap(self) -> float:
        """The gap `1 - ||W[p-1] ... W[0] - J||_2 ^ (1/p)` over the p rounds of a period.

        If only the columns sum to one: one minus the second-largest absolute eigenvalue of a period, per round, which
        is how fast the weighted averages of push-sum agree in the long run.
        """
        if self.stochastic == "column":
            return max(0.0, 1 - push_sum_contraction(self._matrices()))
        return max(0.0, 1 - contraction(self._matrices()))

    @final
    def rounds_to_consensus(self, tolerance: float = 1e-3) -> int | float:
        """Smallest number of rounds t, from step 0, with `||W(t-1) ... W(0) - J||_2 <= tolerance`.

        If only the columns sum to one: with `(1 - spectral_gap) ** t <= tolerance`.
        """
        if self.stochastic == "column":
            gap = self.spectral_gap
            if not 0 < gap < 1:
                return 1 if gap else math.inf
            return math.ceil(math.log(tolerance) / math.log1p(-gap))
        return rounds_until(self._matrices(), tolerance)

    @final
    def _matrices(self) -> list[Tensor]:
        return [self.mixing_matrix(step) for step in range(self.period)]
