"""Proved here: each of Lightning's settings does under our strategies what the table on the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.workers import kept_workers

from strategies.settings import RECORD, SETTINGS, STRATEGIES, WORKS, outcome, outcome_on_a_worker

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
    """On workers that were started, as by ``torchrun``; where another number of them or a second fit is the point, the
    `Trainer` forks them."""
    setting = SETTINGS[name]
    for strategy in STRATEGIES[:-1]:
        folder = tmp_path / strategy
        folder.mkdir()
        if setting.then is not None or "devices" in setting.trainer:
            monkeypatch.chdir(folder)
            got = {outcome(setting, strategy, folder)}
        else:
            got = set(kept_workers(2).run(outcome_on_a_worker, name, strategy, folder))
        got -= {
            each for each in got if each.startswith("WorkerFailed: ") and len(got) > 1
        }  # whose cause the other told
        expected = KNOWN[name][strategy]
        assert [each.split()[:8] for each in got] == [expected.split()[:8]], (
            strategy
        )  # the end may name a rank or a step
