"""Which part of the learning rate is taken at a share of the batches."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]
"""From a share of the batches, between 0 and 1, to a part of the learning rate."""


def constant(share: float) -> float:
    """Keep the learning rate."""
    return 1.0


def falling(share: float) -> float:
    """Let the learning rate fall to 0, as a cosine."""
    return (1.0 + math.cos(math.pi * share)) / 2


def decaying(share: float) -> float:
    """Let the learning rate fall to 0 by power 2."""
    return (1.0 - share) ** 2


def warmed_up(share: float) -> float:
    """Begin with a quarter of the learning rate, reach it after a fifth of the batches, then let it fall by power 2."""
    return 0.25 + 0.75 * share / 0.2 if share < 0.2 else ((1.0 - share) / 0.8) ** 2
