"""What compressors check when they are built; all messages say what was got, what is needed and what to do."""

from __future__ import annotations

from math import isfinite

from lightning_decentral.errors import ConfigurationError


def require_at_least(kind: str, argument: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raise unless ``value`` is an ``int`` in the range."""
    high = "" if maximum is None else f" and at most {maximum}"
    bad_range = isinstance(value, int) and (value < minimum or (maximum is not None and value > maximum))
    if isinstance(value, bool) or not isinstance(value, int) or bad_range:
        raise ConfigurationError(
            f"{kind} got {argument}={value!r}, needs a whole number of at least {minimum}{high}. Pass for instance "
            f"{argument}={minimum}."
        )


def require_bucket(kind: str, bucket: int | None) -> None:
    """Raise unless ``bucket`` is a number of elements, or ``None`` for one bucket."""
    if bucket is not None:
        require_at_least(kind, "bucket", bucket, 1)


def require_ratio(kind: str, ratio: object) -> None:
    """Raise unless ``ratio`` is in (0, 1]."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ConfigurationError(
            f"{kind} got ratio={ratio!r}, needs a share of the elements in (0, 1]. Pass for instance ratio=0.01."
        )


def require_positive(kind: str, argument: str, value: object) -> None:
    """Raise unless ``value`` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value > 0):
        raise ConfigurationError(f"{kind} got {argument}={value!r}, needs a positive number. Pass one.")


def require_one_of(kind: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless ``value`` is one of the choices."""
    if value not in choices:
        raise ConfigurationError(
            f"{kind} got {argument}={value!r}, needs one of {', '.join(map(repr, choices))}. Pass one of these."
        )
