"""Time-varying topologies where every worker talks to at most one other per step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import sqrt
from random import Random
from typing import final

from lightning_decentral.topology.base import AbstractPeriodicTopology, AbstractTopology
from lightning_decentral.topology.rows import Row, pair_rows, uniform_rows
from lightning_decentral.topology.spectrum import rounds_until_unrepeated
from lightning_decentral.topology.validation import (
    require_even,
    require_integer,
    require_power_of_two,
    require_workers,
)

_ALONE = "Use Complete(1): with one worker there is nothing to exchange."


@final
@dataclass(frozen=True)
class OnePeerExponential(AbstractPeriodicTopology):
    r"""One edge of the exponential graph per step: `x_i <- (x_i + x_j) / 2`, `j = i + 2^(t mod p) (mod n)`. Directed.

    The period is `p = ceil(log2 n)`. Where n is a power of two, any p consecutive rounds average exactly; for other n
    they never do, but come close (see `spectral_gap`). Worker i receives from j and sends to another one, so W is not
    symmetric; `HypercubeMatching` is the symmetric counterpart.

    Cost: 1 message sent and 1 received per worker and step, whatever n is.

    Args:
        size: number of workers, at least 2.

    Example:
        >>> from lightning_decentral.topology import OnePeerExponential
        >>> graph = OnePeerExponential(8)
        >>> [graph.in_neighbors(rank=0, step=t) for t in range(4)]
        [(1,), (2,), (4,), (1,)]
        >>> graph.rounds_to_consensus(tolerance=1e-12)
        3

    References:
        Ying, Yuan, Chen, Hu, Pan, Yin, *Exponential Graph is Provably Efficient for Decentralized Deep Training*,
        NeurIPS 2021. Used before with push-sum by Assran, Loizou, Ballas, Rabbat, *Stochastic Gradient Push for
        Distributed Deep Learning*, ICML 2019, arXiv:1811.10792.
    """

    def _prepare(self) -> None:
        require_workers("OnePeerExponential", self.size, 2, _ALONE)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: `ceil(log2 n)`, the number of different hops."""
        return (self.size - 1).bit_length()

    def _rows(self, step: int) -> tuple[Row, ...]:
        return uniform_rows([((rank + (1 << step)) % self.size,) for rank in range(self.size)])


@final
@dataclass(frozen=True)
class HypercubeMatching(AbstractPeriodicTopology):
    r"""At step t all pairs whose ranks differ in binary digit `t mod log2 n` average: `x_i, x_j <- (x_i + x_j) / 2`.

    Symmetric, and any log2 n consecutive rounds give every worker the exact mean. This is the recursive doubling of
    all-reduce, with training steps between its rounds. Each W is a projector (eigenvalues 0 and 1), yet D2 diverges on
    it from n = 8: its proof, and its good behaviour, need the same W at every step.

    Cost: 1 peer per step.

    Args:
        size: number of workers, a power of two, at least 2.

    Example:
        >>> from lightning_decentral.topology import HypercubeMatching
        >>> graph = HypercubeMatching(8)
        >>> [graph.in_neighbors(rank=0, step=t) for t in range(4)]
        [(1,), (2,), (4,), (1,)]
        >>> graph.spectral_gap
        1.0
    """

    def _prepare(self) -> None:
        require_workers("HypercubeMatching", self.size, 2, _ALONE)
        advice = "Use OnePeerExponential (directed) or AlternatingMatching (even numbers)."
        require_power_of_two("HypercubeMatching", self.size, advice)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: `log2 n`, the number of binary digits of a rank."""
        return (self.size - 1).bit_length()

    def _rows(self, step: int) -> tuple[Row, ...]:
        digit = 1 << step
        return pair_rows(self.size, [(rank, rank | digit) for rank in range(self.size) if not rank & digit])


@final
@dataclass(frozen=True)
class AlternatingMatching(AbstractPeriodicTopology):
    r"""Pairs along a ring that alternate: even steps average (0, 1), (2, 3), ..., odd steps (1, 2), ..., (n-1, 0).

    Symmetric, weights 1/2. Each worker only ever talks to its two ring neighbours, one per step.

    Cost: 1 peer per step.

    Args:
        size: number of workers, even, at least 2.

    Example:
        >>> from lightning_decentral.topology import AlternatingMatching
        >>> graph = AlternatingMatching(6)
        >>> [graph.in_neighbors(rank=0, step=t) for t in range(4)]
        [(1,), (5,), (1,), (5,)]
    """

    def _prepare(self) -> None:
        require_workers("AlternatingMatching", self.size, 2, _ALONE)
        require_even(
            "AlternatingMatching", self.size, "Use OnePeerExponential or RandomMatching, which take any number."
        )

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 2; 1 with two workers, who form the same pair at every step."""
        return 1 if self.size == 2 else 2

    def _rows(self, step: int) -> tuple[Row, ...]:
        return pair_rows(self.size, [(rank, (rank + 1) % self.size) for rank in range(step, self.size, 2)])


@final
@dataclass(frozen=True)
class RandomMatching(AbstractTopology):
    r"""At every step the workers are paired at random, all pairings equally likely: `x_i, x_j <- (x_i + x_j) / 2`.

    The pairing of step t is drawn from `(seed, t)`, so all workers agree on it without a message, and a resumed run
    continues with the pairings it would have had. With an odd number one worker idles. The rounds never repeat
    (`period` is 0). W is a projector, so `E[W^T W] = E[W]`, and the expected factor per round is known: the squared
    distance from consensus shrinks by `(n - 2) / (2 (n - 1))` for even n and by 1/2 for odd n, whatever n is.

    Cost: at most 1 peer per step.

    Args:
        size: number of workers n, at least 2.
        seed: any whole number that all workers share. Default 0.

    Raises:
        TopologyError: for fewer workers, or a size or seed that is no whole number.

    Example:
        >>> from lightning_decentral.topology import RandomMatching
        >>> graph = RandomMatching(6, seed=1)
        >>> graph.edges(step=3) == RandomMatching(6, seed=1).edges(step=3)
        True
        >>> graph.period, round(graph.spectral_gap, 4)
        (0, 0.3675)

    References:
        Stephen Boyd, Arpita Ghosh, Balaji Prabhakar, Devavrat Shah. *Randomized Gossip Algorithms.* IEEE Transactions
        on Information Theory 52 (6), pages 2508 to 2530, 2006: there one random pair at a time averages.
    """

    seed: int = 0

    def _prepare(self) -> None:
        require_workers("RandomMatching", self.size, 2, _ALONE)
        require_integer("RandomMatching", "seed", self.seed)

    @property
    def period(self) -> int:
        """The number of rounds until they repeat: 0, as they never do."""
        return 0

    def _rows(self, step: int) -> tuple[Row, ...]:
        order = list(range(self.size))
        # Seeded with a text: hashed by SHA-512, the same on every machine, and (1, 12) cannot meet (11, 2).
        Random(f"random matching {self.seed} {step}").shuffle(order)
        return pair_rows(self.size, zip(order[0::2], order[1::2], strict=False))

    def peers(self, rank: int) -> tuple[int, ...]:
        """Everyone else: every pair meets sooner or later."""
        self._require_rank(rank)
        return self._everyone[:rank] + self._everyone[rank + 1 :]

    @cached_property
    def _everyone(self) -> tuple[int, ...]:
        return tuple(range(self.size))

    @property
    def is_symmetric(self) -> bool:
        """Whether W equals its transpose: yes, both members of a pair take their average."""
        return True

    @property
    def is_connected(self) -> bool:
        """Whether everybody hears of everybody: yes, every pair meets sooner or later."""
        return True

    @property
    def is_bipartite(self) -> bool:
        """Whether workers fall into two halves that only talk to each other: not with more than two."""
        return self.size == 2

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest eigenvalue: 0, as every W is a projector."""
        return 0.0

    @property
    def spectral_gap(self) -> float:
        """The gap `1 - sqrt(lambda_max(E[W^T W] - J))`: the mean-square factor of one round, in closed form."""
        n = self.size
        return 1 - sqrt(0.5 if n % 2 else (n - 2) / (2 * (n - 1)))

    def rounds_to_consensus(self, tolerance: float = 1e-3) -> int | float:
        """Rounds until consensus with the pairings of this seed, from step 0; another seed may need a few more."""
        matrices = (self.mixing_matrix(step) for step in count())
        return rounds_until_unrepeated(self.size, matrices, tolerance)
