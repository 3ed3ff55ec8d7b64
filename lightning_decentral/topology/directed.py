"""Directed graphs of any kind, for push-sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import networkx as nx

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractPeriodicTopology
from lightning_decentral.topology.rows import Row
from lightning_decentral.topology.validation import Stochastic


@final
@dataclass(frozen=True)
class DirectedGraph(AbstractPeriodicTopology):
    r"""Any strongly connected directed graph: a worker splits its value equally among those it sends to, and itself.

    `W[i, j] = 1 / (1 + targets of j)` for all that j sends to. Columns sum to one, rows in general do not: sums stay,
    equal values do not. So it is for methods that correct it by a weight that is averaged beside the value (push-sum),
    and for no others.

    Cost: one message for each of a worker's targets per step.

    Args:
        targets: by rank, whom each worker sends to; itself may be left out.

    Attributes:
        size: number of workers, at least 2.

    Raises:
        TopologyError: if a rank does not exist, or somebody would never hear of somebody else.

    Example:
        >>> from lightning_decentral.topology import DirectedGraph
        >>> graph = DirectedGraph([[1, 2], [2], [0]])
        >>> graph.stochastic, graph.in_neighbors(2), graph.weights(rank=2, step=0)
        ('column', (0, 1), {0: 0.3333333333333333, 1: 0.5, 2: 0.5})

    References:
        Kempe, Dobra, Gehrke, *Gossip-based computation of aggregate information*, FOCS 2003. Assran, Loizou, Ballas,
        Rabbat, *Stochastic gradient push for distributed deep learning*, ICML 2019, arXiv:1811.10792.
    """

    stochastic: ClassVar[Stochastic] = "column"

    size: int = field(init=False, repr=False)
    targets: Sequence[Sequence[int]]

    def _prepare(self) -> None:
        ranks = range(len(self.targets))
        if len(ranks) < 2:
            raise TopologyError(f"DirectedGraph needs at least 2 workers, got {len(ranks)}. Use Complete(1) for one.")
        unknown = [rank for row in self.targets for rank in row if rank not in ranks]
        if unknown:
            raise TopologyError(
                f"DirectedGraph needs targets from 0 to {len(ranks) - 1}, got {unknown[0]!r}. Give one list of ranks "
                "for each worker."
            )
        targets = tuple(tuple(sorted(set(row) - {rank})) for rank, row in enumerate(self.targets))
        graph = nx.DiGraph((rank, target) for rank, row in enumerate(targets) for target in row)
        graph.add_nodes_from(ranks)
        if not nx.is_strongly_connected(graph):
            parts = sorted(sorted(part) for part in nx.strongly_connected_components(graph))
            raise TopologyError(
                f"DirectedGraph needs a way from every worker to all others, got {len(parts)} parts without a way "
                f"back, one with only node(s) {min(parts, key=len)}. Add edges until there is one."
            )
        object.__setattr__(self, "size", len(ranks))
        object.__setattr__(self, "targets", targets)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        return _split(self.targets)


@final
@dataclass(frozen=True)
class DirectedRounds(AbstractPeriodicTopology):
    r"""Directed graphs that take turns: in round t a worker splits its value among those of round `t mod p`, and
    itself.

    Columns sum to one, rows in general do not: for push-sum, and for no other methods. A single round may leave workers
    without a way to each other; all rounds together may not.

    Cost: one message for each of a worker's targets of the step.

    Args:
        rounds: of each round, by rank, whom each worker sends to; itself may be left out.

    Attributes:
        size: number of workers, at least 2.

    Raises:
        TopologyError: if a rank does not exist, rounds are of different size, or somebody would never hear of somebody.

    Example:
        >>> from lightning_decentral.topology import DirectedRounds
        >>> graph = DirectedRounds([[[1], [2], []], [[], [], [0, 1]]])
        >>> graph.period, graph.stochastic, graph.weights(rank=1, step=0), graph.weights(rank=1, step=1)
        (2, 'column', {0: 0.5, 1: 0.5}, {1: 1.0, 2: 0.3333333333333333})

    References:
        Assran, Loizou, Ballas, Rabbat, *Stochastic gradient push for distributed deep learning*, ICML 2019,
        arXiv:1811.10792.
    """

    stochastic: ClassVar[Stochastic] = "column"

    size: int = field(init=False, repr=False)
    rounds: Sequence[Sequence[Sequence[int]]]

    def _prepare(self) -> None:
        sizes = sorted({len(targets) for targets in self.rounds})
        if len(sizes) != 1:
            raise TopologyError(
                f"DirectedRounds needs rounds for one number of workers, got rounds for {sizes}. Give each of them one "
                "list of ranks for every worker, which may be empty."
            )
        both = [sorted({to for targets in self.rounds for to in targets[rank]}) for rank in range(sizes[0])]
        DirectedGraph(both)  # which checks that everybody hears of everybody
        rounds = tuple(
            tuple(tuple(sorted(set(row) - {rank})) for rank, row in enumerate(targets)) for targets in self.rounds
        )
        object.__setattr__(self, "size", sizes[0])
        object.__setattr__(self, "rounds", rounds)

    @property
    def period(self) -> int:
        """The number of rounds."""
        return len(self.rounds)

    def _rows(self, step: int) -> tuple[Row, ...]:
        return _split(self.rounds[step])


def _split(targets: Sequence[Sequence[int]]) -> tuple[Row, ...]:
    """Tell what each worker gets if all split their values equally among their targets and themselves."""
    rows: list[Row] = [{} for _ in targets]
    for rank, row in enumerate(targets):
        for target in (rank, *row):
            rows[target][rank] = 1 / (1 + len(row))
    return tuple(dict(sorted(row.items())) for row in rows)
