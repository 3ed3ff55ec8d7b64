"""Proved here: what looks at a clock after each batch lets nobody wait for worker 0 in each batch; the first clock that
runs out stops all in the same batch; checkpoints by time are made by all, when they are due."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral import GossipStrategy, PipelineStrategy
from lightning_decentral.algorithms import DPSGD
from lightning_decentral.strategies.clocks import AsksRarely
from lightning_decentral.strategies.lightning_private import seconds_until_saved
from strategies.fits import Regression, fit_kept, loader, saved


class Model(Regression):
    def train_dataloader(self) -> Any:
        return loader(96, 4)


class Early(Timer):
    """The clock of worker 1 runs out in the third batch, those of others not at all."""

    def __init__(self) -> None:
        super().__init__(timedelta(hours=1))

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any, **named: Any) -> None:
        self.is_over = trainer.global_rank == 1 and trainer.global_step >= 3
        super().on_train_batch_end(trainer, *arguments, **named)

    def time_remaining(self, stage: Any = "train") -> float:
        return 0.0 if getattr(self, "is_over", False) else 3600.0


class Asked(Callback):
    """How often worker 0 was asked something while batches were made, and how many there were."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        broadcast = trainer.strategy.broadcast

        def counted(*arguments: Any) -> Any:
            self.asked += trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0 and trainer.training
            return broadcast(*arguments)

        trainer.strategy.broadcast = counted  # type: ignore[method-assign]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {"asked": self.asked, "steps": trainer.global_step}
        torch.save(found, self.folder / f"worker-{trainer.global_rank}.pt")


class Stages(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(24, 4))  # type: ignore[arg-type]


def fit(folder: Path, *callbacks: Any, **options: Any) -> list[dict[str, Any]]:
    strategy = GossipStrategy(DPSGD(), exchange_timeout_seconds=60.0)
    fit_kept(folder, strategy, 3, Model(), callbacks=[*callbacks, Asked(folder)], enable_checkpointing=True, **options)
    return saved(folder, 3)


def test_worker_0_is_not_asked_in_each_batch_and_the_first_clock_stops_all(tmp_path: Path) -> None:
    hourly = ModelCheckpoint(tmp_path / "hourly", train_time_interval=timedelta(hours=1))
    workers = fit(tmp_path, Early(), hourly, max_epochs=9, limit_val_batches=0)
    assert len({worker["steps"] for worker in workers}) == 1
    assert 3 <= workers[0]["steps"] < 8
    assert [worker["asked"] for worker in workers] == [2] * 3  # in the first batch, and when to ask again
    assert not list(tmp_path.glob("hourly/*.ckpt"))


def test_stages_ask_worker_0_rarely(tmp_path: Path) -> None:
    strategy = PipelineStrategy("dsp", exchange_timeout_seconds=60.0)
    callbacks = [Timer(timedelta(hours=1)), Asked(tmp_path)]
    fit_kept(tmp_path, strategy, 2, Stages(), callbacks=callbacks, max_epochs=1, limit_val_batches=0)
    assert [(worker["steps"], worker["asked"]) for worker in saved(tmp_path, 2)] == [
        (24, 0)
    ] * 2  # it was, when training began


def test_checkpoints_by_time_are_made_by_all(tmp_path: Path) -> None:
    always = ModelCheckpoint(tmp_path / "all", filename="{step}", train_time_interval=timedelta(0), save_top_k=-1)
    fit(tmp_path, always, max_epochs=1, limit_train_batches=3, limit_val_batches=0)
    assert sorted(path.name for path in tmp_path.glob("all/*.ckpt")) == [f"step={step}.ckpt" for step in (1, 2, 3)]


def test_questions_come_closer_to_each_other_until_a_checkpoint_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    callback = ModelCheckpoint(train_time_interval=timedelta(seconds=100))
    callback.on_train_start(None, None)  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda value: value))
    rarely = AsksRarely(lambda *_: asked.append(clock[0]), partial(seconds_until_saved, callback))
    for _ in range(110):
        clock[0] += 1.0
        rarely(trainer, None, None, None, 0)
    assert asked[:8] == [1, 50, 75, 87, 93, 96, 98, 99]
    assert asked[8:] == list(range(100, 111))  # nothing was saved: it is due
