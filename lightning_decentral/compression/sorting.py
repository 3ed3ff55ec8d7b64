"""Sorting the rows of a matrix."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def sorted_rows(values: Tensor) -> Tensor:
    """Return each row in increasing order. On a CPU by numpy: several times faster than torch, which sorts positions
    along."""
    if values.device.type == "cpu":
        return torch.from_numpy(numpy.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values
