"""Numbers as people write them: ``200mbit``, ``5ms``, ``25.6e6``. The only place that reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from lightning_decentral.errors import ConfigurationError

_BANDWIDTHS = {
    "bit": 1 / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "tbit": 1e12 / 8,
    "B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12,
}  # fmt: skip
_DURATIONS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_LEAST = 1e-12  # seconds, or bytes per second, if not 0
_MOST_SECONDS = 1e9  # 30 years
_MOST_BYTES_PER_SECOND = 1e18
_MOST_WHOLE = 10**15
_MOST_FACTOR = 1e9
MOST_WORKERS = 4096
"""More are taken for a slip: a plan looks at each pair of them."""


def parse_seconds(option: str, text: str) -> float:
    """Seconds of a duration such as ``250ms``.

    Args:
        option: what the text was given for, for the error: ``--latency``, or ``delay:`` in a file.
        text: a number from 0 to 1e9 seconds and one of ``ns``, ``us``, ``ms``, ``s``, ``min``.

    Raises:
        ConfigurationError: if it is anything else.

    Example:
        >>> parse_seconds("--latency", "250us")
        0.00025
    """
    return _with_unit(option, text, _DURATIONS, _MOST_SECONDS, "a duration of at most 1e9s", "250ms")


def parse_bandwidth(option: str, text: str) -> float:
    """Return bytes per second of ``1gbit`` (bits per second) or ``125MB/s`` (bytes per second); ``inf`` is no limit.

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
    if text == "inf":
        return math.inf
    return _with_unit(
        option, text, _BANDWIDTHS, _MOST_BYTES_PER_SECOND, "a bandwidth of at most 1e6TB/s, or inf", "1gbit or 125MB/s"
    )


def whole_number(option: str, text: str, most: int = _MOST_WHOLE) -> int:
    """Return a whole number from 1 to ``most``, also as ``25.6e6``.

    Raises:
        ConfigurationError: if it is anything else.
    """
    value = _finite(text)
    if value is None or not 1 <= value <= most or value != int(value):
        raise ConfigurationError(
            f"{option} got {_short(text)}, needs a whole number of at least 1 and at most {most:g}. "
            f"Write for example {option} {min(16, most)}{', or 25.6e6' if most == _MOST_WHOLE else ''}."
        )
    return int(value)


def parse_factors(option: str, texts: Sequence[str]) -> dict[int, float]:
    """Rank -> factor, of texts such as ``3:10``.

    Raises:
        ConfigurationError: for anything else, and a factor that is not positive, or larger than 1e9.
    """
    factors: dict[int, float] = {}
    for text in texts:
        rank, _, value = text.partition(":")
        factor = _finite(value)
        if not re.fullmatch(r"[0-9]{1,9}", rank) or factor is None or not 0 < factor <= _MOST_FACTOR:
            raise ConfigurationError(
                f"{option} got {_short(text)}, needs RANK:FACTOR with a positive factor of at most {_MOST_FACTOR:g}. "
                f"Write for example {option} 3:10 for worker 3, ten times slower."
            )
        factors[int(rank)] = factor
    return factors


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _with_unit(option: str, text: str, units: Mapping[str, float], most: float, what: str, example: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z/]*)", text.strip())
    # Bits are written in any case (Gbit, gbit); in bytes per second the case tells B from bit, so it matters.
    written = "" if match is None else match[2]
    unit = written if written in units else written.lower()
    try:
        number = float(match[1]) if match is not None else math.nan
    except ValueError:
        number = math.nan
    if unit not in units or not (number == 0 or _LEAST <= number * units[unit] <= most):
        raise ConfigurationError(
            f"{option} got {_short(text)}, needs {what}: a number and one of {', '.join(units)}. "
            f"Write for example {option} {example}."
        )
    return number * units[unit]
