"""What every topology checks when it is built; all messages say what was got, what is needed and what to do."""

from __future__ import annotations

from math import fsum, isfinite
from typing import TYPE_CHECKING, Literal

from lightning_decentral.errors import TopologyError

if TYPE_CHECKING:
    from lightning_decentral.topology.base import AbstractTopology
    from lightning_decentral.topology.rows import Row

Stochastic = Literal["doubly", "column"]
"""Whether rows and columns of a mixing matrix sum to one, or only its columns."""

# 512 weights such as 1/3 or 1/(1 + degree), each rounded to a float64, add up to one within 1e-13.
STOCHASTIC_TOLERANCE = 1e-12


def require_integer(kind: str, argument: str, value: object) -> None:
    """Raise unless ``value`` is an ``int`` (``True`` is not one here, nor is ``"8"``)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TopologyError(
            f"{kind} needs `{argument}` to be an int, got {value!r} ({type(value).__name__}). "
            f"Pass a whole number, for instance {argument}=8."
        )


def require_bool(kind: str, argument: str, value: object) -> None:
    """Raise unless ``value`` is ``True`` or ``False`` (guards against ``Ring(8, 3)``)."""
    if not isinstance(value, bool):
        raise TopologyError(
            f"{kind} needs `{argument}` to be True or False, got {value!r} ({type(value).__name__}). "
            f"Write {argument}=True or leave it out."
        )


def require_workers(kind: str, size: int, minimum: int, advice: str = "") -> None:
    """Raise unless there are at least ``minimum`` workers; ``advice`` is what to do with fewer (but at least one)."""
    require_integer(kind, "size", size)
    if size < minimum:
        do = advice if advice and size >= 1 else f"Use {minimum} or more."
        raise TopologyError(f"{kind} needs at least {_workers(minimum)}, got {size}. {do}")


def require_even(kind: str, size: int, advice: str) -> None:
    """Raise unless ``size`` is even."""
    if size % 2:
        raise TopologyError(f"{kind} needs an even number of workers, got {size}. {advice}")


def require_power_of_two(kind: str, size: int, advice: str) -> None:
    """Raise unless ``size`` is a power of two."""
    if size & (size - 1):
        raise TopologyError(f"{kind} needs a power of two (2, 4, 8, ...) as number of workers, got {size}. {advice}")


def require_stochastic(method: str, topology: AbstractTopology, need: Stochastic) -> None:
    """Refuse a topology whose weights a method cannot use; doubly stochastic ones are column stochastic, too.

    Args:
        method: for messages.
        topology: its graph.
        need: what it needs.

    Raises:
        TopologyError: if only the columns sum to one, and the rows should as well.
    """
    if need == "doubly" and topology.stochastic != "doubly":
        raise TopologyError(
            f"{method} needs a doubly stochastic topology, got {topology!r}, of which only the columns sum to one: its "
            "models would not agree. Use a topology as Ring or Exponential, or a method that corrects the weights, as "
            "push-sum does."
        )


def require_weights(kind: str, rows: tuple[Row, ...], stochastic: Stochastic) -> None:
    """Raise unless the weights are finite and non-negative, and their sums are what they are said to be.

    Args:
        kind: of the topology.
        rows: its weights.
        stochastic: which sums are one.
    """
    if stochastic == "doubly":
        require_doubly_stochastic(kind, rows)
        return
    totals = [0.0] * len(rows)
    for rank, row in enumerate(rows):
        for source, weight in row.items():
            if not (isfinite(weight) and weight >= 0):
                raise TopologyError(
                    f"{kind} needs finite, non-negative weights, got W[{rank}, {source}] = {weight}. "
                    f"Remove that edge or give it a positive weight."
                )
            totals[source] += weight
    for rank, total in enumerate(totals):
        if abs(total - 1) > STOCHASTIC_TOLERANCE:
            raise TopologyError(
                f"{kind} needs a column stochastic matrix, got column {rank} with sum {total!r}: values would be lost. "
                f"Make what a worker gives away, with what it keeps, sum to 1 within {STOCHASTIC_TOLERANCE:g}."
            )


def require_doubly_stochastic(kind: str, rows: tuple[Row, ...], rounding: float = 0.0) -> None:
    """Raise unless the weights are finite, non-negative, and all rows and columns sum to one within 1e-12.

    Args:
        kind: of the topology.
        rows: its weights.
        rounding: by which weights may be negative, and sums may be off; its caller takes that away.
    """
    tolerance = max(rounding, STOCHASTIC_TOLERANCE)
    columns = [0.0] * len(rows)
    for rank, row in enumerate(rows):
        for source, weight in row.items():
            if not (isfinite(weight) and weight >= -rounding):
                beyond = f", which is more than rounding ({rounding:g})" if -1 < weight < 0 < rounding else ""
                raise TopologyError(
                    f"{kind} needs finite, non-negative weights, got W[{rank}, {source}] = {weight}{beyond}. "
                    f"Remove that edge or give it a positive weight."
                )
            columns[source] += weight
        total = fsum(row.values())
        if abs(total - 1) > tolerance:
            raise TopologyError(
                f"{kind} needs a doubly stochastic matrix, got row {rank} with sum {total!r}. "
                f"Make every row and every column sum to 1 within {tolerance:g}."
            )
    for rank, total in enumerate(columns):
        if abs(total - 1) > tolerance:
            raise TopologyError(
                f"{kind} needs a doubly stochastic matrix, got column {rank} with sum {total!r}: the average of the "
                f"models would drift. Make every column sum to 1 within {tolerance:g}, for instance with "
                f"a symmetric matrix, or give the graph to FromGraph, which computes the weights."
            )


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
