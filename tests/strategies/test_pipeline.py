"""Proved here: a pipeline over processes trains bit for bit as one process with the same schedule does, dropout, batch
normalization, clipping and a last partial batch included; what it saves is the ordinary whole model, which resumes
elsewhere as if nothing had been; metrics of the last stage are known to all workers; a lost stage is named; and what
cannot be cut, or cannot work, is refused before training with what to write."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import Workers, kept_workers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral import PipelineStrategy
from lightning_decentral.callbacks import Communication
from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.pipeline.residence import is_here
from lightning_decentral.pipeline.schedules import Schedule, ddg, dsp

from .fits import QUIET


class Tied(nn.Module):
    """The transpose of another layer's weights, as the output of a Transformer is of its embedding."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.weight = other.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(LightningModule):
    """Small, with everything that a replay could get wrong; of doubles, so that orders of adding do not matter."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.losses: list[tuple[float, int]] = []
        torch.manual_seed(3)
        self.net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()),
            nn.Linear(8, 3),
        )
        if tied:
            self.net[-1] = Tied(self.net[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        self.losses.append((float(loss), len(batch[0])))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(44, 4, generator=generator), torch.randint(0, 3, (44,), generator=generator))
        return DataLoader(data, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1)]
        return [optimizer], [
            *schedulers,
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 9), "interval": "step"},
        ]


class Memory(Callback):
    """Measures, after the fourth batch, what a worker has of parameters and of what the optimizer remembers."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step != 4 or self.found:
            return
        parameters = list(pl_module.parameters())
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        away = [parameter for parameter in parameters if not is_here(parameter)]
        with torch._C.DisableTorchFunctionSubclass():
            self.found = {"bytes": sum(value.untyped_storage().nbytes() for value in [*parameters, *moments])}
        self.found |= {"away": len(away), "words": "", "kept": list(trainer.strategy.kept)}  # type: ignore[attr-defined]
        if away:
            with pytest.raises(ConfigurationError) as refused:
                pl_module.state_dict()
            self.found["words"] = str(refused.value)


def fit(
    rank: int,
    folder: Path,
    schedule: str | Schedule,
    stages: int,
    devices: int,
    epochs: int = 2,
    resume: Path | None = None,
    save: Path | None = None,
    callbacks: list[Callback] | None = None,
    seed: int | None = 0,
    tied: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained model and the metrics of one worker."""
    strategy = PipelineStrategy(schedule, stages=stages, exchange_timeout_seconds=60.0, seed=seed)
    options = {**QUIET, "strategy": strategy, "devices": devices, "default_root_dir": folder, "gradient_clip_val": 0.5}
    memory = Memory()
    trainer = Trainer(max_epochs=epochs, callbacks=[memory, Communication(), *(callbacks or [])], **options)
    module = Net(tied)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=resume, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    losses = sum(loss * rows for loss, rows in module.losses), sum(rows for _, rows in module.losses)
    told = {"losses": losses, "warned": [str(one.message) for one in caught]}
    return state, {n: float(value) for n, value in trainer.callback_metrics.items()} | memory.found | told


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("schedule", "stages", "workers", "tied"),
    [
        ("dsp", 2, 2, False),
        (ddg(3).predicted(0.5).slowed(5), 3, 3, False),
        ("ouroboros", 3, 2, False),
        ("ouroboros", 3, 2, True),  # both uses of the weights are on one worker, of different ages
        ("pipe_2bw", 2, 2, False),
    ],
)
def test_processes_train_as_one_does(
    schedule: str | Schedule, stages: int, workers: int, tied: bool, tmp_path: Path
) -> None:
    options = (1 if tied else 2, None, None, None, 0, tied)
    (alone,) = kept_workers(1).run(fit, tmp_path, schedule, stages, 1, *options)
    found = kept_workers(workers).run(fit, tmp_path, schedule, stages, workers, *options)
    for state, metrics in found:
        assert same(state, alone[0])
        assert metrics["train_loss"] == alone[1]["train_loss"]  # of the last stage, on all workers
        assert metrics["words"].count("its stage of the pipeline is on worker") == 1
        assert metrics["bytes"] < alone[1]["bytes"]
        if schedule == "dsp":  # each row forwards and backwards, in two epochs; and some words beside them
            assert 1.0 <= metrics["communication/total_megabytes"] / (4e-6 * 8 * 44 * 2 * 2) < 1.2
    assert alone[1]["communication/total_megabytes"] == 0
    # Each has its own, and of what is elsewhere one number of four bytes.
    own = [metrics["bytes"] - 4 * metrics["away"] for _, metrics in found]
    assert alone[1]["away"] == 0
    if isinstance(schedule, str):  # one process copies weights for a prediction as soon as any stage has changed
        assert sorted(kept for _, metrics in found for kept in metrics["kept"]) == sorted(alone[1]["kept"])
    assert sum(own) == alone[1]["bytes"]


def test_a_checkpoint_resumes_with_other_workers(tmp_path: Path) -> None:
    """It is that of the whole model: Adam's moments, smoothed steps, schedulers and random numbers of all stages."""
    file, schedule = tmp_path / "whole.ckpt", dsp(2).predicted(0.5)
    kept_workers(2).run(fit, tmp_path, schedule, 2, 2, 1, None, file)
    saved = torch.load(file, weights_only=True)
    assert saved["state_dict"].keys() == Net().state_dict().keys()
    assert len(saved["optimizer_states"][0]["state"]) == len(list(Net().parameters()))
    through = kept_workers(2).run(fit, tmp_path, schedule, 2, 2, 2)
    resumed = kept_workers(2).run(fit, tmp_path, schedule, 2, 2, 2, file)
    (alone,) = kept_workers(1).run(fit, tmp_path, schedule, 2, 1, 2, file)
    assert same(through[0][0], resumed[0][0])
    assert same(through[0][0], alone[0])
    assert not [words for _, metrics in through for words in metrics["warned"] if "lr_scheduler.step()" in words]


def test_pipelines_beside_each_other_take_the_mean(tmp_path: Path) -> None:
    """Of four workers, two have the first stage and two the second: all end with the same model, of all data, and know
    the loss of all data."""
    found = kept_workers(4).run(fit, tmp_path, "dsp", 2, 4, 1)
    states = [state for state, _ in found]
    of_last_stages = [metrics["losses"] for _, metrics in found[::2]]
    total, rows = map(sum, zip(*of_last_stages, strict=True))
    assert rows == 44
    assert [metrics["train_loss"] for _, metrics in found] == pytest.approx([total / rows] * 4, rel=1e-6)
    assert of_last_stages[0] != of_last_stages[1]
    own = [name for name in states[0] if "running" not in name and "tracked" not in name]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in own)
    (alone,) = kept_workers(1).run(fit, tmp_path, "dsp", 2, 1, 1)
    assert not same(alone[0], states[0])


class Seeds(Callback):
    """Each worker has another seed, as without `seed_everything`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def setup(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(self.seed + trainer.global_rank)


def test_random_numbers_are_those_of_the_seed_of_worker_0_and_of_the_run_that_is_resumed(tmp_path: Path) -> None:
    file = tmp_path / "seeded.ckpt"
    kept_workers(2).run(fit, tmp_path, "dsp", 2, 2, 1, None, file, [Seeds(5)], None)
    resumed = kept_workers(2).run(fit, tmp_path, "dsp", 2, 2, 2, file, None, [Seeds(8)], None)
    (alone,) = kept_workers(1).run(fit, tmp_path, "dsp", 2, 1, 2, None, None, None, 5)
    (another,) = kept_workers(1).run(fit, tmp_path, "dsp", 2, 1, 2, None, None, None, 8)
    assert same(resumed[0][0], alone[0])
    assert not same(alone[0], another[0])


class Dies(Callback):
    """Worker 1 is gone in the middle of training, and worker 0 saves what it has."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_exception(self, trainer: Trainer, *args: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "left.ckpt")


def _loses(rank: int, folder: Path) -> str:
    try:
        fit(rank, folder, "dsp", 2, 2, callbacks=[Dies()])
    except PeerLost as error:
        return str(error)
    return ""


def test_a_lost_stage_is_named(tmp_path: Path) -> None:
    workers = Workers(2)
    try:
        with pytest.raises(AssertionError, match="worker 1 ended"):
            workers.run(_catching, tmp_path)
    finally:
        workers.close()
    assert "Lost worker 1" in (tmp_path / "told").read_text()
    left = torch.load(tmp_path / "left.ckpt", weights_only=True)["state_dict"]
    assert {name for name in left if "running" not in name and "tracked" not in name} == {
        f"net.{block}.{kind}" for block in (4, 5, 7) for kind in ("weight", "bias")
    }
    assert all(bool(value.isfinite().all()) for value in left.values())


def _catching(rank: int, folder: Path) -> None:
    told = _loses(rank, folder)
    (folder / "told").write_text(told)


# -- refused before training ------------------------------------------------------------------------------------------


def refused(
    tmp_path: Path,
    words: str,
    module: LightningModule,
    schedule: Any = "dsp",
    stages: int = 2,
    traced: bool = False,
    **options: Any,
) -> None:
    strategy = PipelineStrategy(schedule, stages=stages, traced=traced)
    trainer = Trainer(
        **{**QUIET, "strategy": strategy, "devices": 1, "default_root_dir": tmp_path, **options}, max_epochs=1
    )
    with pytest.raises(ConfigurationError, match=words):
        trainer.fit(module)
    assert trainer.global_step == 0


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Outside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class NoTensors(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.append(Pairs())


class Twice(Net):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) + self.net(-batch[0])).sum()


class Wrong(Net):
    def configure_stages(self) -> Any:
        return self.net, list(self.net)[:-1]


class Quasi(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "words", "options"),
    [
        (Net, "9 stages and 8 blocks", {"stages": 9}),
        (Manual, "needs automatic optimization", {}),
        (Net, "accumulate_grad_batches=2", {"accumulate_grad_batches": 2}),
        (Outside, "'scale'", {}),
        (NoTensors, "gives list", {}),
        (Wrong, "belong to no block", {}),
        (Quasi, "LBFGS", {}),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    module: type[Net], words: str, options: dict[str, Any], tmp_path: Path
) -> None:
    refused(tmp_path, words, module(), **options)


def test_two_calls_are_refused_where_they_are_made(tmp_path: Path) -> None:
    refused(tmp_path, "twice", Twice(), stages=1)


def test_a_batch_with_fewer_rows_than_micro_batches_is_named(tmp_path: Path) -> None:
    refused(tmp_path, "16 micro-batches", Net(), PipelineStrategy("gpipe", 2, parts=16).schedule, limit_train_batches=2)
    refused(tmp_path, "the last of which has 4 rows", Net(), PipelineStrategy("gpipe", 2, parts=8).schedule)
    refused(tmp_path, "needs all to be alike", Net(), traced=True)


def test_workers_that_do_not_fit_are_refused_by_the_trainer() -> None:
    for strategy in (PipelineStrategy(dsp(3)), PipelineStrategy("dsp", stages=3)):
        with pytest.raises(ConfigurationError, match="got 4 workers for the 3 stages"):
            Trainer(**{**QUIET, "strategy": strategy, "devices": 4})
    with pytest.raises(ConfigurationError, match="needs one of dsp"):
        PipelineStrategy("dspp")
    with pytest.raises(ConfigurationError, match="Leave both out"):
        PipelineStrategy(dsp(3), stages=2)
    with pytest.raises(ConfigurationError, match="Leave cuts out"):
        PipelineStrategy("dsp", traced=True, cuts=(1,))
    with pytest.raises(ConfigurationError, match=r"warmed_up\(5\)"):
        PipelineStrategy(dsp(3), warm_up=5)
    with pytest.raises(ConfigurationError, match="its delays are 0 or 1"):
        PipelineStrategy("gpipe", stages=2, warm_up=5)


def test_names_have_as_many_stages_as_workers() -> None:
    for name, workers, stages in (("dsp", 4, 4), ("ouroboros", 3, 4)):
        for made, warm_up in ((name, 0), (PipelineStrategy(name, warm_up=50), 50)):
            strategy = Trainer(**{**QUIET, "strategy": made, "devices": workers}).strategy
            assert isinstance(strategy, PipelineStrategy)
            assert (strategy.schedule.stages, strategy.schedule.warm_up) == (stages, warm_up)
