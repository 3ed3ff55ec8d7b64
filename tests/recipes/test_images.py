"""The classifier learns, logs what the recipes monitor, and changes its learning rate once per epoch."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import Subset

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes import EmbeddedImages, ResNetClassifier, TorchvisionClassifier
from lightning_decentral.recipes.images import learning_rate_factor

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def small(**options: object) -> ResNetClassifier:
    return ResNetClassifier(depth=8, in_channels=1, width=8, **options)  # type: ignore[arg-type]


class _Observed(ResNetClassifier):
    """Remembers the loss of every step and the learning rate of every epoch."""

    def on_train_start(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_epoch_start(self) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.losses.append(self.trainer.callback_metrics["train_loss"].item())


def fit(model: LightningModule, data: EmbeddedImages, **options: object) -> Trainer:
    trainer = Trainer(**QUIET, **options)  # type: ignore[arg-type]
    trainer.fit(model, data)
    return trainer


def test_learns_and_logs() -> None:
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    model = _Observed(depth=8, in_channels=1, width=8, learning_rate=0.05, schedule="constant")
    data = EmbeddedImages(batch_size=32)
    trainer = fit(model, data, max_epochs=1, limit_train_batches=100)
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= trainer.callback_metrics.keys()
    first, last = sum(model.losses[:5]) / 5, sum(model.losses[-5:]) / 5
    assert last < 0.6 * first  # starts at chance, ln 10 = 2.3
    assert {"test_loss", "test_accuracy"} == trainer.test(model, datamodule=data, verbose=False)[0].keys()


def test_learning_rate_changes_per_epoch() -> None:
    model = _Observed(depth=8, in_channels=1, width=4, learning_rate=0.4, warmup_epochs=1, schedule="milestones")
    fit(model, EmbeddedImages(), max_epochs=4, limit_train_batches=2, limit_val_batches=0)
    assert model.rates == pytest.approx([0.2, 0.4, 0.04, 0.004])


def test_cosine_ends_near_zero_after_the_warmup() -> None:
    factors = [learning_rate_factor(epoch, 10, 2, "cosine", (), 0.1) for epoch in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.05


def test_schedule_needs_epochs() -> None:
    with pytest.raises(ConfigurationError, match=r"'cosine' schedule needs a number of epochs.*Set trainer.max_epochs"):
        fit(small(schedule="cosine"), EmbeddedImages(), max_steps=2, max_epochs=-1)


def test_constant_schedule_needs_no_epochs() -> None:
    trainer = fit(small(schedule="constant"), EmbeddedImages(), max_steps=2, max_epochs=-1, limit_val_batches=0)
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.0}, "Nesterov momentum needs momentum > 0, got momentum=0"),
        ({"milestones": (80, 120)}, r"fractions of max_epochs between 0 and 1, got \[80, 120\]"),
        ({"milestones": (0.75, 0.5)}, "ascending"),
    ],
)
def test_wrong_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        small(**options)


def test_pickles_and_loads_from_a_checkpoint(tmp_path: Path) -> None:
    model = small(learning_rate=0.05)
    copy = pickle.loads(pickle.dumps(model))
    trainer = fit(copy, EmbeddedImages(), max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ResNetClassifier.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    assert loaded.learning_rate == 0.05
    for key, value in copy.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


def test_predicts_classes() -> None:
    data = EmbeddedImages(batch_size=10)
    data.setup()
    data.splits["test"] = Subset(data.splits["test"], range(20))
    predictions = Trainer(**QUIET).predict(small(), data)  # type: ignore[arg-type]
    assert predictions is not None
    assert [prediction.shape for prediction in predictions] == [(10,), (10,)]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_torchvision_model_without_torchvision() -> None:
    with pytest.raises(ConfigurationError, match=r"needs torchvision.*pip install torchvision.*ResNetClassifier"):
        TorchvisionClassifier()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_model() -> None:
    model = TorchvisionClassifier("resnet18", num_classes=5).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(ConfigurationError, match="no model named 'resnet19'"):
        TorchvisionClassifier("resnet19")
