"""Proved here: under the asynchronous strategy no worker waits for a slower one inside an epoch, all batches of an
epoch are taken exactly once, the workers end it together and agree on what was validated; where epochs cannot be
shared, all take equal shards; settings that would put a barrier into every step are refused or made harmless."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from lightning_decentral import AsyncStrategy
from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.callbacks import Staleness, Stragglers
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies.shared_epoch import share_epoch, why_not_dealt
from lightning_decentral.topology import Ring
from strategies.fits import (
    Indices,
    OneLongGradient,
    Recorder,
    Regression,
    Samples,
    asynchronous,
    fit_kept,
    loader,
    make_trainer,
    saved,
)

pytestmark = pytest.mark.usefixtures("kept_forks")

WORKERS = 4


class Named(Regression):
    """The data are their own names: every worker notes what it was given."""

    def __init__(self, size: int = 64, batch_size: int = 2, workers: int = 0, **options: Any) -> None:
        super().__init__()
        self.options = {"batch_size": batch_size, "num_workers": workers, **options}
        self.data_size = size
        self.taken: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any) -> Any:
        self.taken.append((self.current_epoch, batch.tolist()))
        return self.network(torch.ones(1, 4, dtype=torch.float64)).sum()

    def validation_step(self, batch: Any) -> None:
        self.validated += batch.tolist()
        self.log(
            "val", self.network(batch.double().reshape(-1, 1).expand(-1, 4)).sum(), sync_dist=True, reduce_fx="sum"
        )

    def train_dataloader(self) -> Any:
        return DataLoader(Indices(self.data_size), **self.options)

    def val_dataloader(self) -> Any:
        return DataLoader(Indices(24), batch_size=2)


class Taken(Recorder):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept.setdefault("ended", []).append(trainer.current_epoch)

    def keep(self, trainer: Trainer, pl_module: Any) -> None:
        self.kept["taken"], self.kept["validated"] = pl_module.taken, pl_module.validated
        self.kept["steps"] = trainer.strategy.steps
        self.kept["exposed"] = trainer.strategy.traffic.exposed_seconds


def samples(worker: dict[str, Any], epoch: int) -> list[int]:
    return [sample for when, batch in worker["taken"] if when == epoch for sample in batch]


def test_nobody_waits_for_a_slow_worker_and_every_batch_is_taken_once(tmp_path: Path) -> None:
    """While one worker computes a gradient the others take all batches but its own and the one it has loaded ahead.
    With a barrier in every step all would take the same number of batches."""
    long = OneLongGradient(2, 128 - 2)
    trainer = make_trainer(
        tmp_path, asynchronous(), WORKERS, max_epochs=2, callbacks=[long, Taken(tmp_path)], limit_val_batches=0
    )
    trainer.fit(Named(size=256))
    workers = saved(tmp_path, WORKERS)
    assert 0 < len(samples(workers[2], 0)) // 2 <= 2
    for epoch in range(2):
        everything = [sample for worker in workers for sample in samples(worker, epoch)]
        assert sorted(everything) == list(range(256))
    assert [worker["ended"] for worker in workers] == [[0, 1]] * WORKERS
    assert [worker["steps"] for worker in workers] == [len(worker["taken"]) for worker in workers]


def test_a_step_has_no_hidden_barrier(tmp_path: Path) -> None:
    """Equal shards: the others make all their steps while one worker computes its first gradient.

    It fails when a new Lightning puts another collective into every step.
    """
    long = OneLongGradient(1, 2 * 30)
    trainer = make_trainer(tmp_path, asynchronous(), 3, max_steps=30, callbacks=[long, Recorder(tmp_path)])
    trainer.fit(Regression(size=4 * 3 * 30))
    assert [len(worker["weights"]) for worker in saved(tmp_path, 3)] == [30, 30, 30]


@pytest.mark.parametrize(
    ("size", "batch_size", "options"),
    [(33, 4, {}), (33, 4, {"drop_last": True}), (40, 4, {"workers": 1}), (32, 8, {"shuffle": True})],
    ids=["a smaller last batch", "drop_last", "loader processes", "shuffled, a batch each"],
)
def test_every_sample_once(size: int, batch_size: int, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, asynchronous(), WORKERS, max_epochs=3, callbacks=[Taken(tmp_path)], limit_val_batches=0
    )
    trainer.fit(Named(size, batch_size, **options))
    workers = saved(tmp_path, WORKERS)
    dropped = size % batch_size if options.get("drop_last") else 0
    orders = []
    for epoch in range(3):
        everything = [sample for worker in workers for sample in samples(worker, epoch)]
        assert len(everything) == len(set(everything)) == size - dropped
        assert all(samples(worker, epoch) for worker in workers)
        orders.append(samples(workers[0], epoch)[:batch_size])
    assert orders[0] != orders[1]  # Lightning permutes the training data of distributed runs, anew in each epoch


def test_the_validation_data_are_not_shared_out_like_an_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, asynchronous(), 3, max_epochs=2, callbacks=[Taken(tmp_path)])
    trainer.fit(Named(36))
    workers = saved(tmp_path, 3)
    for worker in workers:
        assert len(worker["validated"]) == 2 * 8
    assert sorted(sample for worker in workers for sample in worker["validated"]) == sorted(list(range(24)) * 2)
    assert len({worker["metrics"]["val"] for worker in workers}) == 1


FALLBACKS: dict[str, dict[str, Any]] = {
    "max_steps": {"max_steps": 8},
    "limit_train_batches": {"limit_train_batches": 8, "max_epochs": 1},
    "val_check_interval": {"val_check_interval": 4, "max_epochs": 1},
    "one batch in each epoch": {"limit_train_batches": 1, "max_epochs": 8},
    "a validation after each batch": {"val_check_interval": 1, "max_epochs": 1},
    "an own sampler": {"use_distributed_sampler": False, "max_epochs": 1, "limit_train_batches": 8},
}


@pytest.mark.parametrize("options", FALLBACKS.values(), ids=FALLBACKS)
def test_settings_that_count_steps_give_equal_shards(options: dict[str, Any], tmp_path: Path) -> None:
    stragglers = Stragglers({1: 4.0}, compute_seconds=0.002)
    trainer = make_trainer(tmp_path, asynchronous(), WORKERS, callbacks=[Taken(tmp_path), stragglers], **options)
    trainer.fit(Named(64))
    workers = saved(tmp_path, WORKERS)
    assert [worker["steps"] for worker in workers] == [8] * WORKERS
    if options.keys().isdisjoint({"use_distributed_sampler", "limit_train_batches"}):
        assert sorted(sample for worker in workers for sample in samples(worker, 0)) == list(range(64))


def test_epochs_are_not_shared_when_told_so(tmp_path: Path) -> None:
    stragglers = Stragglers({1: 4.0}, compute_seconds=0.002)
    callbacks = [Taken(tmp_path), stragglers]
    make_trainer(tmp_path, asynchronous(share_epoch=False), 2, max_epochs=1, callbacks=callbacks).fit(Named(64))
    assert [len(samples(worker, 0)) for worker in saved(tmp_path, 2)] == [32, 32]


def test_an_epoch_smaller_than_one_batch_each_is_not_shared(tmp_path: Path) -> None:
    make_trainer(tmp_path, asynchronous(), WORKERS, max_epochs=1, callbacks=[Taken(tmp_path)]).fit(Named(12, 4))
    assert [len(samples(worker, 0)) for worker in saved(tmp_path, WORKERS)] == [3] * WORKERS


# -- what would be a barrier ------------------------------------------------------------------------------------------


def test_synchronized_batch_norm_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="sync_batchnorm=True"):
        make_trainer(tmp_path, asynchronous(), 2, sync_batchnorm=True)


def test_a_checkpoint_by_time_is_saved_at_the_end_of_the_epoch_in_which_its_time_comes(tmp_path: Path) -> None:
    """Or with its validation; of a metric, too, that comes of that. Nobody waits in an epoch, where it would ask."""
    kinds: dict[str, dict[str, Any]] = {
        "epochs": {"train_time_interval": timedelta(0)},
        "validations": {"train_time_interval": timedelta(0), "monitor": "val", "save_on_train_epoch_end": False},
        "never": {"train_time_interval": timedelta(days=1)},
    }
    callbacks = [ModelCheckpoint(tmp_path / name, save_top_k=-1, **kind) for name, kind in kinds.items()]
    options: dict[str, Any] = {"max_epochs": 2, "callbacks": callbacks, "enable_checkpointing": True}
    fit_kept(tmp_path, AsyncStrategy(), 2, Named(16), **options)
    for name, kept in (("epochs", 2), ("validations", 2), ("never", 0)):
        assert len(list((tmp_path / name).glob("*.ckpt"))) == kept


class LogsEveryStep(Named):
    def training_step(self, batch: Any) -> Any:
        self.log("rank", float(self.global_rank), on_step=True, on_epoch=True, sync_dist=True)
        return super().training_step(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.log("from a hook", float(self.global_rank), on_step=True, on_epoch=False, sync_dist=True)


class Steps(Taken):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.kept.setdefault("logged", []).append(float(trainer.callback_metrics["rank_step"]))


def test_a_synchronized_metric_in_a_step_is_the_workers_own(tmp_path: Path) -> None:
    """With unequal numbers of steps a collective in each would be a barrier. An epoch has one mean for all workers."""
    long = OneLongGradient(2, 48 - 2)
    trainer = make_trainer(
        tmp_path, asynchronous(), 3, max_epochs=1, callbacks=[long, Steps(tmp_path)], limit_val_batches=0
    )
    trainer.fit(LogsEveryStep(96))
    workers = saved(tmp_path, 3)
    assert len({len(worker["taken"]) for worker in workers}) > 1
    for rank, worker in enumerate(workers):
        assert set(worker["logged"]) == {float(rank)}
        assert worker["metrics"]["from a hook"] == float(rank)
    assert len({worker["metrics"]["rank_epoch"] for worker in workers}) == 1


# -- agreement --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_whose_loaders_are_made_anew_uses_every_sample_once(tmp_path: Path) -> None:
    """Also if those that were made first would fetch, and claim, ahead."""
    options: dict[str, Any] = {"reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 0}
    keeps = ModelCheckpoint(tmp_path / "kept", save_last=True)
    first = make_trainer(
        tmp_path, asynchronous(), 2, max_epochs=1, callbacks=[keeps], enable_checkpointing=True, **options
    )
    first.fit(Named())
    second = make_trainer(tmp_path, asynchronous(), 2, max_epochs=3, callbacks=[Taken(tmp_path)], **options)
    second.fit(Named(workers=1), ckpt_path=tmp_path / "kept" / "last.ckpt")
    for epoch in (1, 2):
        everything = [sample for worker in saved(tmp_path, 2) for sample in samples(worker, epoch)]
        assert sorted(everything) == list(range(64))


class Worse(Named):
    def validation_step(self, batch: Any) -> None:
        self.log("val", float(self.current_epoch + self.global_rank), sync_dist=True)


def test_early_stopping_stops_all_workers_in_the_same_epoch(tmp_path: Path) -> None:
    stop = EarlyStopping("val", patience=2)
    stragglers = Stragglers({0: 4.0}, compute_seconds=0.002)
    trainer = make_trainer(tmp_path, asynchronous(), 3, max_epochs=50, callbacks=[stop, stragglers, Taken(tmp_path)])
    trainer.fit(Worse(36))
    assert [len(worker["ended"]) for worker in saved(tmp_path, 3)] == [3, 3, 3]


class Ages(Taken):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.kept.setdefault("staleness", []).append(trainer.strategy.staleness)

    def keep(self, trainer: Trainer, pl_module: Any) -> None:
        super().keep(trainer, pl_module)
        trainer.strategy.quiesce()  # so that all calls are counted
        self.kept["answered"] = trainer.strategy.traffic.calls_answered


def test_gradients_of_a_slow_worker_are_stale(tmp_path: Path) -> None:
    """The others make all their steps while one worker computes its first gradient, and nobody calls later."""
    steps = 30
    callbacks = [Staleness(), OneLongGradient(0, 2 * steps), Ages(tmp_path)]
    trainer = make_trainer(
        tmp_path,
        asynchronous(ADPSGD(Ring(3), max_pending_steps=1)),
        3,
        max_steps=steps,
        callbacks=callbacks,
        limit_val_batches=0,
    )
    trainer.fit(Named(240))
    slow, *others = saved(tmp_path, 3)
    assert slow["staleness"] == [slow["answered"]] + [0] * (steps - 1)
    assert slow["answered"] > steps / 2  # it is called in half of the steps of each of the two others
    for other in others:
        assert sum(other["staleness"]) <= other["answered"]
    assert slow["metrics"]["staleness"] == slow["staleness"][-1]
    assert slow["metrics"]["staleness/mean"] == pytest.approx(slow["answered"] / steps)
    assert slow["metrics"]["staleness/max"] == slow["answered"]


class Scored(Regression):
    def training_step(self, batch: Any) -> Any:
        self.log("score", float((self.global_step * (self.global_rank + 3)) % 5))
        return self.loss(batch)


def test_a_checkpoint_by_steps_is_decided_together(tmp_path: Path) -> None:
    """The monitored metric is each worker's own: all keep the same files, those that worker 0 names."""

    checkpoint = ModelCheckpoint(
        tmp_path / "files", filename="{step}", monitor="score", mode="max", save_top_k=2, every_n_train_steps=1
    )
    trainer = make_trainer(
        tmp_path, asynchronous(), 3, max_epochs=1, callbacks=[checkpoint, Recorder(tmp_path)], enable_checkpointing=True
    )
    trainer.fit(Scored(size=96))
    assert [len(worker["weights"]) for worker in saved(tmp_path, 3)] == [8, 8, 8]
    assert list((tmp_path / "files").glob("*.ckpt"))


class Validated(Regression):
    def train_dataloader(self) -> Any:
        return loader(24)

    def val_dataloader(self) -> Any:
        return loader(9)


def test_many_epochs_with_validation_and_checkpoints(tmp_path: Path) -> None:
    """Short epochs, so that the ends and beginnings of epochs are most of the run."""
    checkpoint = ModelCheckpoint(tmp_path / "files", monitor="val_loss", save_top_k=2)

    trainer = make_trainer(
        tmp_path,
        asynchronous(),
        3,
        max_epochs=12,
        callbacks=[checkpoint, Recorder(tmp_path)],
        enable_checkpointing=True,
    )
    trainer.fit(Validated())
    assert len({worker["metrics"]["val_loss"] for worker in saved(tmp_path, 3)}) == 1
    assert len(list((tmp_path / "files").glob("*.ckpt"))) == 2


class Backwards(DistributedSampler[int]):
    """Deals the samples in an order of its own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self))[::-1])


def test_a_sampler_that_deals_in_its_own_way_is_left_alone() -> None:
    data = Samples(16)
    for sampler, shared in ((Backwards(data, 2, 0), False), (DistributedSampler(data, 2, 0), True)):
        loader = DataLoader(data, batch_size=2, sampler=sampler)
        assert (share_epoch(loader, 0, 2, lambda epoch: 100) is not None) is shared
        assert loader.batch_sampler is not None
        assert (loader.batch_sampler.sampler is sampler) is not shared  # type: ignore[attr-defined]


class Stream(IterableDataset[int]):
    """Has no length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def test_why_a_loader_cannot_share_is_told() -> None:
    data = Samples(16)
    dealt = DistributedSampler(data, 2, 0)
    wrapped = DistributedSamplerWrapper(RandomSampler(data), num_replicas=2, rank=0)
    loaders: list[tuple[Any, str | None]] = [
        (DataLoader(data, batch_size=2, sampler=dealt), None),
        (DataLoader(Stream(), batch_size=2), "data set Stream is iterable"),
        (DataLoader(data, batch_size=None), r"batch_size=None"),
        (DataLoader(data, batch_sampler=[[0], [1]]), "a batch sampler of its own, list"),
        (DataLoader(data, batch_size=2, shuffle=True), "from a RandomSampler, and Lightning's Dist"),
        (DataLoader(data, batch_size=2, sampler=wrapped), "from a DistributedSamplerWrapper, and"),
        (DataLoader(data, batch_size=9, sampler=dealt), "16 samples, fewer than one batch of 9 for each of 2"),
        ([1, 2], "is a list"),
    ]
    for given, told in loaders:
        reason = why_not_dealt(given, 2)
        assert (reason is None) if told is None else (told in str(reason)), reason
