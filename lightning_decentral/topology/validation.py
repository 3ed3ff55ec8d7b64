"""What every topology checks when it is built; all messages say what was got, what is needed and what to do."""

from __future__ import annotations

from math import fsum, isfinite
from typing import TYPE_CHECKING

from lightning_decentral.errors import TopologyError

if TYPE_CHECKING:
    from lightning_decentral.topology.rows import Row

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
