"""Proved here: the callback swaps before optimizers, checkpoints and DDP see the model; each worker's estimates are of
its own data until they are averaged, under DDP, gossip and simulation; the layers know the loss scale; what cannot work
is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from strategies.fits import Recorder, Regression, Samples, gossip, loader, make_trainer, saved
from torch import Tensor, nn

from lightning_decentral import AsyncStrategy, SimulatedStrategy
from lightning_decentral.algorithms import ADPSGD, DPSGD
from lightning_decentral.callbacks import NormalizationSwap
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization import (
    FullNorm1d,
    FullNormalization,
    GroupNormalization,
    SyncNormalization,
    full_norm_layers,
)

pytestmark = pytest.mark.usefixtures("kept_forks")

ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # float64, values around 1
MOMENTUM = 0.25


class Normalized(Regression):
    """The normalization is the first layer, so its moments are those of the data whatever the weights are."""

    def __init__(self, size: int = 32) -> None:
        super().__init__(
            nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), size=size
        )
        self.double()

    def val_dataloader(self) -> Any:
        return loader(12)


class Estimates(Recorder):
    """The moments of the first layer after every batch, and as evaluation sees them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kept.update(inputs=[], batches=[], validations=[])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module)
        self.kept["inputs"].append(rest[1][0])
        self.kept["batches"].append(moments(pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["validations"].append(moments(pl_module))


def moments(module: LightningModule) -> Tensor:
    layer = full_norm_layers(module)[0]
    return torch.stack([layer.running_mean, layer.running_square]).detach().clone()


def swap(**options: Any) -> NormalizationSwap:
    return NormalizationSwap(FullNormalization(MOMENTUM, MOMENTUM), **options)


def expected(worker: dict[str, Any]) -> list[Tensor]:
    """The moments of one worker's data, batch by batch."""
    estimates: list[Tensor] = []
    for inputs in worker["inputs"]:
        new = torch.stack([inputs.mean(0), inputs.square().mean(0)])
        estimates.append(torch.lerp(estimates[-1], new, MOMENTUM) if estimates else new)
    return estimates


def fit(folder: Path, strategy: Any, workers: int, *callbacks: Callback, **options: Any) -> None:
    make_trainer(folder, strategy, workers, callbacks=list(callbacks), **{"max_epochs": 1, **options}).fit(Normalized())


def test_under_ddp_workers_keep_their_own_until_the_validation(tmp_path: Path) -> None:
    fit(tmp_path, "ddp_fork", 2, swap(), Estimates(tmp_path))
    workers = saved(tmp_path, 2)
    own = [expected(worker) for worker in workers]
    assert (own[0][0] - own[1][0]).abs().max() > 0.1  # their data differ
    for worker, wanted in zip(workers, own, strict=True):
        torch.testing.assert_close(worker["batches"], wanted, **ROUNDING)
        torch.testing.assert_close(worker["validations"], [(own[0][-1] + own[1][-1]) / 2], **ROUNDING)
        torch.testing.assert_close(worker["weights"], workers[0]["weights"], rtol=0, atol=0)
        torch.testing.assert_close(worker["state"], workers[0]["state"], rtol=0, atol=0)  # averaged after the epoch


def test_under_ddp_they_can_be_averaged_after_every_batch(tmp_path: Path) -> None:
    fit(tmp_path, "ddp_fork", 2, swap(sync_every_n_steps=1), Estimates(tmp_path))
    one, other = saved(tmp_path, 2)
    # Averaging is linear, so the averages are the moving averages of both workers' batches together.
    together = [(a + b) / 2 for a, b in zip(expected(one), expected(other), strict=True)]
    torch.testing.assert_close(one["batches"], together, **ROUNDING)
    torch.testing.assert_close(other["batches"], together, **ROUNDING)


@pytest.mark.parametrize("every", [None, 2])
def test_under_gossip_they_are_buffers_as_others_and_evaluation_uses_their_mean(
    tmp_path: Path, every: int | None
) -> None:
    fit(tmp_path, gossip(DPSGD()), 2, swap(sync_every_n_steps=every), Estimates(tmp_path))
    workers = saved(tmp_path, 2)
    own = [expected(worker) for worker in workers]
    assert (own[0][0] - own[1][0]).abs().max() > 0.1  # their data differ
    for worker, wanted in zip(workers, own, strict=True):
        torch.testing.assert_close(worker["batches"][0], wanted[0], **ROUNDING)
        torch.testing.assert_close(worker["validations"], [(own[0][-1] + own[1][-1]) / 2], **ROUNDING)
    if every is None:
        torch.testing.assert_close([w["batches"][-1] for w in workers], [o[-1] for o in own], **ROUNDING)
    else:
        torch.testing.assert_close(workers[0]["batches"][1], workers[1]["batches"][1], **ROUNDING)


def test_virtual_workers_have_their_own(tmp_path: Path) -> None:
    """One batch each, which sets the estimates of each: their mean is that of all data, whatever the momentum."""
    module = Normalized(size=16)
    make_trainer(
        tmp_path, SimulatedStrategy(DPSGD(), workers=4), 1, callbacks=[swap()], max_epochs=1, limit_val_batches=0
    ).fit(module)
    inputs = Samples(16).inputs
    torch.testing.assert_close(moments(module), torch.stack([inputs.mean(0), inputs.square().mean(0)]), **ROUNDING)


def test_weights_of_batch_norm_resume_and_the_optimizer_has_the_new_parameters(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, "auto", 1, max_epochs=1)
    module = Normalized()
    plain.fit(module)
    (before,) = plain.validate(module, verbose=False)
    plain.save_checkpoint(tmp_path / "batch_norm.ckpt")
    swapped, callback = Normalized(), swap()
    trainer = make_trainer(tmp_path, "auto", 1, max_epochs=2, callbacks=[callback])
    (after,) = trainer.validate(swapped, ckpt_path=tmp_path / "batch_norm.ckpt", verbose=False)
    assert after["val_loss"] == pytest.approx(before["val_loss"], rel=1e-9)  # metrics are kept in float32
    start = torch.cat([p.detach().reshape(-1).clone() for p in swapped.parameters()])
    trainer.fit(swapped, ckpt_path=tmp_path / "batch_norm.ckpt")  # the second stage does not swap again
    assert len(full_norm_layers(swapped)) == 2
    assert isinstance(swapped.network[0], FullNorm1d)  # type: ignore[index]
    moved = torch.cat([p.detach().reshape(-1) for p in swapped.parameters()])
    assert (moved != start).sum() > 0.9 * len(start)


class LossScale(Callback):
    def __init__(self) -> None:
        self.scales: list[float] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scales.append(full_norm_layers(pl_module)[0].loss_scale)


def test_layers_know_the_loss_scale_and_the_accumulation(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_factor=4.0, growth_interval=2)
    recorder = LossScale()
    trainer = make_trainer(
        tmp_path, "auto", 1, max_epochs=1, callbacks=[swap(), recorder], accumulate_grad_batches=2, limit_val_batches=0,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )  # fmt: skip
    trainer.fit(Normalized())  # 8 batches, 4 updates; the scale grows after two of them
    assert recorder.scales == [8.0] * 4 + [32.0] * 4


class Plain(Regression):
    """Without any BatchNorm."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalizationSwap(GroupNormalization(), sync_every_n_steps=1), "needs at least 1, and FullNorm"),
        (lambda: NormalizationSwap(sync_every_n_steps=0), "needs at least 1"),
    ],
)
def test_settings_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("strategy", "callback", "module", "message"),
    [
        (lambda: "auto", swap(), Plain, "Plain contains no BatchNorm1d, BatchNorm2d or BatchNorm3d"),
        (lambda: "auto", NormalizationSwap(SyncNormalization()), Normalized, "needs CUDA devices, got cpu"),
        (lambda: AsyncStrategy(ADPSGD()), swap(sync_every_n_steps=1), Normalized, "cannot be under AsyncStrategy"),
        (lambda: SimulatedStrategy(DPSGD(), workers=2), swap(sync_every_n_steps=1), Normalized, "SimulatedStrategy"),
    ],
)
def test_runs_that_are_refused(
    tmp_path: Path, strategy: Any, callback: NormalizationSwap, module: type[Regression], message: str
) -> None:
    trainer = make_trainer(tmp_path, strategy(), 1, max_epochs=1, callbacks=[callback])
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(module())
