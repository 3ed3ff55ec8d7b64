"""Topologies that are the same at every step, from the sparsest (ring, star) to the densest (complete)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractPeriodicTopology
from lightning_decentral.topology.rows import Row, lazy_rows, metropolis_rows, uniform_rows
from lightning_decentral.topology.validation import (
    require_bool,
    require_integer,
    require_power_of_two,
    require_workers,
)


@final
@dataclass(frozen=True)
class Ring(AbstractPeriodicTopology):
    r"""Every worker averages with its two neighbours on a circle: `W[i, i-1] = W[i, i] = W[i, i+1] = 1/3`.

    The eigenvalues are `(1 + 2 cos(2 pi k / n)) / 3`: the gap shrinks like `1 / n^2` (use it for few workers), and for
    even n the smallest is exactly -1/3, the one value D2 just cannot use; `lazy=True` repairs that.

    Cost: 2 peers per step, 2 messages sent per worker.

    Args:
        size: number of workers, at least 3.
        lazy: use `(I + W) / 2`, with weights 1/6, 2/3, 1/6: no negative eigenvalues, half the gap.

    Raises:
        TopologyError: with fewer than 3 workers.

    Example:
        >>> from lightning_decentral.topology import Ring
        >>> ring = Ring(4)
        >>> ring.in_neighbors(0), round(ring.spectral_gap, 4), round(ring.smallest_eigenvalue, 4)
        ((1, 3), 0.6667, -0.3333)
        >>> round(Ring(4, lazy=True).smallest_eigenvalue, 4)
        0.3333

    References:
        Lian, Zhang, Zhang, Hsieh, Zhang, Liu, *Can Decentralized Algorithms Outperform Centralized Algorithms? A Case
        Study for Decentralized Parallel Stochastic Gradient Descent*, NeurIPS 2017, arXiv:1705.09056.
    """

    lazy: bool = False

    def _prepare(self) -> None:
        require_integer("Ring", "size", self.size)
        one_or_two = {1: "with one worker there is nothing to exchange.", 2: "with two workers it is the same graph."}
        require_workers("Ring", self.size, 3, f"Use Complete({self.size}): {one_or_two.get(self.size)}")
        require_bool("Ring", "lazy", self.lazy)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        rows = uniform_rows([((i - 1) % self.size, (i + 1) % self.size) for i in range(self.size)])
        return lazy_rows(rows) if self.lazy else rows


@final
@dataclass(frozen=True)
class Torus(AbstractPeriodicTopology):
    r"""A grid of rows x columns whose borders are joined; every worker averages with its four neighbours, weights 1/5.

    Worker `r * columns + c` sits in row r and column c. A dimension of 2 has one neighbour instead of two (both ways
    round lead to the same worker) and a dimension of 1 has none; all neighbours and oneself still weigh the same, so
    `Torus(1, n)` is `Ring(n)`. The gap shrinks like `1 / n` for a square, against `1 / n^2` for the ring.

    Cost: 4 peers per step (fewer with a dimension below 3).

    Args:
        rows: number of rows, at least 1.
        columns: number of columns, at least 1.
        lazy: use `(I + W) / 2`: no negative eigenvalues, half the gap.

    Attributes:
        size: `rows * columns`, at least 2.

    Example:
        >>> from lightning_decentral.topology import Torus
        >>> torus = Torus(rows=3, columns=4)
        >>> torus.size, torus.in_neighbors(0)
        (12, (1, 3, 4, 8))
        >>> torus
        Torus(rows=3, columns=4, lazy=False)

    References:
        The torus of Koloskova, Stich, Jaggi, *Decentralized Stochastic Optimization and Gossip Algorithms with
        Compressed Communication*, ICML 2019, arXiv:1902.00340.
    """

    size: int = field(init=False, repr=False)
    rows: int
    columns: int
    lazy: bool = False

    def _prepare(self) -> None:
        for name, value in (("rows", self.rows), ("columns", self.columns)):
            require_integer("Torus", name, value)
            if value < 1:
                raise TopologyError(
                    f"Torus needs at least one row and one column, got {name}={value}. Choose rows and columns whose "
                    f"product is the number of workers."
                )
        require_bool("Torus", "lazy", self.lazy)
        object.__setattr__(self, "size", self.rows * self.columns)
        require_workers("Torus", self.size, 2, "Use Complete(1): with one worker there is nothing to exchange.")

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        neighbors = []
        for rank in range(self.size):
            r, c = divmod(rank, self.columns)
            across = {(r, (c - 1) % self.columns), (r, (c + 1) % self.columns)}
            along = {((r - 1) % self.rows, c), ((r + 1) % self.rows, c)}
            neighbors.append({i * self.columns + j for i, j in across | along})
        rows = uniform_rows(neighbors)
        return lazy_rows(rows) if self.lazy else rows


@final
@dataclass(frozen=True)
class Hypercube(AbstractPeriodicTopology):
    r"""Workers are neighbours when their ranks differ in one binary digit; weights `1 / (1 + log2 n)`. Static.

    The gap is `2 / (1 + log2 n)`. The smallest eigenvalue, `(1 - log2 n) / (1 + log2 n)`, is too low for D2 from n = 4.
    Not to be confused with `HypercubeMatching`, which uses one of these edges per step and averages exactly.

    Cost: log2 n peers per step.

    Args:
        size: number of workers, a power of two, at least 2.

    Example:
        >>> from lightning_decentral.topology import Hypercube
        >>> Hypercube(8).in_neighbors(5)
        (1, 4, 7)
    """

    def _prepare(self) -> None:
        require_workers("Hypercube", self.size, 2, "Use Complete(1): with one worker there is nothing to exchange.")
        require_power_of_two("Hypercube", self.size, "Use Exponential, which takes any number of workers.")

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        digits = self.size.bit_length() - 1
        return uniform_rows([[rank ^ (1 << digit) for digit in range(digits)] for rank in range(self.size)])


@final
@dataclass(frozen=True)
class Complete(AbstractPeriodicTopology):
    r"""Everyone averages with everyone, weights `1 / n`: one round gives every worker the exact mean (W = J).

    Note that D-PSGD on it is not synchronous SGD: each worker still applies its own last gradient after mixing.

    Cost: n - 1 peers per step; where an exact mean is wanted, an all-reduce sends far less.

    Args:
        size: number of workers, at least 1 (one worker exchanges nothing).

    Example:
        >>> from lightning_decentral.topology import Complete
        >>> Complete(4).weights(rank=0, step=0)
        {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}
    """

    def _prepare(self) -> None:
        require_workers("Complete", self.size, 1)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        return (dict.fromkeys(range(self.size), 1 / self.size),) * self.size  # one row, shared: n^2 would be large


@final
@dataclass(frozen=True)
class Star(AbstractPeriodicTopology):
    r"""Rank 0 averages with everyone, the others only with rank 0; Metropolis-Hastings weights `1 / n` on all edges.

    The hub keeps `1 / n` and every other worker `1 - 1 / n`: the gap is `1 / n` (n > 2), because the hub's answer moves
    a worker only a little. This is gossip on a star, not a parameter server, which would overwrite the workers' models.

    Cost: n - 1 peers per step for rank 0, which is the bottleneck; 1 for the others.

    Args:
        size: number of workers, at least 2.

    Example:
        >>> from lightning_decentral.topology import Star
        >>> Star(4).weights(rank=3, step=0)
        {0: 0.25, 3: 0.75}

    References:
        Weights: Xiao, Boyd, Lall, *A scheme for robust distributed sensor fusion based on average consensus*,
        IPSN 2005.
    """

    def _prepare(self) -> None:
        require_workers("Star", self.size, 2, "Use Complete(1): with one worker there is nothing to exchange.")

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        return metropolis_rows([range(1, self.size), *[(0,)] * (self.size - 1)])


@final
@dataclass(frozen=True)
class Exponential(AbstractPeriodicTopology):
    r"""Static exponential graph: worker i receives from `i + 2^k (mod n)`, k = 0 .. ceil(log2 n) - 1. Directed.

    All weights, oneself included, are `1 / (1 + ceil(log2 n))`. For even n the gap is exactly
    `2 / (1 + ceil(log2 n))`: much faster than a ring or torus at many workers. W is doubly stochastic but not
    symmetric, so methods that need symmetry (D2, pairwise averaging) cannot use it.

    Cost: ceil(log2 n) peers per step; `OnePeerExponential` spreads them over as many steps.

    Args:
        size: number of workers, at least 2.

    Example:
        >>> from lightning_decentral.topology import Exponential
        >>> graph = Exponential(8)
        >>> graph.in_neighbors(0), graph.out_neighbors(0), round(graph.spectral_gap, 12)
        ((1, 2, 4), (4, 6, 7), 0.5)

    References:
        Ying, Yuan, Chen, Hu, Pan, Yin, *Exponential Graph is Provably Efficient for Decentralized Deep Training*,
        NeurIPS 2021.
    """

    def _prepare(self) -> None:
        require_workers("Exponential", self.size, 2, "Use Complete(1): with one worker there is nothing to exchange.")

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 1, as every step is the same."""
        return 1

    def _rows(self, step: int) -> tuple[Row, ...]:
        hops = [1 << k for k in range((self.size - 1).bit_length())]
        return uniform_rows([[(rank + hop) % self.size for hop in hops] for rank in range(self.size)])
