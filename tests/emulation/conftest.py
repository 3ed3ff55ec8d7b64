"""Every run of these tests has a name of its own, so that they can run while other hosts are emulated; none leaves
anything behind."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from emulation.machines import left

_NUMBERS = itertools.count()


@pytest.fixture
def name() -> Iterator[str]:
    """Of a run, of which nothing may be left at the end."""
    own = f"test{os.getpid()}x{next(_NUMBERS)}"
    yield own
    assert left(own) == []
