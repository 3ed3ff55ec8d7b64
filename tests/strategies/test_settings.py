"""Proved here: each of Lightning's settings does under our strategies what the table on the page says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.workers import kept_workers

from strategies.settings import RECORD, SETTINGS, STRATEGIES, WORKS, outcome, outcome_on_a_worker

KNOWN: dict[str, dict[str, str]] = json.loads(RECORD.read_text())


# D2 and synchronous SGD run under the strategy of D-PSGD, and differ in what they make of an update. So they are tried
# with the settings from optimizers to gradients, and with those that change updates, accumulate or stop.
# One of the optimizers, and of the schedules, stands for those that are called like it.
_NAMES = list(SETTINGS)
UPDATES = {
    *_NAMES[_NAMES.index("manual optimization") : _NAMES.index("log(on_step=True)")],
    *("Adam", "LBFGS", "two parameter groups", "no optimizer", "ReduceLROnPlateau"),
    *("max_steps=5", "accumulate_grad_batches=3", "gradient_clip_val=0.5", "StochasticWeightAveraging", "ModelPruning"),
    *("BackboneFinetuning", "Callback.on_train_batch_end that clamps", "BatchNorm", "a frozen backbone"),
    *("EarlyStopping('val_loss')", "a last batch that is smaller", "fit(ckpt_path=...) after fit"),
}
# A pipeline is tried with what looks at weights, metrics or batches in a way of its own.
PIPELINE = {
    *(
        "max_steps=5",
        "val_check_interval=2",
        "StochasticWeightAveraging with BatchNorm",
        "WeightAveraging",
        "ModelPruning",
    ),
    *("BaseFinetuning", "LearningRateFinder", "Adagrad", "IterableDataset", "no optimizer", "all_gather in the step"),
}


def test_the_table_has_every_setting() -> None:
    assert list(KNOWN) == list(SETTINGS)
    assert all(tuple(row) == STRATEGIES for row in KNOWN.values())


def test_what_works_with_ddp_works_or_is_refused_with_words() -> None:
    for name, row in KNOWN.items():
        for strategy, what in row.items():
            if name not in UPDATES and strategy in ("d2", "sync_sgd"):
                assert what == row["dpsgd"], (name, strategy)
            assert row["ddp"] != WORKS or what == WORKS or what.startswith("ConfigurationError: "), (name, strategy)


@pytest.mark.usefixtures("kept_forks")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On workers that were started, as by ``torchrun``; where another number of them or a second fit is the point, the
    `Trainer` forks them."""
    setting = SETTINGS[name]
    for strategy in (
        *(("dpsgd", "d2", "sync_sgd", "adpsgd") if name in UPDATES else ("dpsgd", "adpsgd")),
        *(("dsp",) if name in PIPELINE else ()),
    ):
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
