"""What the benchmarks share."""

from __future__ import annotations

import logging


def logging_off() -> None:
    """Keep Lightning's notices out of the report."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
