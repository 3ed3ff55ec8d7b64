"""Waiting for a state that somebody else brings about."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Look again and again whether something holds.

    Args:
        condition: it holds once this gives true.
        what: one waits for, for the error.
        seconds: that it may take.

    Raises:
        AssertionError: if it does not hold by then.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
