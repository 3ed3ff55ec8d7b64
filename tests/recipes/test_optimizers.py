"""Proved here: the recipes of the optimizers train: a large batch with each of them, sparse regression to a better
accuracy than guessing and with exact zeros, and an attack that lowers the lead of the right class within its box."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_decentral.callbacks import MicroBatchNorms
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes import (
    EmbeddedImages,
    LargeBatchResNet,
    PlayPassages,
    ResNetClassifier,
    SparseTextClassifier,
    UniversalAttack,
)


def trainer(folder: Path, **options: Any) -> Trainer:
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "clars", "lamb"])
def test_large_batches_run_with_each_optimizer(optimizer: Any, tmp_path: Path) -> None:
    model = LargeBatchResNet(optimizer, width=2, learning_rate=0.01, warmup_steps=1)
    run = trainer(
        tmp_path,
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=1,
        accumulate_grad_batches=2,
        callbacks=[MicroBatchNorms()] if optimizer == "clars" else [],
    )
    run.fit(model, EmbeddedImages(batch_size=16))
    assert run.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'clars' or 'lamb'"):
        LargeBatchResNet("adam")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="method='saga'"):
        UniversalAttack(method="saga")


@pytest.mark.parametrize("method", ["svrg", "saga"])
def test_sparse_regression_learns_with_exact_zeros(method: Any, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    data = PlayPassages(words=60, batch_size=64)
    data.setup()
    labels = data.parts["val"].tensors[1]
    guessing = max(labels.mean().item(), 1 - labels.mean().item())
    run = trainer(tmp_path, max_epochs=3)
    run.fit(SparseTextClassifier(method, words=60, passages=len(data.parts["train"]), l1=0.03), data)
    assert run.callback_metrics["val_accuracy"] > guessing + 0.05
    assert 0.1 < run.callback_metrics["zeros"] < 0.95


def test_the_attack_lowers_the_lead_of_the_right_class(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    data = EmbeddedImages(batch_size=64)
    victim = ResNetClassifier(depth=8, in_channels=1, width=4, schedule="constant")
    first = trainer(tmp_path, max_epochs=1)
    first.fit(victim, data)
    first.save_checkpoint(tmp_path / "victim.ckpt")
    attack = UniversalAttack(str(tmp_path / "victim.ckpt"), bound=0.8, learning_rate=1.0).eval()
    images, labels = next(iter(data.val_dataloader()))
    with torch.no_grad():
        before = attack.losses((images, labels)).mean()
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=15)
    run.fit(attack, EmbeddedImages(batch_size=32))
    with torch.no_grad():
        after = attack.eval().losses((images, labels)).mean()
    assert after < before
    assert "val_fooled" in run.callback_metrics
    assert 0 < attack.delta.abs().max() <= 0.8
    assert all(
        torch.equal(new, old) for new, old in zip(attack.classifier.parameters(), victim.parameters(), strict=True)
    )
