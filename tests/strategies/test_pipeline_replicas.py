"""Proved here: pipelines beside each other train by a method of the package as workers with the whole model do; what is
evaluated and saved is the mean of the replicas; and methods that cannot train them are refused with what to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import kept_workers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral import PipelineStrategy, Strategy
from lightning_decentral.algorithms import (
    ADPSGD,
    D2,
    DPSGD,
    DiLoCo,
    GradientTracking,
    LocalSGD,
    SyncSGD,
)
from lightning_decentral.averaging import Choco
from lightning_decentral.compression import Cast
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.topology import Ring

from .fits import QUIET


class Net(LightningModule):
    """Without random numbers, and of doubles: orders of adding do not matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.seen: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx), sync_dist=True)

    def loader(self, rows: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(
            torch.randn(rows, 4, generator=generator).double(), torch.randint(0, 3, (rows,), generator=generator)
        )
        return DataLoader(data, batch_size=4)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(40)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(16)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Shifts(Callback):
    """Changes the weights that are shown after a validation: that counts."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.current_epoch == 0:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.add_(0.125)


def fit(
    rank: int, folder: Path, strategy: Any, devices: int, shifts: bool = False
) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """The model that was trained, its loss, and what was saved."""
    options = {**QUIET, "strategy": strategy, "devices": devices, "default_root_dir": folder, "max_epochs": 3}
    trainer, module = Trainer(**options, callbacks=[Shifts()] if shifts else []), Net()
    trainer.fit(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    saved = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    return {name: value.clone() for name, value in module.state_dict().items()}, trainer.callback_metrics["loss"], saved


def pipelines(method: AbstractAlgorithm | None, schedule: str = "gpipe", **options: Any) -> PipelineStrategy:
    parts = 2 if schedule == "gpipe" else None
    return PipelineStrategy(schedule, 2, parts=parts, data_parallel=method, exchange_timeout_seconds=60.0, **options)


METHODS = {
    "dpsgd": DPSGD(),
    "d2": D2(),
    "tracking": GradientTracking(),
    "choco": DPSGD(averager=Choco(compressor=Cast("bfloat16"))),  # each number by itself
    "local_sgd": LocalSGD(every=3),
    "diloco": DiLoCo(every=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_pipelines_train_as_two_workers_with_the_whole_model(name: str, tmp_path: Path) -> None:
    """A synchronous pipeline computes the gradients of the whole model, so all that differs is who has which stage."""
    through = pipelines(METHODS[name], evaluate="stages") if name == "dpsgd" else pipelines(METHODS[name])
    found = kept_workers(4).run(fit, tmp_path, through, 4)
    whole = kept_workers(2).run(fit, tmp_path, Strategy(METHODS[name]), 2)
    for state, loss, saved in found:
        assert loss == pytest.approx(float(whole[0][1]), abs=1e-9)
        for key, value in whole[0][0].items():
            torch.testing.assert_close(state[key], value, rtol=0.0, atol=1e-9)
            torch.testing.assert_close(saved[key], value, rtol=0.0, atol=1e-9)


def test_with_old_gradients_the_mean_of_each_update_is_synchronous_sgd(tmp_path: Path) -> None:
    """And what user code changes in the mean that is shown, counts."""
    found = [kept_workers(4).run(fit, tmp_path, pipelines(each, "dsp"), 4, True) for each in (None, SyncSGD(), DPSGD())]
    for (plain, *_), (same, *_), (gossip, *_) in zip(*found, strict=True):
        for key, value in plain.items():
            torch.testing.assert_close(same[key], value, rtol=0.0, atol=1e-12)
            assert not torch.allclose(gossip[key], value, rtol=0.0, atol=1e-6)
    without = kept_workers(4).run(fit, tmp_path, pipelines(DPSGD(), "dsp"), 4)
    assert not torch.allclose(without[0][0]["net.0.bias"], found[2][0][0]["net.0.bias"], rtol=0.0, atol=0.02)


class TiedNet(Net):
    """Its last layer has the weights of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = nn.Linear(6, 4).double()
        self.net[-1].weight = nn.Parameter(self.net[0].weight.detach().T.clone())
        self.net.append(Transposed(self.net[0]))


class Transposed(nn.Module):
    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.weight = other.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def ring_of(rank: int, folder: Path, tied: bool) -> str | float:
    strategy = PipelineStrategy("ouroboros", 3, data_parallel=DPSGD(), exchange_timeout_seconds=60.0)
    trainer = Trainer(**{**QUIET, "strategy": strategy, "devices": 4, "default_root_dir": folder, "max_epochs": 2})
    try:
        trainer.fit(TiedNet() if tied else Net())
    except ConfigurationError as error:
        return str(error)
    return float(trainer.callback_metrics["loss"])


def test_in_a_ring_the_stages_of_a_worker_are_replicas_one_by_one_and_tied_weights_are_refused(tmp_path: Path) -> None:
    losses = kept_workers(4).run(ring_of, tmp_path, False)
    assert len(set(losses)) == 1
    assert losses[0] < 1.5
    refused = kept_workers(4).run(ring_of, tmp_path, True)
    assert all("'net.0.weight' in the stages [0, 2] (tied weights)" in str(words) for words in refused), refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": ADPSGD()}, "needs one in which they exchange at the same updates"),
        ({"method": "dpsgd"}, "needs a method, such as DPSGD"),
        ({"method": DPSGD(), "drains": False}, "a checkpoint has the mean of the replicas"),
    ],
)
def test_what_cannot_train_replicas_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        pipelines(**options)


def test_a_graph_of_another_size_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="8"):
        Trainer(**{**QUIET, "strategy": pipelines(DPSGD(Ring(8))), "devices": 4, "default_root_dir": tmp_path})
