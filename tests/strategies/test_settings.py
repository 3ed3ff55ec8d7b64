"""Proved here: each of Lightning's settings does under our strategies what the table on the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from strategies.settings import RECORD, SETTINGS, STRATEGIES, WORKS, outcome

KNOWN: dict[str, dict[str, str]] = json.loads(RECORD.read_text())


def test_the_table_has_every_setting() -> None:
    assert list(KNOWN) == list(SETTINGS)
    assert all(tuple(row) == STRATEGIES for row in KNOWN.values())


def test_what_works_with_ddp_works_or_is_refused_with_words() -> None:
    for name, row in KNOWN.items():
        for strategy, what in row.items():
            assert row["ddp"] != WORKS or what == WORKS or what.startswith("ConfigurationError: "), (name, strategy)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in STRATEGIES[:-1]:
        folder = tmp_path / strategy
        folder.mkdir()
        monkeypatch.chdir(folder)
        got, expected = outcome(SETTINGS[name], strategy, folder), KNOWN[name][strategy]
        assert got.split()[:8] == expected.split()[:8], strategy  # the end may name a rank or a step
