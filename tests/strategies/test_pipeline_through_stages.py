"""Proved here: an evaluation that goes through the stages gives the metrics and predictions of one process, to the last
bit, on all workers, while none has more than its stages; several pipelines beside each other reduce over theirs; and
what would need the whole model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import kept_workers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_decentral import PipelineStrategy
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.residence import is_here

from .fits import QUIET


class Evaluated(LightningModule):
    """Of doubles, with what differs between training and evaluation, and with metrics of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh()),
            nn.Linear(8, 3),
        ).double()
        self.accuracy = MulticlassAccuracy(3)
        self.outputs: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        output = self.net(batch[0] + 0.1)
        self.accuracy(output, batch[1])
        self.outputs.append(output)
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", nn.functional.cross_entropy(output, batch[1]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_size", self.all_gather(torch.cat(self.outputs).abs().mean()).mean(), rank_zero_only=True)
        self.outputs.clear()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).softmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def loader(rows: int = 44) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (rows,), generator=generator)), batch_size=8)


class Looks(Callback):
    """Notes what a worker has of the model in evaluations, and which metrics it knows at their end."""

    def __init__(self) -> None:
        self.here: set[int] = set()
        self.known: list[dict[str, float]] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.here.add(sum(is_here(parameter) for parameter in pl_module.parameters()))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.on_validation_batch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self.known.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def evaluated(rank: int, folder: Path, schedule: str, stages: int, devices: int, evaluate: Any) -> dict[str, Any]:
    cuts = (2, 6) if stages == 3 else None
    strategy = PipelineStrategy(schedule, stages, cuts=cuts, evaluate=evaluate, exchange_timeout_seconds=60.0, seed=0)
    looks, best = Looks(), ModelCheckpoint(folder, "{val_loss:.6f}", monitor="val_loss")
    options = {**QUIET, "enable_checkpointing": True, "num_sanity_val_steps": 1, "default_root_dir": folder}
    trainer = Trainer(
        **{**options, "strategy": strategy, "devices": devices, "max_epochs": 3, "val_check_interval": 3},
        callbacks=[looks, best, EarlyStopping("val_accuracy", mode="max", patience=3)],
    )
    module = Evaluated()
    trainer.fit(module, loader(), loader(20))
    found = {"known": looks.known, "epochs": trainer.current_epoch, "best": Path(best.best_model_path).name}
    found |= {"rate": trainer.optimizers[0].param_groups[0]["lr"], "here": looks.here}
    found["state"] = {name: value.clone() for name, value in module.state_dict().items()}
    looks.here = set()
    found["tested"] = trainer.test(module, loader(), ckpt_path=best.best_model_path, verbose=False)
    found["here in a test"] = looks.here
    found["predicted"] = trainer.predict(module, loader(20))
    assert all(map(is_here, module.parameters()))
    return found


@pytest.mark.parametrize(("schedule", "stages", "workers"), [("dsp", 3, 3), ("ouroboros", 3, 2)])
def test_metrics_and_predictions_are_those_of_one_process(
    schedule: str, stages: int, workers: int, tmp_path: Path
) -> None:
    (alone,) = kept_workers(1).run(evaluated, tmp_path / "alone", schedule, stages, 1, "stages")
    found = kept_workers(workers).run(evaluated, tmp_path / "several", schedule, stages, workers, "stages")
    whole = len(list(Evaluated().parameters()))
    assert alone["here"] == {whole}
    for one in found:
        assert all(torch.equal(one["state"][name], value) for name, value in alone["state"].items())
        assert {"val_loss", "val_accuracy", "val_size"} <= one["known"][-1].keys()
        for name in ("known", "epochs", "best", "rate"):
            assert one[name] == alone[name], name
        assert one["tested"] == [pytest.approx(alone["tested"][0], rel=1e-6)]
        assert max(one["here"] | one["here in a test"]) < whole
    for one, expected in zip(found[0]["predicted"], alone["predicted"], strict=True):
        assert torch.equal(one, expected)
    assert all(one["predicted"] == [None] * 3 for one in found[1:])


def test_pipelines_beside_each_other_reduce_over_their_last_stages(tmp_path: Path) -> None:
    """The same metrics of all data as where each worker evaluates the whole model on a quarter of them."""
    several = kept_workers(4).run(evaluated, tmp_path / "stages", "dsp", 2, 4, "stages")
    whole = kept_workers(4).run(evaluated, tmp_path / "whole", "dsp", 2, 4, "whole")
    names = ("val_loss", "val_accuracy")
    assert [one["known"] for one in several] == [several[0]["known"]] * 4
    assert len(several[0]["known"]) == 4
    for one, other in zip(several[0]["known"][1:], whole[0]["known"][1:], strict=True):  # the first is of one batch
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=1e-6)


class Twice(Evaluated):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch[0]) - self.net(-batch[0])).sum())


class Never(Evaluated):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", batch[0].sum())


class Meets(Evaluated):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.all_gather(self.net(batch[0]))


def refused(rank: int, folder: Path, make: type[Evaluated], cuts: tuple[int, ...]) -> str:
    strategy = PipelineStrategy("dsp", cuts=cuts, evaluate="stages", exchange_timeout_seconds=20.0)
    trainer = Trainer(**{**QUIET, "strategy": strategy, "devices": 2, "default_root_dir": folder})
    try:
        trainer.validate(make(), loader(), verbose=False)
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("make", "words"),
    [(Twice, "calls Sequential twice"), (Never, "does not call"), (Meets, "inside a step of an evaluation")],
)
def test_steps_that_cannot_go_through_stages_are_refused(make: type[Evaluated], words: str, tmp_path: Path) -> None:
    told = kept_workers(2).run(refused, tmp_path, make, (2,))
    assert any(words in each for each in told), told
    assert all(told)


def test_settings_that_need_the_whole_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match='"whole" or "stages"'):
        PipelineStrategy("dsp", evaluate="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Name the blocks"):
        PipelineStrategy("dsp", evaluate="stages", traced=True)


def averages(rank: int, folder: Path) -> str:
    strategy = PipelineStrategy("dsp", evaluate="stages", exchange_timeout_seconds=20.0)
    options = {**QUIET, "strategy": strategy, "devices": 2, "default_root_dir": folder}
    trainer = Trainer(**options, callbacks=[StochasticWeightAveraging(0.01)])
    with pytest.raises(ConfigurationError) as told:
        trainer.fit(Evaluated(), loader())
    return str(told.value)


def test_a_callback_that_reads_all_weights_is_refused(tmp_path: Path) -> None:
    assert all("StochasticWeightAveraging" in told for told in kept_workers(2).run(averages, tmp_path))
