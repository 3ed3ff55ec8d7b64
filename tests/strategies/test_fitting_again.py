"""Proved here: a process that fits a second time, after a fit that ended well, after an evaluation, or after an error
that it has caught, begins anew with its weights; under strategies whose processes are started from outside, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.workers import kept_workers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_decentral import AsyncStrategy, GossipStrategy
from lightning_decentral.algorithms import SAEF
from lightning_decentral.compression import TopK
from strategies.fits import Regression, loader, make_trainer


class Fallible(Regression):
    """Raises in the second epoch on some workers, if it is told to."""

    failing: tuple[int, ...] = ()

    def training_step(self, batch: Any) -> Tensor:
        if self.global_rank in self.failing and self.current_epoch == 1:
            raise KeyError("a mistake")
        return super().training_step(batch)

    def val_dataloader(self) -> Any:
        return loader(12)


class BeginsAnew(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.strategy.steps == 0  # type: ignore[attr-defined]


def make_strategy(name: str) -> Any:
    if name == "adpsgd":
        # Batches of its own for each: the one that fails has some, even if the other is much faster.
        return AsyncStrategy(exchange_timeout_seconds=60.0, share_epoch=False)
    return GossipStrategy(SAEF(TopK(0.2), 5), exchange_timeout_seconds=60.0)


def _worker(rank: int, folder: Path, scenario: str, name: str) -> None:
    module = Fallible()

    def trainer(**options: Any) -> Trainer:
        return make_trainer(folder, make_strategy(name), 2, **{"max_epochs": 1, "callbacks": [BeginsAnew()], **options})

    caught: list[Exception] = []  # kept, as logs and notebooks do: with its frames, and all that these hold
    first = trainer()
    if scenario == "one trainer":
        first.fit(module)
        first.validate(module, verbose=False)
        first.fit_loop.max_epochs = 3
        first.fit(module)
        assert first.current_epoch == 3
    elif scenario == "two trainers":
        first.fit(module)
        first.validate(module, verbose=False)
        trainer(max_epochs=2).fit(module)
    elif scenario == "a search":
        Tuner(first).lr_find(module, num_training=4, min_lr=0.01, max_lr=3.0, update_attr=False)
        trainer(max_epochs=2).fit(module)
    else:
        module.failing = (0, 1) if scenario == "errors" else (1,)
        try:
            trainer(max_epochs=2).fit(module)
        except Exception as error:
            caught.append(error)
        assert [type(error).__name__ for error in caught] in (["KeyError"], ["WorkerFailed"])
        module.failing = ()
        trainer(max_epochs=2).fit(module)


@pytest.mark.parametrize("name", ["saef", "adpsgd"])
@pytest.mark.parametrize("scenario", ["one trainer", "two trainers", "a search", "errors", "an error"])
def test_fitting_again(scenario: str, name: str, tmp_path: Path) -> None:
    kept_workers(2).run(_worker, tmp_path, scenario, name)
