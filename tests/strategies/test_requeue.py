"""Proved here: when SLURM says to one worker, in the middle of a batch, that the job's time is over, all stop together,
save one checkpoint with the state of each, and queue the job again, once; the next run goes on from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral import AsyncStrategy, GossipStrategy, Strategy
from lightning_decentral.algorithms import ADPSGD, DPSGD
from strategies.fits import Regression, fit_kept

WORKERS, STEPS = 2, 8


class Job(SLURMEnvironment):
    """A job of SLURM, whose workers are those that the tests keep."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=True)
        self.there = LightningEnvironment()

    def __getattribute__(self, name: str) -> Any:
        asked = ("main_address", "main_port", "world_size", "set_world_size", "global_rank", "set_global_rank")
        if name in (*asked, "local_rank", "node_rank", "creates_processes_externally", "validate_settings"):
            return getattr(object.__getattribute__(self, "there"), name)
        return object.__getattribute__(self, name)


class Notice(Callback):
    """Gives worker 1 the notice in its third batch, with the ``scontrol`` that it has; notes the epochs."""

    def __init__(self, folder: Path, gives: bool) -> None:
        self.folder, self.gives = folder, gives

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.before = dict(os.environ)
        os.environ.update(PATH=f"{self.folder}:{self.before['PATH']}", SLURM_JOB_ID="7")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        os.environ.clear()
        os.environ.update(self.before)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with open(self.folder / f"epochs-{trainer.global_rank}", "a") as file:
            file.write(f"{trainer.current_epoch} ")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.gives and trainer.global_rank == 1 and trainer.current_epoch == 1 and batch_idx == 2:
            signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize(
    "strategy",
    [GossipStrategy(DPSGD(), exchange_timeout_seconds=60.0), AsyncStrategy(ADPSGD(), exchange_timeout_seconds=60.0)],
    ids=["dpsgd", "adpsgd"],
)
def test_a_job_whose_time_is_over_is_queued_again_and_goes_on(strategy: Strategy, tmp_path: Path) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    program.chmod(0o755)
    for begins_at in (None, "hpc"):  # which Lightning takes by itself in a job of SLURM
        module, notice = Regression(size=4 * STEPS * WORKERS), Notice(tmp_path, gives=begins_at is None)
        options: dict[str, Any] = {"plugins": [Job()], "callbacks": [notice], "max_epochs": 4, "ckpt_path": begins_at}
        fit_kept(tmp_path, strategy, WORKERS, module, **options)
        assert (tmp_path / "said").read_text() == "requeue 7\n"
    saved = [torch.load(path, weights_only=False) for path in (tmp_path / "hpc_ckpt_1.ckpt.workers").iterdir()]
    assert len(saved) == WORKERS
    # The notice may come when worker 0 has left its second epoch.
    last = 2 if isinstance(strategy, GossipStrategy) else 3
    assert STEPS * WORKERS < sum(each["global_step"] for each in saved) < last * STEPS * WORKERS
    assert not (tmp_path / "hpc_ckpt_2.ckpt").exists()
    assert [(tmp_path / f"epochs-{rank}").read_text().split() for rank in range(WORKERS)] == [["0", "1", "2", "3"]] * 2
