"""What the benchmarks share."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Trainer that prints and writes nothing."""


def logging_off() -> None:
    """Keep Lightning's notices out of the report."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def spread(values: Sequence[float], digits: str) -> str:
    """Mean, smallest and largest."""
    return f"{statistics.mean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def mean_and_error(values: Sequence[float], digits: str) -> str:
    """Mean of differences and its standard error, if there are several; nothing if there are none."""
    if len(values) < 2:
        return f"{values[0]:+{digits}}" if values else ""
    return f"{statistics.mean(values):+{digits}} ± {statistics.stdev(values) / math.sqrt(len(values)):{digits}}"
