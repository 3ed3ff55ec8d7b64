"""Every run of these tests has a name of its own, so that they can run while other hosts are emulated; none leaves
anything behind."""

from __future__ import annotations

import fcntl
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulation.machines import left

_NUMBERS = itertools.count()
_LOCK = Path(tempfile.gettempdir()) / "lightning_decentral_tests_clean.lock"


@pytest.fixture
def name() -> Iterator[str]:
    """Of a run, of which nothing may be left at the end."""
    own = f"test{os.getpid()}x{next(_NUMBERS)}"
    yield own
    assert left(own) == []


@pytest.fixture
def the_only_one_that_cleans() -> Iterator[None]:
    """Whoever calls ``--clean`` removes what killed emulators have left, whichever test has killed them."""
    with open(_LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
