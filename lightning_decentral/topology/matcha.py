"""MATCHA: a graph of which each step uses some edges only, those that matter most more often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from math import sqrt
from random import Random
from typing import final

import networkx as nx
import torch
from torch import Tensor

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractTopology
from lightning_decentral.topology.custom import FromGraph
from lightning_decentral.topology.rows import Row
from lightning_decentral.topology.spectrum import rounds_until_unrepeated
from lightning_decentral.topology.validation import require_integer

Edge = tuple[int, int]

_GRID = 2.0**-10  # probabilities and the weight are multiples of it: machines that round differently agree
_SEARCHES = 400  # steps towards the probabilities; the last ones move them by 0.5 %
_SHARPNESS = 200.0  # of the smooth minimum, against eigenvalues of the size of one
_HALVINGS = 60


@final
@dataclass(frozen=True)
class Matcha(AbstractTopology):
    r"""The edges of a graph, sorted into matchings, each of which takes part in a step with a probability of its own.

    In a matching every worker has one partner at most. All take the same weight `alpha`::

        W(t) = I - alpha * sum_j b_j(t) L_j,    b_j(t) is 1 with probability p_j and 0 otherwise

    with L_j the Laplacian of matching j. The probabilities make the mean graph, `sum_j p_j L_j`, as connected as a
    budget allows (they maximize its second-smallest eigenvalue, which is a concave problem; within about 1 %), so that
    an edge that holds two parts together is used nearly always, and one among many seldom. The weight is then the one
    with the smallest `||E[W^T W] - J||`; no worker gives away more than it has.

    What step t uses is drawn from `(seed, t)`, so that workers agree on it without a message; the rounds never repeat.

    Cost: on average `budget` times the messages of the graph per step; in one step at most one for each matching that a
    worker is in. Making one takes a second for 64 workers.

    Args:
        graph: connected and undirected: a networkx `Graph`, or a list of edges, as for `FromGraph`.
        budget: the mean share of the matchings that is used in a step, the paper's communication budget, in (0, 1]. At
            1 all are used in all steps. Default 0.5.
        seed: any whole number that all workers share. Default 0.

    Attributes:
        size: number of nodes, at least 2.

    Raises:
        TopologyError: as `FromGraph` does; for another budget, or a seed that is no whole number.

    Example:
        >>> from lightning_decentral.topology import Matcha
        >>> graph = Matcha([(0, 1), (1, 2), (2, 0), (2, 3)])  # a triangle, and one that hangs on it
        >>> graph.matchings
        (((0, 1), (2, 3)), ((0, 2),), ((1, 2),))
        >>> [round(each, 1) for each in graph.probabilities]  # without (2, 3) nobody hears of worker 3
        [0.7, 0.4, 0.4]

    References:
        Jianyu Wang, Anit Kumar Sahu, Zhouyi Yang, Gauri Joshi, Soummya Kar. *MATCHA: Speeding Up Decentralized SGD via
        Matching Decomposition Sampling.* NeurIPS workshop on Federated Learning for Data Privacy and Confidentiality,
        2019, arXiv:1905.09435.
    """

    size: int = field(init=False, repr=False)
    graph: Sequence[Edge] | nx.Graph
    budget: float = 0.5
    seed: int = 0

    def _prepare(self) -> None:
        require_integer("Matcha", "seed", self.seed)
        if isinstance(self.budget, bool) or not (isinstance(self.budget, int | float) and 0.0 < self.budget <= 1.0):
            raise TopologyError(
                f"Matcha needs a budget above 0 and at most 1, got {self.budget!r}. Use 0.5, for half of the messages "
                "of the graph."
            )
        known = FromGraph(self.graph)
        object.__setattr__(self, "size", known.size)
        object.__setattr__(self, "graph", known.graph)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 0, as they never do."""
        return 0

    @cached_property
    def matchings(self) -> tuple[tuple[Edge, ...], ...]:
        """The edges, in sets in which no worker is twice; at most twice as many sets as a worker has neighbours."""
        found: list[list[Edge]] = []
        busy: list[set[int]] = []  # who is in each of them
        degrees = [0] * self.size
        for edge in self.graph:
            for rank in edge:
                degrees[rank] += 1
        # Edges between busy workers first: they have the least choice.
        for edge in sorted(self.graph, key=lambda edge: (-degrees[edge[0]] - degrees[edge[1]], edge)):
            place = next((place for place, members in enumerate(busy) if members.isdisjoint(edge)), len(found))
            if place == len(found):
                found.append([])
                busy.append(set())
            found[place].append(edge)
            busy[place].update(edge)
        return tuple(sorted(tuple(sorted(matching)) for matching in found))

    @cached_property
    def _laplacians(self) -> Tensor:
        laplacians = torch.zeros(len(self.matchings), self.size, self.size, dtype=torch.float64, device="cpu")
        for laplacian, matching in zip(laplacians, self.matchings, strict=True):
            for a, b in matching:
                laplacian[a, a] = laplacian[b, b] = 1.0
                laplacian[a, b] = laplacian[b, a] = -1.0
        return laplacians

    @cached_property
    def probabilities(self) -> tuple[float, ...]:
        """The probability with which each of `matchings` takes part in a step."""
        if self.budget == 1.0:
            return (1.0,) * len(self.matchings)
        found = _most_connected(self._laplacians, self.budget)
        return tuple(min(1.0, max(_GRID, round(float(each) / _GRID) * _GRID)) for each in found)

    @cached_property
    def alpha(self) -> float:
        """The weight of an edge that is used."""
        largest = 1.0 / float(self._laplacians.sum(0).diagonal().max())  # where all matchings take part
        low, high = 0.0, largest
        for _ in range(_HALVINGS):  # the factor is convex in the weight
            third = (high - low) / 3
            if self._factor(low + third) < self._factor(high - third):
                high -= third
            else:
                low += third
        return min(largest, round(low / _GRID) * _GRID)

    def _factor(self, alpha: float) -> float:
        """Return ``||E[W^T W] - J||``, by which the expected squared distance from consensus shrinks in a step."""
        used = torch.tensor(self.probabilities, dtype=torch.float64, device="cpu")[:, None, None]
        mean = (used * self._laplacians).sum(0)
        spread = (used * (1 - used) * self._laplacians).sum(0)  # the square of a matching's Laplacian is twice itself
        identity = torch.eye(self.size, dtype=torch.float64, device="cpu")
        squared = identity - 2 * alpha * mean + alpha**2 * (mean @ mean + 2 * spread)
        return float(torch.linalg.eigvalsh(squared - 1.0 / self.size)[-1])

    def _rows(self, step: int) -> tuple[Row, ...]:
        draw = Random(f"matcha {self.seed} {step}")
        rows: list[Row] = [{} for _ in range(self.size)]
        for matching, probability in zip(self.matchings, self.probabilities, strict=True):
            if draw.random() < probability:
                for a, b in matching:
                    rows[a][b] = rows[b][a] = self.alpha
        for rank, row in enumerate(rows):
            own = 1.0 - sum(row.values())
            if own > _GRID / 2 or not row:
                row[rank] = own
        return tuple(dict(sorted(row.items())) for row in rows)

    @cached_property
    def _whole(self) -> FromGraph:
        return FromGraph(self.graph)

    def peers(self, rank: int) -> tuple[int, ...]:
        """Return the neighbours of `rank` in the graph: every edge is used sooner or later."""
        return self._whole.peers(rank)

    @property
    def is_symmetric(self) -> bool:
        """Whether W equals its transpose: yes, both ends of an edge give it the same weight."""
        return True

    @property
    def is_connected(self) -> bool:
        """Whether everybody hears of everybody: yes, the graph is connected and every edge is used sooner or later."""
        return True

    @property
    def is_bipartite(self) -> bool:
        """Whether the graph splits in two sides with all edges between them."""
        return self._whole.is_bipartite

    @cached_property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue of all rounds that can be: that of the round in which all edges are used."""
        return 1.0 - self.alpha * float(torch.linalg.eigvalsh(self._laplacians.sum(0))[-1])

    @cached_property
    def spectral_gap(self) -> float:
        """The gap `1 - sqrt(lambda_max(E[W^T W] - J))`: the mean-square factor of one round."""
        return 1.0 - sqrt(max(0.0, self._factor(self.alpha)))

    def rounds_to_consensus(self, tolerance: float = 1e-3) -> int | float:
        """Rounds until consensus with the draws of this seed, from step 0; another seed may need some more."""
        matrices = (self.mixing_matrix(step) for step in count())
        return rounds_until_unrepeated(self.size, matrices, tolerance)


def _most_connected(laplacians: Tensor, budget: float) -> Tensor:
    """Find the probabilities with the largest second-smallest eigenvalue of the mean, by conditional gradients.

    Each step goes towards the probabilities that are best for the slope: ones for the steepest, as far as the budget
    reaches.
    """
    matchings = len(laplacians)
    total = budget * matchings
    found = torch.full((matchings,), budget, dtype=torch.float64, device="cpu")
    best, most = found, -1.0
    for step in range(_SEARCHES):
        values, vectors = torch.linalg.eigh((found[:, None, None] * laplacians).sum(0))
        if float(values[1]) > most:
            best, most = found, float(values[1])
        # Of the smooth minimum of all eigenvalues but the first, which is 0: slopes of equal ones are shared out.
        shares = torch.softmax(-_SHARPNESS * values[1:] / values[-1], 0)
        slopes = (laplacians * ((vectors[:, 1:] * shares) @ vectors[:, 1:].T)).sum((1, 2))
        target = torch.zeros_like(found)
        for place, index in enumerate(slopes.argsort(descending=True, stable=True)):
            target[index] = min(1.0, max(0.0, total - place))
        found = torch.lerp(found, target, 2.0 / (step + 3))
    return best
