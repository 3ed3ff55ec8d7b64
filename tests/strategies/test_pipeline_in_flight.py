"""Proved here: with `drains=False` stages do not stop at the ends of epochs, and a checkpoint has what is in flight: to
save it changes nothing, and a run that is resumed in mid-epoch trains on to the same bits, over processes
and in one. Where other stages go on, they say what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import kept_workers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_decentral import PipelineStrategy
from lightning_decentral.pipeline.schedules import Schedule, ddg, dsp, ouroboros, pipe_2bw, pipedream

from .fits import QUIET

EPOCH = 6  # batches


class Batches:
    """A loader that a run can go on with where another one was."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(EPOCH, 8, 4, generator=generator, dtype=torch.float64)
        self._y = torch.randint(0, 3, (EPOCH, 8), generator=generator)
        self._next = 0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._next %= EPOCH
        while self._next < EPOCH:
            self._next += 1
            yield self._x[self._next - 1], self._y[self._next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


class Net(LightningModule):
    """With everything that a graph which is made again could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.2)),
            *(nn.Tanh(), nn.Linear(8, 3)),
        ).double()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        return Batches()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.03)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class UnderWay(Callback):
    """Counts what is under way in a worker's first stage at the ends of epochs."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, PipelineStrategy)
        assert strategy._runner is not None
        self.found.append(next(iter(strategy._runner.stages.values())).under_way)


def fit(
    rank: int, folder: Path, schedule: Schedule, devices: int, save: bool = False, resume: Path | None = None
) -> tuple[dict[str, Tensor], list[int]]:
    """The trained model of one worker, and what was under way at the ends of epochs."""
    strategy = PipelineStrategy(schedule, drains=False, exchange_timeout_seconds=60.0, seed=0)
    under_way = UnderWay()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": save, "strategy": strategy, "devices": devices},
        default_root_dir=folder,
        gradient_clip_val=0.5,
        max_epochs=2,
        callbacks=[under_way, *([saving] if save else [])],
    )
    module = Net()
    trainer.fit(module, ckpt_path=resume)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}, under_way.found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("schedule", "at_end"),
    [
        (dsp(3).predicted(0.5), 4),
        (ddg(3).predicted(0.5).slowed(5), 2),
        (ouroboros(3), 2),
        (pipe_2bw(2, 3), 1),
        (pipedream(3).warmed_up(3), 2),
    ],
)
def test_a_run_that_is_resumed_trains_on_to_the_same_bits(schedule: Schedule, at_end: int, tmp_path: Path) -> None:
    workers = kept_workers(1)
    ((undisturbed, under_way),) = workers.run(fit, tmp_path, schedule, 1)
    ((saving, _),) = workers.run(fit, tmp_path, schedule, 1, True)
    assert under_way[-1] == at_end
    assert same(undisturbed, saving)
    for step in (4, 8):  # in the first and in the second epoch
        ((resumed, _),) = workers.run(fit, tmp_path, schedule, 1, False, tmp_path / f"step={step}.ckpt")
        assert same(undisturbed, resumed), step


@pytest.mark.parametrize(("schedule", "workers"), [(dsp(2), 2), (ouroboros(3), 2)])
def test_processes_resume_each_others_flights(schedule: Schedule, workers: int, tmp_path: Path) -> None:
    ((alone, _),) = kept_workers(1).run(fit, tmp_path, schedule, 1)
    file = tmp_path / "step=8.ckpt"
    for state, _ in kept_workers(workers).run(fit, tmp_path, schedule, workers, True):
        assert same(alone, state)
    for state, _ in kept_workers(workers).run(fit, tmp_path, schedule, workers, False, file):
        assert same(alone, state)
    ((resumed, _),) = kept_workers(1).run(fit, tmp_path, schedule, 1, False, file)
    assert same(alone, resumed)


def test_other_stages_go_on_without_what_was_in_flight(tmp_path: Path) -> None:
    kept_workers(1).run(fit, tmp_path, dsp(3), 1, True)
    file = tmp_path / "step=4.ckpt"
    saved = torch.load(file, weights_only=True)
    assert len(saved["lightning_decentral_pipeline"]["in_flight"]["stages"]) == 3
    with pytest.warns(UserWarning, match="has 4 batches under way, of .*goes on without them"):
        fit(0, tmp_path, dsp(2), 1, False, file)
    plain = Net()
    plain.load_state_dict(saved["state_dict"])
    Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=2).fit(plain, ckpt_path=file)
