"""Which worker takes which place of a graph: few bytes over slow links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractPeriodicTopology, AbstractTopology
from lightning_decentral.topology.rows import Row, renumbered
from lightning_decentral.topology.validation import Stochastic

_STARTS = 8  # workers with which the search begins, at most
_STEPS = 2.0**30  # that the largest cost is divided into


@final
@dataclass(frozen=True)
class Placed(AbstractPeriodicTopology):
    """Another graph whose places the workers take in another order than that of their ranks.

    `W[ranks[p], ranks[q]]` is the graph's `W[p, q]`: it averages as fast, between other workers. `placed` finds an
    order for links of unequal cost.

    Cost: that of the graph.

    Args:
        graph: with rounds that repeat. One that is `Placed` itself is taken apart: the two orders become one.
        ranks: of the workers, by place: each once.

    Attributes:
        size: number of workers: that of the graph.

    Raises:
        TopologyError: for other ranks, or a graph whose rounds never repeat.

    Example:
        >>> from lightning_decentral.topology import Placed, Ring
        >>> graph = Placed(Ring(4), (0, 2, 1, 3))
        >>> graph.in_neighbors(0), graph.in_neighbors(2)
        ((2, 3), (0, 1))
    """

    size: int = field(init=False, repr=False)
    graph: AbstractTopology
    ranks: tuple[int, ...]

    def _prepare(self) -> None:
        _require_rounds("Placed", self.graph)
        graph = self.graph
        ranks = tuple(self.ranks) if isinstance(self.ranks, Sequence) else ()
        if not all(isinstance(rank, int) for rank in ranks) or sorted(ranks) != list(range(graph.size)):
            raise TopologyError(
                f"Placed got the ranks {self.ranks!r} for {graph!r}, needs each of 0 to {graph.size - 1} once, by "
                "place. Use `placed`, which finds an order."
            )
        inner = graph if isinstance(graph, Placed) else None
        object.__setattr__(self, "graph", graph if inner is None else inner.graph)
        object.__setattr__(self, "ranks", ranks if inner is None else tuple(ranks[place] for place in inner.ranks))
        object.__setattr__(self, "size", graph.size)

    @property
    def stochastic(self) -> Stochastic:  # type: ignore[override]
        """Which sums of the weights are one: as of the graph."""
        return self.graph.stochastic

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: that of the graph."""
        return self.graph.period

    def _rows(self, step: int) -> tuple[Row, ...]:
        own = renumbered((self.graph.weights(place, step) for place in range(self.size)), self.ranks)
        return tuple(own[rank] for rank in range(self.size))

    def initiates(self, rank: int) -> bool:
        """Tell whether a worker starts pairwise exchanges: by its place."""
        self._require_rank(rank)
        return self.graph.initiates(self.ranks.index(rank))


def placed(graph: AbstractTopology, costs: Tensor | Sequence[Sequence[float]]) -> AbstractTopology:
    """Give the workers places in a graph, so that messages cost little.

    It looks for the least sum, over a period's messages, of `costs[sender][receiver]` (a quadratic assignment), and
    begins with the order of the ranks, and with up to eight workers that each draw their neighbours to them: the next
    place is the one with most messages to those that are taken, and goes to the worker that is nearest to them. From
    each of these orders two workers exchange their places, those first with which the sum becomes smallest, until no
    exchange makes it smaller. The best order found is not always the best there is.

    Without randomness, and without rounding: the same on all machines. Costs that differ by less than a billionth of
    the largest count as equal.

    Cost: for 64 workers some tenths of a second.

    Args:
        graph: with rounds that repeat.
        costs: `[workers, workers]`, of a message from one worker to another, in any unit, as seconds: latency, and
            bytes divided by what the link carries. Finite, 0 or more; those of a worker to itself do not matter.

    Returns:
        A `Placed`; or the graph itself, if no order was found that costs less than that of the ranks.

    Raises:
        TopologyError: for costs of another shape or range, or a graph whose rounds never repeat.

    Example:
        >>> from lightning_decentral.topology import Ring, placed
        >>> near, far = 1.0, 50.0  # even ranks are at one site, odd ones at the other
        >>> costs = [[near if i % 2 == j % 2 else far for j in range(6)] for i in range(6)]
        >>> ring = placed(Ring(6), costs)
        >>> sum(i % 2 != j % 2 for i, j in ring.edges())  # of two links, in both directions
        4
    """
    _require_rounds("placed", graph)
    table, flows = _checked("placed", graph, costs), _messages(graph)
    if float(table.max()) > 0:
        table = torch.round(table / table.max() * _STEPS)  # whole numbers, whose sums have no rounding errors
    in_order = torch.arange(graph.size)
    firsts = range(0, graph.size, -(-graph.size // _STARTS))
    starts = [in_order, *(_drawn_together(flows, table, first) for first in firsts)]
    orders = [in_order, *(_exchanged(flows, table, start) for start in starts)]
    best = min(orders, key=lambda order: _sum(flows, table, order))  # the first one of equals
    return graph if best is in_order else Placed(graph, tuple(best.tolist()))


def mean_cost(graph: AbstractTopology, costs: Tensor | Sequence[Sequence[float]]) -> float:
    """Return what a message of a graph costs on average over a period, which `placed` makes small; 0 without messages.

    Args:
        graph: with rounds that repeat.
        costs: as of `placed`.

    Raises:
        TopologyError: as of `placed`.
    """
    _require_rounds("mean_cost", graph)
    table, flows = _checked("mean_cost", graph, costs), _messages(graph)
    return _sum(flows, table, torch.arange(graph.size)) / max(float(flows.sum()), 1.0)


def _require_rounds(what: str, graph: object) -> None:
    if not isinstance(graph, AbstractTopology):
        raise TopologyError(f"{what} got {graph!r}, needs a topology for all workers. Write Ring(8), for example.")
    if not graph.period:
        raise TopologyError(
            f"{what} got {graph!r}, whose rounds never repeat, so that everybody meets everybody wherever they are; it "
            "needs a graph with a period. Use OnePeerExponential, for example."
        )


def _checked(what: str, graph: AbstractTopology, costs: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """Return the costs as a matrix whose diagonal is zero."""
    try:
        table = torch.as_tensor(costs, dtype=torch.float64, device="cpu").clone()
    except (TypeError, ValueError) as error:
        raise TopologyError(
            f"{what} got costs that are no matrix of numbers ({error}), needs one. Give a list with a list per sender."
        ) from None
    if table.shape != (graph.size, graph.size):
        raise TopologyError(
            f"{what} got costs of shape {tuple(table.shape)} for {graph!r}, needs {(graph.size, graph.size)}. Give a "
            "row for each sender, with a number for each receiver."
        )
    table.fill_diagonal_(0.0)
    if not bool((table.isfinite() & (table >= 0)).all()):
        raise TopologyError(
            f"{what} got a cost below zero, or one that is not finite; it needs seconds of a message, 0 or more. Use a "
            "large number for a link that must not be used."
        )
    return table


def _messages(graph: AbstractTopology) -> Tensor:
    """Count a period's messages: ``[places, places]``, by sender and receiver."""
    flows = torch.zeros(graph.size, graph.size, dtype=torch.float64)
    for step in range(graph.period):
        for sender, receiver in graph.edges(step):
            flows[sender, receiver] += 1.0
    return flows


def _sum(flows: Tensor, table: Tensor, order: Tensor) -> float:
    """Return what a period's messages cost with the workers in this order."""
    return float((flows * table[order][:, order]).sum())


def _drawn_together(flows: Tensor, table: Tensor, first: int) -> Tensor:
    """Put a worker on place 0; then always the nearest one on the place with most messages to those that are taken."""
    everyone = range(len(flows))
    taken = {0: first}  # workers, by place
    while len(taken) < len(flows):
        places, workers = list(taken), list(taken.values())
        messages = (flows[:, places] + flows[places].T).sum(1).tolist()
        place = max((each for each in everyone if each not in taken), key=messages.__getitem__)
        near = table[:, workers] @ flows[place, places] + flows[places, place] @ table[workers]
        to_all = (table[:, workers] + table[workers].T).sum(1)  # decides between equally near ones
        distances = list(zip(near.tolist(), to_all.tolist(), strict=True))
        taken[place] = min(set(everyone) - set(workers), key=lambda each: (distances[each], each))
    return torch.tensor([taken[place] for place in everyone])


def _exchanged(flows: Tensor, table: Tensor, start: Tensor) -> Tensor:
    """Exchange two workers, those with which the sum becomes smallest, until no exchange makes it smaller."""
    order = start.clone()
    while True:
        costs = table[order][:, order]
        # What the messages of place p would cost with the worker of place q, if nobody else moved.
        moved = flows @ costs.T + flows.T @ costs
        own = moved.diagonal()
        more = moved + moved.T - own[:, None] - own
        more += (flows + flows.T) * (costs + costs.T)  # between the two: taken off twice, and not yet added
        p, q = divmod(int(more.argmin()), len(order))
        if more[p, q] >= 0:
            return order
        order[[p, q]] = order[[q, p]]
