"""Proved here: what ordinary scripts do around training, on the stages' workers as in one process: metrics of the last
stage decide on every worker, hooks at the end of an epoch read the whole model, a validation in the middle of an epoch
trains what is under way, random numbers of numpy and Python belong to their batch; and no update is lost unseen."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.workers import kept_workers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_decentral import PipelineStrategy
from lightning_decentral.errors import ConfigurationError

from .fits import QUIET


class Noisy(nn.Module):
    """Draws from Python: a replay has to draw the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random())


class Ordinary(LightningModule):
    """What scripts do: mixed inputs, a frozen first block, metrics as objects, and decisions by what was logged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        frozen = nn.Linear(4, 8).requires_grad_(False)
        self.net = nn.Sequential(
            *(frozen, nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), Noisy(), nn.Dropout(0.2), nn.Tanh()),
            nn.Linear(8, 3),
        ).double()
        self.accuracy = MulticlassAccuracy(3)
        self.found: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        share = np.random.beta(0.4, 0.4)  # noqa: NPY002  # as such scripts do
        x, y = batch
        output = self.net(share * x + (1 - share) * x.flip(0))
        loss = share * nn.functional.cross_entropy(output, y)
        loss = loss + (1 - share) * nn.functional.cross_entropy(output, y.flip(0))
        self.accuracy(output, y)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def on_train_epoch_end(self) -> None:
        self.found.append(float(sum(parameter.norm() for parameter in self.parameters())))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        config = {"scheduler": plateau, "monitor": "train_loss_step", "interval": "step", "frequency": 3}
        return {"optimizer": optimizer, "lr_scheduler": config}


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(44, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (44,), generator=generator)), batch_size=8, shuffle=True)


def scripted(rank: int, folder: Path, devices: int) -> dict[str, Any]:
    """Fit, with all that looks at metrics; then predict with the best model."""
    callbacks = [
        ModelCheckpoint(folder, "epoch-{epoch}-{train_loss:.4f}", monitor="train_loss", save_on_train_epoch_end=True),
        ModelCheckpoint(folder, "step-{step}", monitor="train_loss_step", every_n_train_steps=2, save_top_k=2),
        EarlyStopping("train_accuracy", mode="max", patience=1, check_on_train_epoch_end=True),
    ]
    strategy = PipelineStrategy("dsp", stages=2, exchange_timeout_seconds=60.0)
    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": folder, "strategy": strategy}
    trainer = Trainer(**options, devices=devices, max_epochs=6, val_check_interval=4, callbacks=callbacks)
    module = Ordinary()
    trainer.fit(module, loader(), loader())
    found = {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items() if "train" in name},
        "seen": module.found,
        "epochs": trainer.current_epoch,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "best": [
            (Path(each.best_model_path).name, sorted(map(float, each.best_k_models.values()))) for each in callbacks[:2]
        ],
    }
    predicted = trainer.predict(module, loader(), ckpt_path=callbacks[0].best_model_path)
    assert predicted is not None
    assert all(bool(each.isfinite().all()) for each in predicted)
    return found


def test_scripts_do_on_workers_what_they_do_in_one_process(tmp_path: Path) -> None:
    (alone,) = kept_workers(1).run(scripted, tmp_path / "alone", 1)
    several = kept_workers(2).run(scripted, tmp_path / "several", 2)
    assert len(alone["seen"]) == alone["epochs"]
    assert alone["rate"] < 0.3
    for found in several:
        states = found.pop("state"), alone.get("state")
        assert states[1] is not None
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
        assert found == {name: value for name, value in alone.items() if name != "state"}


class LeavesOut(Ordinary):
    """Makes the update of every second batch only, without telling the Trainer."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


@pytest.mark.parametrize(
    ("make", "callbacks", "words"),
    [
        (LeavesOut, [], "left out the update of batch 0"),
        (Ordinary, [GradientAccumulationScheduler({1: 2})], "GradientAccumulationScheduler"),
    ],
)
def test_no_update_is_lost_unseen(make: type[Ordinary], callbacks: list[Any], words: str, tmp_path: Path) -> None:
    strategy = PipelineStrategy("dsp", stages=1)
    trainer = Trainer(
        **QUIET, default_root_dir=tmp_path, strategy=strategy, devices=1, max_epochs=2, callbacks=callbacks
    )
    with pytest.raises(ConfigurationError, match=words):
        trainer.fit(make(), loader())
    assert trainer.current_epoch == 0
