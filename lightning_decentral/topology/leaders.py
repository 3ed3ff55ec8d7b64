"""A graph of hosts as one of their workers: the first worker of each host exchanges, the others do nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import final

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractTopology
from lightning_decentral.topology.rows import Row
from lightning_decentral.topology.validation import require_integer


@final
@dataclass(frozen=True)
class Leaders(AbstractTopology):
    r"""The first of every few workers exchanges along a graph of these; the others keep their values.

    It is not connected: whoever uses it, as `HierarchicalGossip`, brings the workers of a host together in another way.

    Cost: that of the graph, for the first worker of each host.

    Args:
        hosts: the graph, of the hosts.
        members: workers of each host, at least 1; their ranks follow each other.

    Attributes:
        size: number of workers: hosts times members.

    Example:
        >>> from lightning_decentral.topology import Leaders, Ring
        >>> graph = Leaders(Ring(3), members=2)
        >>> graph.in_neighbors(rank=2), graph.in_neighbors(rank=3)
        ((0, 4), ())
    """

    size: int = field(init=False, repr=False)
    hosts: AbstractTopology
    members: int

    def _prepare(self) -> None:
        require_integer("Leaders", "members", self.members)
        if not (isinstance(self.hosts, AbstractTopology) and self.members >= 1):
            raise TopologyError(
                f"Leaders got hosts={self.hosts!r} with {self.members} members, needs a topology and at least 1. Write "
                "Leaders(Ring(4), members=8)."
            )
        object.__setattr__(self, "size", self.hosts.size * self.members)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: that of the hosts' graph."""
        return self.hosts.period

    def _rows(self, step: int) -> tuple[Row, ...]:
        rows: list[Row] = [{rank: 1.0} for rank in range(self.size)]
        for host in range(self.hosts.size):
            weights = self.hosts.weights(host, step)
            rows[host * self.members] = {other * self.members: weight for other, weight in weights.items()}
        return tuple(rows)

    def peers(self, rank: int) -> tuple[int, ...]:
        """Return the first workers of the hosts that this one's host ever exchanges with; none for all others."""
        self._require_rank(rank)
        host, place = divmod(rank, self.members)
        return () if place else tuple(other * self.members for other in self.hosts.peers(host))

    @property
    def is_symmetric(self) -> bool:
        """Whether W equals its transpose: if the hosts' does."""
        return self.hosts.is_symmetric

    @property
    def is_connected(self) -> bool:
        """Whether everybody hears of everybody: only with one worker on each host."""
        return self.members == 1 and self.hosts.is_connected

    @property
    def is_bipartite(self) -> bool:
        """Whether workers fall into two halves that only talk to each other: if the hosts do."""
        return self.hosts.is_bipartite

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue: that of the hosts' graph; the others' are 1."""
        return self.hosts.smallest_eigenvalue

    @property
    def spectral_gap(self) -> float:
        """The gap: 0, unless there is one worker on each host."""
        return self.hosts.spectral_gap if self.members == 1 else 0.0

    def rounds_to_consensus(self, tolerance: float = 1e-3) -> int | float:
        """Never, unless there is one worker on each host."""
        return self.hosts.rounds_to_consensus(tolerance) if self.members == 1 else inf
