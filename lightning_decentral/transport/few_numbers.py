"""Reducing the few numbers that all workers bring to a meeting: metrics and decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "product": torch.prod,
    "max": torch.amax,
    "min": torch.amin,
}


def operation_of(reduce_op: Any) -> str:
    """Return the name of a reduction, which may be one of torch's, or none: a mean."""
    name = str(reduce_op).rpartition(".")[2].lower()
    return "mean" if name in ("avg", "none") else name


def is_reduction(operation: str) -> bool:
    """Tell whether `reduced` knows this one."""
    return operation in _REDUCTIONS


def reduced(rows: Tensor, operation: str) -> Tensor:
    """Reduce the values of all workers, ``[workers, ...]``; a mean of whole numbers is cut off, as Lightning's is."""
    if operation == "mean" and not rows.is_floating_point():
        return rows.double().mean(0).to(rows.dtype)
    return _REDUCTIONS[operation](rows, 0)
