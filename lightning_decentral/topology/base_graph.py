"""The base-(k+1) graph: an exact average in a few rounds, for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import final

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractPeriodicTopology
from lightning_decentral.topology.rows import Row
from lightning_decentral.topology.validation import require_integer, require_workers

Round = dict[frozenset[int], float]
"""The edges of one round, and their weights."""


@final
@dataclass(frozen=True)
class BaseGraph(AbstractPeriodicTopology):
    r"""Every worker has the exact mean after a few rounds, with at most `degree` peers in each, for *any* number of
    them.

    `OnePeerExponential` and `HypercubeMatching` are exact for powers of two only. With k peers, workers are cut into
    blocks whose sizes are the digits of n in base k + 1. Each block averages within itself; smaller blocks exchange
    with larger ones, by weights that count how many workers each stands for; then the larger ones average again. If n
    has a factor without primes above k + 1, groups of equal size do this, and then average with each other; the shorter
    way is taken. The rounds are symmetric and repeat after at most `2 log(n) / log(k + 1) + 2`.

    Cost: at most `degree` peers per step; some workers have none in some rounds.

    Args:
        size: number of workers, at least 2.
        degree: the paper's k, at least 1: peers per round at most.

    Example:
        >>> from lightning_decentral.topology import BaseGraph
        >>> BaseGraph(6).rounds_to_consensus(1e-12), BaseGraph(12, degree=2).rounds_to_consensus(1e-12)
        (4, 3)

    References:
        Takezawa, Sato, Bao, Niwa, Yamada, *Beyond Exponential Graph: Communication-Efficient Topologies for
        Decentralized Learning via Finite-time Convergence*, NeurIPS 2023, arXiv:2305.11420.
    """

    degree: int = 1

    def _prepare(self) -> None:
        require_workers("BaseGraph", self.size, 2, "Use Complete(1): with one worker there is nothing to exchange.")
        require_integer("BaseGraph", "degree", self.degree)
        if self.degree < 1:
            raise TopologyError(f"BaseGraph needs a degree of at least 1, got {self.degree}. Use 1 for pairs.")

    @property
    def period(self) -> int:
        """The rounds until the average is exact."""
        return len(self._rounds)

    @cached_property
    def _rounds(self) -> list[Round]:
        base, workers = self.degree + 1, list(range(self.size))
        smooth, rest = _smooth_part(self.size, base)
        groups = [workers[first::smooth] for first in range(smooth)]
        across = [list(members) for members in zip(*groups, strict=True)]
        factored = [*_together(_simple(group, base) for group in groups)] if rest > 1 else []
        factored += _together(_hypercube(members, _factors(smooth, base)) for members in across)
        return min(_simple(workers, base), factored, key=len)

    def _rows(self, step: int) -> tuple[Row, ...]:
        rows: list[Row] = [{} for _ in range(self.size)]
        for edge, weight in self._rounds[step].items():
            a, b = sorted(edge)
            rows[a][b] = rows[b][a] = weight
        for rank, row in enumerate(rows):
            row[rank] = 1 - sum(row.values())
        return tuple(dict(sorted((source, w) for source, w in row.items() if w > 1e-15)) for row in rows)


def _simple(workers: Sequence[int], base: int) -> list[Round]:
    """Return the rounds of the simple base-(k+1) graph."""
    sizes = _digits(len(workers), base)  # (digit, power of the base), the largest first
    blocks: list[list[list[int]]] = []  # of each digit its blocks
    rest = list(workers)
    for digit, power in sizes:
        blocks.append([rest[part * power : (part + 1) * power] for part in range(digit)])
        rest = rest[digit * power :]
    rounds = _together(
        _hypercube([worker for block in group for worker in block], _factors(power, base) + _factors(digit, base))
        for group, (digit, power) in zip(blocks, sizes, strict=True)
    )
    later: list[list[Round]] = []
    for number, (group, (digit, power)) in enumerate(zip(blocks[:-1], sizes[:-1], strict=True)):
        smaller = [worker for others in blocks[number + 1 :] for block in others for worker in block]
        weight = power / (digit * power + len(smaller))
        exchange = {
            frozenset((worker, block[place])): weight for place, worker in enumerate(smaller) for block in group
        }
        again = _together(_hypercube(block, _factors(power, base)) for block in group)
        later.append([*({} for _ in range(number)), exchange, *again])
    return [*rounds, *_together(later)]


def _hypercube(members: Sequence[int], factors: Sequence[int]) -> list[Round]:
    """Rounds after which members have their mean: those that differ in one digit of a mixed base average in each."""
    rounds, stride = [], 1
    for factor in factors:
        edges: Round = {}
        for place, worker in enumerate(members):
            digit = place // stride % factor
            for other in range(digit + 1, factor):
                edges[frozenset((worker, members[place + (other - digit) * stride]))] = 1 / factor
        rounds.append(edges)
        stride *= factor
    return rounds


def _together(lists: Iterator[list[Round]] | Sequence[list[Round]]) -> list[Round]:
    """Rounds of different workers at the same time."""
    rounds = []
    for parts in zip_longest(*lists, fillvalue={}):
        joined: Round = {}
        for part in parts:
            joined |= part
        rounds.append(joined)
    return rounds


def _digits(number: int, base: int) -> list[tuple[int, int]]:
    """Return the digits of a number that are not zero, with their powers, the largest first."""
    digits, power = [], 1
    while number:
        number, digit = divmod(number, base)
        if digit:
            digits.append((digit, power))
        power *= base
    return digits[::-1]


def _smooth_part(number: int, largest: int) -> tuple[int, int]:
    """Return a number as the product of its primes up to ``largest``, and the rest."""
    smooth = 1
    for prime in range(2, largest + 1):
        while number % prime == 0:
            number, smooth = number // prime, smooth * prime
    return smooth, number


def _factors(number: int, largest: int) -> list[int]:
    """Factors of at most ``largest`` whose product is a number without larger primes; large ones first."""
    factors = []
    while number > 1:
        factor = next(factor for factor in range(min(largest, number), 1, -1) if number % factor == 0)
        factors.append(factor)
        number //= factor
    return factors
