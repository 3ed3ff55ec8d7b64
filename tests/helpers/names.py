"""Values in the names of tests, which must be the same in every process that runs some of them; and in failures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

_PLACE = re.compile(r" at 0x[0-9a-f]+")


def told(value: object) -> str:
    """A value as part of a test's name: without places in memory, and sets in order."""
    return _PLACE.sub("", str(sorted(value) if isinstance(value, set) else value))


@contextmanager
def naming(value: object) -> Iterator[None]:
    """Let what fails name one of the many values that a test tries; tests by the thousand cost more than their work."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {value}")
        raise


def refuse_places(items: Iterable[pytest.Item]) -> None:
    """Refuse names with places in memory: processes that share the tests would not find each other's."""
    for item in items:
        if _PLACE.search(item.nodeid):
            raise pytest.UsageError(
                f"{item.nodeid} got a place in memory in its name, which is another one in every process. Name the "
                "parameter with ids=helpers.names.told."
            )
