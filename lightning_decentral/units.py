"""Numbers as people write them: ``200mbit``, ``5ms``, ``25.6e6``. The only place that reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from lightning_decentral.errors import ConfigurationError

_BANDWIDTHS = {
    "bit": 1 / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "tbit": 1e12 / 8,
    "B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12,
}  # fmt: skip
_DURATIONS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_seconds(option: str, text: str) -> float:
    """Seconds of a duration such as ``250ms``.

    Args:
        option: what the text was given for, for the error: ``--latency``, or ``delay:`` in a file.
        text: a number >= 0 and one of ``ns``, ``us``, ``ms``, ``s``, ``min``.

    Raises:
        ConfigurationError: if it is anything else.

    Example:
        >>> parse_seconds("--latency", "250us")
        0.00025
    """
    return _with_unit(option, text, _DURATIONS, "a duration", "250ms")


def parse_bandwidth(option: str, text: str) -> float:
    """Bytes per second of ``1gbit`` (bits per second) or ``125MB/s`` (bytes per second); ``inf`` is no limit.

    Args:
        option: what the text was given for, for the error: ``--bandwidth``, or ``rate:`` in a file.
        text: a number >= 0 and one of ``bit``, ``kbit``, ``mbit``, ``gbit``, ``tbit`` (in any case), ``B/s``, ``kB/s``,
            ``MB/s``, ``GB/s``, ``TB/s``; or ``inf``. Prefixes are decimal.

    Raises:
        ConfigurationError: if it is anything else.

    Example:
        >>> parse_bandwidth("--bandwidth", "1gbit"), parse_bandwidth("--bandwidth", "125MB/s")
        (125000000.0, 125000000.0)
    """
    return math.inf if text == "inf" else _with_unit(option, text, _BANDWIDTHS, "a bandwidth", "1gbit or 125MB/s")


def whole_number(option: str, text: str) -> int:
    """A positive whole number, also as ``25.6e6``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 1 and math.isfinite(value) and value == int(value)):
        raise ConfigurationError(
            f"{option} got {text!r}, needs a whole number of at least 1. Write for example {option} 16, or 25.6e6."
        )
    return int(value)


def _with_unit(option: str, text: str, units: Mapping[str, float], what: str, example: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z/]*)", text.strip())
    # Bits are written in any case (Gbit, gbit); in bytes per second the case tells B from bit, so it matters.
    written = "" if match is None else match[2]
    unit = written if written in units else written.lower()
    try:
        number = float(match[1]) if match is not None else math.nan
    except ValueError:
        number = math.nan
    if unit not in units or not number >= 0:
        raise ConfigurationError(
            f"{option} got {text!r}, needs {what}: a number and one of {', '.join(units)}. "
            f"Write for example {option} {example}."
        )
    return number * units[unit]
