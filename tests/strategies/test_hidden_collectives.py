"""Proved here: no callback, logger or progress bar makes asynchronous workers wait for each other inside an epoch.

One worker's first gradient lasts until the others have made all their steps of the epoch. If anything in a step waited
for all workers, it would never end: the test then fails after a minute. It fails when a new Lightning, or a new
callback of ours, puts a collective into a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable as Make
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_decentral import callbacks as ours
from strategies.fits import OneLongGradient, Recorder, Regression, asynchronous, loader, make_trainer, saved

pytestmark = pytest.mark.usefixtures("kept_forks")

WORKERS, SIZE, BATCH = 2, 64, 4


class Logs(Regression):
    """Logs in each of the ways that a script may, and gathers at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double())
        self.backbone = self.network[0]
        self.mean = MeanMetric()
        self.head = nn.Linear(1, 1).double()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.head(self.network(batch[0])), batch[1])

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.log("bar", loss, prog_bar=True)
        self.log("both", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log_dict({"epoch": loss, "sum": loss}, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.mean(loss.detach())
        self.log("metric", self.mean, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("gathered", self.all_gather(self.mean.compute()).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return loader(SIZE, BATCH)

    def val_dataloader(self) -> Any:
        return loader(8)


def monitors(folder: Path) -> list[Callback]:
    """What watches: of statistics of the processor, only where they can be had."""
    with_psutil = [theirs.DeviceStatsMonitor(cpu_stats=True)] if importlib.util.find_spec("psutil") else []
    return [
        theirs.LearningRateMonitor(logging_interval="step"),
        theirs.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2),
        theirs.EarlyStopping("val_loss", patience=9),
        theirs.EarlyStopping("both_epoch", patience=9, check_on_train_epoch_end=True),
        theirs.LambdaCallback(on_train_batch_end=lambda *_: None),
        theirs.Timer(timedelta(hours=1)),
        theirs.ModelSummary(),
        theirs.TQDMProgressBar(),
        *with_psutil,
    ]


def savers(folder: Path) -> list[Callback]:
    return [
        theirs.ModelCheckpoint(folder / "top", monitor="val_loss", save_top_k=2, save_last=True),
        theirs.ModelCheckpoint(folder / "epoch", monitor="both_epoch", save_on_train_epoch_end=True, save_last="link"),
        theirs.ModelCheckpoint(folder / "weights", save_weights_only=True, save_on_exception=True),
        theirs.OnExceptionCheckpoint(folder / "broken"),
        theirs.GradientAccumulationScheduler({0: 1, 1: 2}),
    ]


def changers(folder: Path) -> list[Callback]:
    return [theirs.StochasticWeightAveraging(0.01, swa_epoch_start=1), theirs.ModelPruning("l1_unstructured", amount=2)]


def averages(folder: Path) -> list[Callback]:
    return [theirs.EMAWeightAveraging(decay=0.9), theirs.BackboneFinetuning(1, verbose=False)]


def our_own(folder: Path) -> list[Callback]:
    return [ours.Communication(1), ours.ConsensusDistance(), ours.Staleness(), ours.Progress()]


@pytest.mark.parametrize("make", [monitors, savers, changers, averages, our_own], ids=lambda make: make.__name__)
def test_nobody_waits_in_a_shared_epoch(make: Make[[Path], list[Callback]], tmp_path: Path) -> None:
    batches = SIZE // BATCH
    workers = fit(tmp_path, OneLongGradient(1, batches - 2), make(tmp_path), share_epoch=True)
    assert len({worker["metrics"]["both_epoch"] for worker in workers}) == 1
    assert len({worker["metrics"]["gathered"] for worker in workers}) == 1


@pytest.mark.parametrize("make", [monitors, our_own], ids=lambda make: make.__name__)
def test_nobody_waits_before_the_end_of_an_equal_shard(make: Make[[Path], list[Callback]], tmp_path: Path) -> None:
    share = SIZE // BATCH // WORKERS
    workers = fit(tmp_path, OneLongGradient(1, share), make(tmp_path), share_epoch=False)
    assert [len(worker["weights"]) for worker in workers] == [2 * share] * WORKERS


def test_nobody_waits_at_the_end_of_an_epoch_that_has_nothing_in_common(tmp_path: Path) -> None:
    """No validation, no checkpoint, no value of all workers: the fast one makes all its epochs."""
    long, share = OneLongGradient(1, 3 * SIZE // BATCH // WORKERS), SIZE // BATCH // WORKERS
    callbacks = [long, Recorder(tmp_path)]
    make_trainer(tmp_path, asynchronous(share_epoch=False), WORKERS, max_epochs=3, callbacks=callbacks).fit(
        Regression(size=SIZE)
    )
    assert [len(worker["weights"]) for worker in saved(tmp_path, WORKERS)] == [3 * share] * WORKERS


def fit(folder: Path, long: OneLongGradient, callbacks: list[Callback], share_epoch: bool) -> list[dict[str, Any]]:
    make_trainer(
        folder,
        asynchronous(share_epoch=share_epoch),
        WORKERS,
        max_epochs=2,
        callbacks=[long, *callbacks, Recorder(folder)],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_checkpointing=True,
        enable_progress_bar=any(isinstance(each, theirs.ProgressBar) for each in callbacks),
        enable_model_summary=True,
    ).fit(Logs())
    return saved(folder, WORKERS)
