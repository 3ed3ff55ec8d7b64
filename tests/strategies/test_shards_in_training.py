"""Proved here: in the `Trainer` a model in shards that takes all gradients in each update is synchronous training with
the user's optimizer, beside training and with servers that only serve; a resumed run goes on exactly, and with another
number of workers or shards with the state of every server's optimizer; a constraint holds in every shard; each server
tells whose gradients it has used; other shards alone, and unfreezing, are refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from reference.runs import equal_start
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral import AsyncStrategy
from lightning_decentral.algorithms import BackupWorkers
from lightning_decentral.callbacks import Arrivals
from strategies.fits import Indices, fit_kept

WORKERS, SIZES, BATCHES = 3, [2, 1, 2], 4
PROBLEM = equal_start(WORKERS)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


class Pieces(LightningModule):
    """The quadratic of a worker's rank, of parameters of several sizes."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(part.clone() for part in PROBLEM.start[0].split(SIZES))
        self.batches = batches
        self.frozen = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)

    def training_step(self, batch: Tensor) -> Tensor:
        away = torch.cat(list(self.weights)) - PROBLEM.b[self.global_rank]
        return (PROBLEM.a[self.global_rank] * away.square()).sum() / 2 + 0 * self.frozen.sum()

    def validation_step(self, batch: Tensor) -> None:
        self.log("x", torch.cat(list(self.weights)).sum(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return adam([*self.weights, self.frozen])

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices(self.batches), batch_size=1)

    def val_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices(WORKERS), batch_size=1)


def fit(
    folder: Path, method: BackupWorkers, epochs: int, workers: int = WORKERS, share: bool = False, **options: Any
) -> Tensor:
    """The model that comes out."""
    given = {key: options.pop(key) for key in ("resume",) if key in options}
    strategy = AsyncStrategy(method, share_epoch=share, exchange_timeout_seconds=60.0, **given)
    module = Pieces(BATCHES * len([rank for rank in range(workers) if method.trains(rank)]))
    fit_kept(folder, strategy, workers, module, max_epochs=epochs, **options)
    return torch.cat([weight.detach() for weight in module.weights])


def synchronous(*epochs: list[int]) -> Tensor:
    """What synchronous training gives, with the workers of each epoch."""
    x = nn.Parameter(PROBLEM.start[0].clone())
    optimizer = adam([x])
    for ranks in epochs:
        for _ in range(BATCHES):
            x.grad = torch.stack([PROBLEM.gradient(x.detach(), rank) for rank in ranks]).mean(0)
            optimizer.step()
    return x.detach()


def test_with_all_gradients_it_is_synchronous_training_and_goes_on_so(tmp_path: Path) -> None:
    method, everybody = BackupWorkers(WORKERS, shards=2), list(range(WORKERS))
    half = fit(tmp_path, method, 2, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, "half")])
    torch.testing.assert_close(half, synchronous(everybody, everybody), rtol=0.0, atol=1e-12)
    path = tmp_path / "half.ckpt"
    whole = synchronous(everybody, everybody, everybody)
    torch.testing.assert_close(fit(tmp_path, method, 3, ckpt_path=path), whole, rtol=0.0, atol=1e-12)
    other = fit(tmp_path, BackupWorkers(2, shards=2), 3, workers=2, ckpt_path=path)
    torch.testing.assert_close(other, synchronous(everybody, everybody, [0, 1]), rtol=0.0, atol=1e-12)
    with pytest.raises(AssertionError, match=r"checkpoint is of BackupWorkers\(server='beside', shards=2"):
        fit(tmp_path, BackupWorkers(WORKERS, shards=3), 3, ckpt_path=path)
    anew = fit(tmp_path, BackupWorkers(WORKERS, shards=3), 3, ckpt_path=path, resume="consensus")
    torch.testing.assert_close(anew, whole, rtol=0.0, atol=1e-12)


def test_servers_may_only_serve_and_each_tells_what_it_has_used(tmp_path: Path) -> None:
    told = {"callbacks": [Arrivals()], "logger": CSVLogger(tmp_path, name="", version="log")}
    got = fit(tmp_path, BackupWorkers(1, shards=2, server="dedicated"), 2, share=True, **told)
    torch.testing.assert_close(got, synchronous([2], [2]), rtol=0.0, atol=1e-12)
    with open(tmp_path / "log" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for server in ("server", "server1"):
        assert [float(row[f"{server}/accepted/2"]) for row in rows if row[f"{server}/accepted/2"]] == [2 * BATCHES]


class Unfreezes(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.frozen.requires_grad_(trainer.current_epoch > 0)  # type: ignore[operator]


def test_unfreezing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="AdamW got other trainable parameters in training, by which Backup"):
        fit(tmp_path, BackupWorkers(2, shards=2), 2, workers=2, callbacks=[Unfreezes()])


class Clamps(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for weight in pl_module.weights:  # type: ignore[union-attr]
            weight.data.clamp_(-0.05, 0.05)


def test_a_constraint_holds_at_every_server(tmp_path: Path) -> None:
    got = fit(tmp_path, BackupWorkers(WORKERS, shards=2), 2, callbacks=[Clamps()])
    assert [float(shard.abs().max()) for shard in got.split([2, 3])] == [0.05, 0.05]
