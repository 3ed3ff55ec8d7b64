"""The graph of those workers that are there, among the ranks of all that may be."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractTopology
from lightning_decentral.topology.rows import Row, renumbered
from lightning_decentral.topology.validation import Stochastic


@dataclass(frozen=True)
class Among(AbstractTopology):
    """A topology whose vertices are some of the ranks, in their order; the others have no neighbour, and weight one.

    It is made anew when workers are lost or join: of the same list everybody makes the same graph.

    Args:
        size: one more than the largest rank that may be.
        graph: of as many workers as there are.
        ranks: of these workers, in increasing order.

    Example:
        >>> from lightning_decentral.topology import Among, Ring
        >>> [Among(5, Ring(3), (0, 2, 4)).peers(rank) for rank in range(5)]
        [(2, 4), (), (0, 4), (), (0, 2)]
    """

    graph: AbstractTopology
    ranks: tuple[int, ...]

    def _prepare(self) -> None:
        ordered = self.ranks == tuple(sorted(set(self.ranks)))
        if len(self.ranks) != self.graph.size or not ordered or not all(0 <= rank < self.size for rank in self.ranks):
            raise TopologyError(
                f"Among got the ranks {self.ranks} for {self.graph!r} among {self.size}; it needs as many ranks as the "
                "graph has workers, each once, in increasing order and below the size. Make the graph for their number."
            )

    @property
    def stochastic(self) -> Stochastic:  # type: ignore[override]
        """Which sums of the weights are one: as of the graph."""
        return self.graph.stochastic

    @property
    def period(self) -> int:
        return self.graph.period

    def _rows(self, step: int) -> tuple[Row, ...]:
        own = renumbered((self.graph.weights(place, step) for place in range(self.graph.size)), self.ranks)
        return tuple(own.get(rank, {rank: 1.0}) for rank in range(self.size))

    def peers(self, rank: int) -> tuple[int, ...]:
        """Return the neighbours of a worker; none of one that is not there."""
        self._require_rank(rank)
        if rank not in self.ranks:
            return ()
        return tuple(self.ranks[place] for place in self.graph.peers(self.ranks.index(rank)))

    def initiates(self, rank: int) -> bool:
        """Tell whether a worker starts pairwise exchanges: by its place among those that are there."""
        self._require_rank(rank)
        return rank in self.ranks and self.graph.initiates(self.ranks.index(rank))

    @property
    def is_symmetric(self) -> bool:
        """Whether every round has `W[i, j] = W[j, i]`."""
        return self.graph.is_symmetric

    @property
    def is_connected(self) -> bool:
        """Whether information from each of the workers that are there reaches all of these."""
        return self.graph.is_connected

    @property
    def is_bipartite(self) -> bool:
        """Whether the workers that are there split in two sides with all exchanges between the sides."""
        return self.graph.is_bipartite

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue of the graph's weights."""
        return self.graph.smallest_eigenvalue

    @property
    def spectral_gap(self) -> float:
        """The gap of the graph: of the consensus of those that are there."""
        return self.graph.spectral_gap

    def rounds_to_consensus(self, tolerance: float = 1e-3) -> int | float:
        """Return the rounds to the consensus of those that are there."""
        return self.graph.rounds_to_consensus(tolerance)
