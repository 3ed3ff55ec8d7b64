"""Proved here: what a script counts, gathers, schedules and decides is right where workers make unequal steps.

One worker's first gradient takes as long as the others need for all their batches: it has one or two, they have the
rest. Lightning's counts are those of equal shards; schedules follow the data; what is gathered at the end of the epoch
has all rows and nothing else; one worker's stop is everybody's; what cannot be is refused with words, at once."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric

from lightning_decentral.algorithms import APSGD, DPSGD, Hogwild, SyncSGD
from strategies.fits import (
    Indices,
    OneLongGradient,
    Recorder,
    Regression,
    asynchronous,
    gossip,
    loader,
    make_trainer,
    saved,
)

pytestmark = pytest.mark.usefixtures("kept_forks")

SIZE, BATCH, ALL = 96, 4, -1
BATCHES = SIZE // BATCH


def slow_worker(workers: int, epochs_of_others: int = 1) -> OneLongGradient:
    """The last worker has the batch that it computes, and the one that it has asked for."""
    return OneLongGradient(workers - 1, epochs_of_others * BATCHES - 2)


class Model(Regression):
    """Twenty-four batches of four; one epoch."""

    def train_dataloader(self) -> Any:
        return loader(SIZE, BATCH)

    def val_dataloader(self) -> Any:
        return loader(12)


class Kept(Recorder):
    """Whatever the module has noted."""

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["noted"] = pl_module.noted
        self.kept["epochs"] = trainer.current_epoch


def fit(module: Model, folder: Path, workers: int = 3, **options: Any) -> list[dict[str, Any]]:
    """Train with a slow worker; what each worker noted."""
    module.noted = {}  # type: ignore[assignment]
    strategy = options.pop("strategy", None) or asynchronous()
    callbacks = [*options.pop("callbacks", [slow_worker(workers)]), Kept(folder)]
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(folder, strategy, workers, **{"max_epochs": 1, "callbacks": callbacks, **options})
    trainer.fit(module, ckpt_path=ckpt_path)
    return saved(folder, workers)


# -- counts and schedules ---------------------------------------------------------------------------------------------


class Counts(Model):
    def on_train_batch_end(self, *_: Any) -> None:
        trainer = self.trainer
        assert trainer.train_dataloader is not None
        counts = (trainer.num_training_batches, len(trainer.train_dataloader), trainer.estimated_stepping_batches)
        self.noted.setdefault("counts", set()).add(counts)  # type: ignore[operator]


def test_lightning_counts_an_equal_share_of_the_batches(tmp_path: Path) -> None:
    workers = fit(Counts(), tmp_path, reload_dataloaders_every_n_epochs=1, max_epochs=2)
    share = BATCHES // 3
    assert [worker["noted"]["counts"] for worker in workers] == [{(share, share, 2 * share)}] * 3
    assert sum(worker["global_step"] for worker in workers) == 2 * BATCHES


class Scheduled(Model):
    """Its learning rate says how many steps its schedule has made."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        total = int(self.trainer.estimated_stepping_batches)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=total + 1)
        return [optimizer], [{"scheduler": one_cycle, "interval": "step"}]

    def on_train_batch_end(self, *_: Any) -> None:
        scheduler = self.lr_schedulers()
        self.noted.setdefault("made", []).append(scheduler.last_epoch)  # type: ignore[union-attr,operator]


def test_schedules_by_steps_follow_the_data(tmp_path: Path) -> None:
    """All end where a worker of average speed would, also `OneCycleLR`, which refuses a step too many."""
    workers = fit(Scheduled(), tmp_path, 2, accumulate_grad_batches=(accumulate := 3), limit_val_batches=0)
    fast, slow = (worker["noted"]["made"] for worker in workers)
    assert fast[-1] == slow[-1] == BATCHES // 2 // accumulate
    assert len(slow) <= 2 < len(fast)
    assert fast == sorted(fast)
    assert max(after - before for before, after in pairwise(fast[:-1])) <= 1


def test_the_gradients_of_an_incomplete_last_window_are_applied(tmp_path: Path) -> None:
    workers = fit(Counts(), tmp_path, 2, accumulate_grad_batches=5, limit_val_batches=0)
    for worker in workers:
        assert worker["global_step"] == -(-len(worker["weights"]) // 5)
        if len(worker["weights"]) > 1:
            assert (worker["weights"][-1] != worker["weights"][-2]).any()


def test_weights_are_averaged_with_batch_norm(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    callbacks = [StochasticWeightAveraging(0.05, swa_epoch_start=1), slow_worker(2)]
    workers = fit(Model(network), tmp_path, 2, max_epochs=2, callbacks=callbacks)
    assert all(worker["state"]["network.1.running_mean"].isfinite().all() for worker in workers)
    assert all(0 < int(worker["state"]["network.1.num_batches_tracked"]) < BATCHES for worker in workers)
    torch.testing.assert_close(workers[0]["state"]["network.0.weight"], workers[1]["state"]["network.0.weight"])


# -- collectives ------------------------------------------------------------------------------------------------------


class Gathers(Model):
    """Gathers one number for each step of its own."""

    def __init__(self, shape: tuple[int, ...] = (), only_fast: bool = False) -> None:
        super().__init__()
        self.shape, self.only_fast, self.outputs = shape, only_fast, []  # type: ignore[var-annotated]

    def training_step(self, batch: Any) -> Tensor:
        if not self.only_fast or self.global_rank == 0:
            self.outputs.append(torch.full(self.shape, float(self.global_rank)))
        return super().training_step(batch)

    def on_train_epoch_end(self) -> None:
        own = torch.stack(self.outputs) if self.outputs else torch.tensor([], dtype=torch.int32)
        self.noted["steps"], self.noted["every"] = len(self.outputs), self.all_gather(own)  # type: ignore[index]


@pytest.mark.parametrize(("shape", "only_fast"), [((), False), ((3,), True)], ids=["numbers", "none on a worker"])
def test_what_unequal_epochs_left_is_gathered_without_gaps(
    shape: tuple[int, ...], only_fast: bool, tmp_path: Path
) -> None:
    workers = fit(Gathers(shape, only_fast), tmp_path)
    steps = [worker["noted"]["steps"] for worker in workers]
    assert len(set(steps)) > 1
    rows = torch.tensor([float(rank) for rank in range(3) for _ in range(steps[rank])])
    for worker in workers:
        every = worker["noted"]["every"]
        assert every.shape == (1, sum(steps), *shape)
        assert torch.equal(every.flatten(0, 1), rows.reshape(-1, *[1] * len(shape)).expand(-1, *shape))


@pytest.mark.parametrize("strategy", ["asynchronous", "gossip"])
def test_what_equal_epochs_left_is_stacked_as_by_lightning(strategy: str, tmp_path: Path) -> None:
    chosen = {"asynchronous": asynchronous(share_epoch=False), "gossip": gossip(DPSGD())}
    workers = fit(Gathers((3,)), tmp_path, 2, strategy=chosen[strategy], callbacks=[])
    expected = torch.stack([torch.zeros(12, 3), torch.ones(12, 3)])
    for worker in workers:
        assert torch.equal(worker["noted"]["every"], expected)


class Contrastive(Model):
    def __init__(self, ragged: bool = False) -> None:
        super().__init__()
        self.ragged = ragged

    def training_step(self, batch: Any) -> Tensor:
        inputs, targets = batch
        if self.ragged and self.global_rank == 1:
            inputs, targets = inputs[1:], targets[1:]
        error = self.network(inputs) - targets
        return self.all_gather(error, sync_grads=True).flatten(0, 1).square().sum() / 8


def test_gradients_flow_through_a_gathering_in_a_synchronous_step(tmp_path: Path) -> None:
    trained = []
    for name, strategy in {"ddp": "ddp_fork", "ours": gossip(SyncSGD())}.items():
        (tmp_path / name).mkdir()
        trained.append(fit(Contrastive(), tmp_path / name, 2, strategy=strategy, callbacks=[])[0]["weights"][-1])
    torch.testing.assert_close(*trained)


def test_gradients_flow_through_a_gathering_of_unequal_batches(tmp_path: Path) -> None:
    workers = fit(Contrastive(ragged=True), tmp_path, 2, strategy=gossip(SyncSGD()), callbacks=[])
    assert (workers[0]["weights"][0] != workers[0]["weights"][-1]).all()
    torch.testing.assert_close(workers[0]["weights"][-1], workers[1]["weights"][-1])


class Lists(Gathers):
    def on_train_epoch_end(self) -> None:
        self.all_gather(self.outputs)  # a collective for each of its entries


class Saves(Model):
    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "here.ckpt")


class Waits(Model):
    def on_train_batch_start(self, *_: Any) -> None:
        self.trainer.strategy.barrier()


REFUSED: dict[str, tuple[Model, str]] = {
    "gathering in a step": (Contrastive(), "all_gather inside a step.*share_epoch=False does not help"),
    "a list of unequal length": (Lists(), "workers do not do the same.*gathered list that is longer"),
    "a checkpoint in a step": (Saves(), "a checkpoint inside a step.*share_epoch=False"),
    "a barrier in a step": (Waits(), "barrier inside a step.*share_epoch=False"),
}


@pytest.mark.parametrize(("module", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_wait_for_ever_is_refused(module: Model, words: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=rf"(?s){words}"):
        fit(module, tmp_path, 2, callbacks=[slow_worker(2)] if isinstance(module, Lists) else [])


@pytest.mark.parametrize("what", ["SpikeDetection", "SyncBatchNorm", "dist_sync_on_step"])
def test_what_waits_in_every_step_is_refused_before_training(what: str, tmp_path: Path) -> None:
    module = Model()
    module.extra = MeanMetric(dist_sync_on_step=True) if what == "dist_sync_on_step" else nn.Identity()
    if what == "SyncBatchNorm":
        module.extra = nn.SyncBatchNorm(4)
    with pytest.raises(Exception, match=what):
        fit(module, tmp_path, 2, callbacks=[SpikeDetection()] if what == "SpikeDetection" else [])


class Sometimes(Model):
    """Logs in some steps only, and in another order on each worker."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        names = ["one", "two"] if self.global_rank else ["two", "one"]
        for name in names:
            self.log(name, float(len(name) + ord(name[0])), on_step=False, on_epoch=True, sync_dist=True)
        if batch_idx == 5:
            self.log("sometimes", 7.0, on_step=False, on_epoch=True, sync_dist=True)
        return super().training_step(batch)


def test_a_value_that_only_some_have_logged_is_their_own(tmp_path: Path) -> None:
    fast, slow = fit(Sometimes(), tmp_path, 2)
    assert fast["metrics"]["sometimes"] == 7.0
    assert "sometimes" not in slow["metrics"]
    for worker in (fast, slow):
        assert (worker["metrics"]["one"], worker["metrics"]["two"]) == (3.0 + ord("o"), 3.0 + ord("t"))


class Metered(Model):
    """A metric that is also asked in each step, and one that keeps every value."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.every = MeanMetric(), CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        self.mean.update(self.global_rank)
        self.noted.setdefault("in a step", set()).add(float(self.mean.compute()))  # type: ignore[operator]
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        if self.global_rank == 0:
            self.every.update(torch.tensor([batch_idx]))
        return super().training_step(batch)

    def on_train_epoch_end(self) -> None:
        self.noted["every"] = self.every.compute()  # type: ignore[index]


def test_metrics_are_own_in_a_step_and_of_all_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    workers = fit(Metered(), tmp_path)
    steps = [len(worker["weights"]) for worker in workers]
    for rank, worker in enumerate(workers):
        assert worker["noted"]["in a step"] == {float(rank)}
        assert worker["metrics"]["mean"] == pytest.approx((steps[1] + 2 * steps[2]) / BATCHES)
        assert worker["noted"]["every"].tolist() == list(range(steps[0]))


# -- decisions --------------------------------------------------------------------------------------------------------


class Stops(Model):
    """One worker stops after its second step."""

    def __init__(self, who: int, step: int = 2) -> None:
        super().__init__()
        self.who, self.step = who, step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_rank == self.who and self.trainer.global_step >= self.step:
            self.trainer.should_stop = True

    def on_validation_start(self) -> None:
        self.noted["validations"] = self.noted.get("validations", 0) + 1  # type: ignore[index,attr-defined]


STOPS: dict[str, tuple[int, dict[str, Any]]] = {
    "a fast one, validated": (0, {}),
    "a slow one, not validated": (2, {"limit_val_batches": 0, "enable_checkpointing": True}),
    "every second epoch validated": (0, {"check_val_every_n_epoch": 2}),
    "equal shards": (2, {"strategy": asynchronous(share_epoch=False)}),
    "validated inside the epoch": (0, {"val_check_interval": 3}),
    "at least two epochs": (0, {"min_epochs": 2}),
}


@pytest.mark.parametrize(("who", "options"), STOPS.values(), ids=STOPS)
def test_one_workers_stop_stops_all_in_the_same_epoch(who: int, options: dict[str, Any], tmp_path: Path) -> None:
    callbacks = [slow_worker(3)] if who == 2 and "strategy" not in options else []
    workers = fit(Stops(who), tmp_path, **{**options, "max_epochs": 50, "callbacks": callbacks})
    assert len({worker["epochs"] for worker in workers}) == 1
    assert len({worker["noted"].get("validations") for worker in workers}) == 1
    assert options.get("min_epochs", 1) <= workers[0]["epochs"] < 50


class StopsLate(Stops):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_rank == self.who:
            time.sleep(1.0)
        super().on_train_batch_end(outputs, batch, batch_idx)


@pytest.mark.parametrize("algorithm", [APSGD(), Hogwild()], ids=lambda each: type(each).__name__)
def test_who_stops_early_meets_those_that_are_through(algorithm: Any, tmp_path: Path) -> None:
    """The others have made all their batches, and wait for it before they validate."""
    workers = fit(StopsLate(0, step=1), tmp_path, strategy=asynchronous(algorithm), max_epochs=50, callbacks=[])
    assert len({(worker["epochs"], worker["noted"].get("validations")) for worker in workers}) == 1


class StopsAfterwards(Stops):
    """Stops at the end of its first epoch."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.who in (self.global_rank, ALL)


@pytest.mark.parametrize(("who", "epochs"), [(0, 2), (ALL, 1)], ids=["a fast one", "all"])
def test_a_stop_at_the_end_of_an_epoch_stops_all(who: int, epochs: int, tmp_path: Path) -> None:
    """One that stops alone goes on for a batch of the next epoch, which others may have begun."""
    workers = fit(StopsAfterwards(who), tmp_path, max_epochs=50, limit_val_batches=0)
    assert [worker["epochs"] for worker in workers] == [epochs] * 3


def test_a_time_limit_stops_all_in_the_same_epoch(tmp_path: Path) -> None:
    workers = fit(Stops(99), tmp_path, max_epochs=-1, callbacks=[Timer({"seconds": 1})])
    assert len({(worker["epochs"], worker["noted"].get("validations")) for worker in workers}) == 1


# -- a new set of parameters ------------------------------------------------------------------------------------------


class Backbone(Model):
    def __init__(self, at_batch: int | None = None) -> None:
        super().__init__()
        self.backbone, self.at_batch = nn.Linear(4, 4).double(), at_batch
        if at_batch is not None:
            self.backbone.requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        return super().loss((self.backbone(batch[0]), batch[1]))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at_batch:
            self.backbone.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.backbone.parameters())})  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def test_parameters_unfrozen_at_the_beginning_of_an_epoch_are_exchanged(tmp_path: Path) -> None:
    finetuning = BackboneFinetuning(1, verbose=False)
    module = Backbone()
    start = module.backbone.weight.clone()
    workers = fit(module, tmp_path, max_epochs=3, callbacks=[slow_worker(3), finetuning], limit_val_batches=0)
    own = torch.stack([worker["state"]["backbone.weight"] for worker in workers])
    assert (own != start).all()
    torch.testing.assert_close(module.backbone.weight, own.mean(0))  # it is a part of what all have averaged


def test_parameters_unfrozen_in_the_middle_of_an_epoch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"(?s)in the middle of an epoch.*beginning of an epoch"):
        fit(Backbone(at_batch=3), tmp_path, 2, callbacks=[])


# -- going on ---------------------------------------------------------------------------------------------------------


class Numbered(Model):
    """Its data are their own names."""

    def training_step(self, batch: Any) -> Tensor:
        self.noted.setdefault("taken", []).append((self.current_epoch, batch.tolist()))  # type: ignore[operator]
        return self.network(torch.ones(1, 4, dtype=torch.float64)).sum()

    def train_dataloader(self) -> Any:
        return DataLoader(Indices(SIZE), BATCH)


class LooksAgain(Numbered):
    def on_train_epoch_end(self) -> None:
        assert self.trainer.train_dataloader is not None
        self.noted["again"] = [sample for batch in self.trainer.train_dataloader for sample in batch.tolist()]  # type: ignore[index]


def test_user_code_that_goes_through_the_training_data_gets_an_equal_share(tmp_path: Path) -> None:
    workers = fit(LooksAgain(), tmp_path, limit_val_batches=0)
    taken = [sample for worker in workers for _, batch in worker["noted"]["taken"] for sample in batch]
    assert sorted(taken) == list(range(SIZE))
    again = [worker["noted"]["again"] for worker in workers]
    assert [len(each) for each in again] == [SIZE // 3] * 3
    assert sorted(sample for each in again for sample in each) == list(range(SIZE))


def test_a_search_that_stops_early_does_not_stop_training(tmp_path: Path) -> None:
    finder = LearningRateFinder(max_lr=1e12, num_training_steps=20, early_stop_threshold=1.5)
    workers = fit(Searched(), tmp_path, 2, max_epochs=3, callbacks=[finder])
    assert [worker["epochs"] for worker in workers] == [3, 3]


class Searched(Model):
    """Diverges in the search."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def test_a_run_that_goes_on_within_an_epoch_shares_what_is_left_of_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
    by_steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    (before := tmp_path / "before").mkdir()
    first = fit(Numbered(), before, 2, callbacks=[by_steps], enable_checkpointing=True, **options)
    used = [sample for worker in first for _, batch in worker["noted"]["taken"][:4] for sample in batch]
    second = fit(Numbered(), tmp_path, 2, callbacks=[], ckpt_path=tmp_path / "step=4.ckpt", **options)
    taken = [(epoch, sample) for worker in second for epoch, batch in worker["noted"]["taken"] for sample in batch]
    assert sorted(used + [sample for epoch, sample in taken if epoch == 0]) == list(range(SIZE))
    assert sorted(sample for epoch, sample in taken if epoch == 1) == list(range(SIZE))
