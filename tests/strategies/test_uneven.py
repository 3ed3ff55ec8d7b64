"""Proved here: whoever runs out of batches, or wants to stop, does not let the others wait: all make the same number of
steps, validate and save together, and end the run together, in every method and under both rules. Where nothing is
uneven, nothing is sent for it.

A worker that waits for another one in vain gives up after `SECONDS`, and the test fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_decentral import AsyncStrategy, GossipStrategy
from lightning_decentral.algorithms import DPSGD, SAEF, ChocoSGD, SyncSGD
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.topology import Complete
from strategies.fits import Recorder, Regression, Samples, fit_kept, loader, saved

pytestmark = pytest.mark.usefixtures("kept_forks")

SECONDS = 60.0
METHODS: dict[str, Callable[[], AbstractAlgorithm]] = {
    "dpsgd": DPSGD,
    "sync_sgd": SyncSGD,
    "choco_sgd": ChocoSGD,
    "saef": lambda: SAEF(averaging_period=2),
}
ALL_EQUAL = ("sync_sgd", "saef")  # whose workers have the same model at any time


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples without a length, as many batches of one as the worker's entry says."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths, self.samples = lengths, Samples(64)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.samples[index % 64] for index in range(self.lengths[dist.get_rank()]))


class Uneven(Regression):
    """Worker r has ``lengths[r]`` batches in an epoch; a learning rate that changes with the epoch and the step."""

    def __init__(self, *lengths: int, sized: bool = False, together: bool = True, manual: int = 0) -> None:
        super().__init__()
        self.lengths, self.sized, self.together, self.manual = lengths, sized, together, manual
        self.automatic_optimization = not manual
        self.own = self.validations = 0

    def training_step(self, batch: Any) -> Any:
        self.own += 1
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=self.together, on_step=True, on_epoch=True)
        if self.manual:
            optimizer: Any = self.optimizers()
            for _ in range(self.manual):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
            return None
        return loss

    def on_validation_end(self) -> None:
        self.validations += 1

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def train_dataloader(self) -> Any:
        if self.sized:
            return loader(self.lengths[self.global_rank], 1)
        return DataLoader(Stream(self.lengths), batch_size=1)

    def val_dataloader(self) -> Any:
        return loader(8)


class Ended(Recorder):
    """What every worker has counted."""

    def keep(self, trainer: Trainer, pl_module: Any) -> None:
        self.kept["own"] = pl_module.own
        self.kept["counts"] = {
            "steps": trainer.strategy.steps,
            "global_step": trainer.global_step,
            "epochs": trainer.current_epoch,
            "batches": trainer.fit_loop.epoch_loop.batch_progress.total.completed,
            "validations": pl_module.validations,
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        self.kept["own model"] = torch.cat([p.detach().reshape(-1).clone() for p in pl_module.parameters()])


class StopsAt(Callback):
    """One worker wants to stop after so many batches, said in some hook."""

    def __init__(self, rank: int, step: int, hook: str = "on_train_batch_end") -> None:
        self.rank, self.step = rank, step
        setattr(self, hook, self.stop)

    def stop(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step >= self.step:
            trainer.should_stop = True


def fit(
    folder: Path,
    module: LightningModule,
    method: str = "dpsgd",
    rule: Any = "continue",
    workers: int = 3,
    callbacks: tuple[Callback, ...] = (),
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each worker has recorded, and what all have counted."""
    strategy = GossipStrategy(METHODS[method](), exchange_timeout_seconds=SECONDS, uneven=rule)
    options = {"max_epochs": 2, "use_distributed_sampler": False, **options}
    fit_kept(folder, strategy, workers, module, callbacks=[*callbacks, Ended(folder)], **options)
    ended = saved(folder, workers)
    assert all(worker["counts"] == ended[0]["counts"] for worker in ended), [worker["counts"] for worker in ended]
    return ended, ended[0]["counts"]


@pytest.mark.parametrize("method", METHODS)
def test_workers_without_batches_go_on_without_gradients(method: str, tmp_path: Path) -> None:
    """Two epochs, and a third that one of them stops."""
    ended, counts = fit(tmp_path, Uneven(3, 9, 6), method, max_epochs=9, callbacks=(StopsAt(1, 22),))
    for worker, length in zip(ended, (3, 9, 6), strict=True):
        assert 2 * length + 3 <= worker["own"] <= 3 * length
    assert 22 <= counts["steps"] == counts["global_step"] == counts["batches"] <= 25
    assert (counts["epochs"], counts["validations"]) == (3, 3)
    assert counts["rate"] == pytest.approx(0.05 * 0.81)
    models = torch.stack([worker["own model"] for worker in ended])
    assert models.isfinite().all()
    if method in ALL_EQUAL:
        torch.testing.assert_close(models, models[:1].expand_as(models), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "sized"), [("dpsgd", False), ("sync_sgd", False), ("choco_sgd", True)])
def test_an_epoch_ends_with_the_first_that_has_no_more(method: str, sized: bool, tmp_path: Path) -> None:
    """A loader without a length is missed when somebody has begun a batch more, or two."""
    ended, counts = fit(tmp_path, Uneven(3, 20, 12, sized=sized), method, "stop")
    assert ended[0]["own"] == 6
    assert 6 <= counts["steps"] <= (6 if sized else 12)
    assert (counts["epochs"], counts["validations"]) == (2, 2)


def test_empty_steps_average_and_change_nothing_else(tmp_path: Path) -> None:
    """On the complete graph: what runs out of batches is drawn to the others, whose models it does not leave alone."""
    strategy = GossipStrategy(DPSGD(Complete(2)), exchange_timeout_seconds=SECONDS, average_at_end=False)
    options = {"callbacks": [Ended(tmp_path)], "max_epochs": 1, "limit_val_batches": 0}
    fit_kept(tmp_path, strategy, 2, Uneven(0, 4, together=False), **options)
    idle, busy = saved(tmp_path, 2)
    start = torch.cat([p.detach().reshape(-1) for p in Uneven(0).parameters()])
    x = [start.clone(), start.clone()]
    for batch in range(4):
        module = Uneven(0)
        torch.nn.utils.vector_to_parameters(x[1], module.parameters())
        inputs, targets = Samples(64)[batch]
        gradients = torch.autograd.grad(module.loss((inputs[None], targets[None])), list(module.parameters()))
        mean = (x[0] + x[1]) / 2
        x = [mean, mean - 0.05 * torch.cat([gradient.reshape(-1) for gradient in gradients])]
    torch.testing.assert_close(idle["own model"], x[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(busy["own model"], x[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"val_check_interval": 2}, 8),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, 4),
        ({"check_val_every_n_epoch": 2}, 1),
        ({"limit_train_batches": 5}, 2),
    ],
)
def test_validations_come_at_the_same_moments(options: dict[str, Any], validations: int, tmp_path: Path) -> None:
    _, counts = fit(tmp_path, Uneven(2, 9, 6), **options)
    assert counts["validations"] == validations


class Fewer(DistributedSampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self) - self.rank))


class Lies(Uneven):
    def train_dataloader(self) -> Any:
        sampler = Fewer(Samples(24), self.trainer.world_size, self.global_rank)
        return DataLoader(Samples(24), batch_size=1, sampler=sampler)


def test_a_loader_may_have_fewer_batches_than_it_says(tmp_path: Path) -> None:
    ended, counts = fit(tmp_path, Lies(8, 7, 6))
    assert [worker["own"] for worker in ended] == [16, 14, 12]
    assert counts["steps"] == 16


def test_known_lengths_have_one_schedule_of_validations(tmp_path: Path) -> None:
    _, counts = fit(tmp_path, Uneven(3, 9, 6, sized=True), val_check_interval=0.34)
    assert (counts["validations"], counts["steps"]) == (6, 18)


@pytest.mark.parametrize(("method", "lengths"), [("dpsgd", (3, 10, 6)), ("sync_sgd", (5, 17, 6))])
def test_accumulated_gradients_are_applied_together(method: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    ended, counts = fit(tmp_path, Uneven(*lengths), method, accumulate_grad_batches=4)
    assert [worker["own"] for worker in ended] == [2 * length for length in lengths]
    assert counts["batches"] == 2 * max(lengths)
    assert counts["steps"] == counts["global_step"] == 2 * -(-max(lengths) // 4)


@pytest.mark.parametrize(("method", "updates"), [("dpsgd", 3), ("sync_sgd", 1), ("sync_sgd", 3)])
def test_manual_optimization(method: str, updates: int, tmp_path: Path) -> None:
    ended, counts = fit(tmp_path, Uneven(3, 9, 6, manual=updates), method)
    assert [worker["own"] for worker in ended] == [6, 18, 12]
    assert counts["global_step"] == 18 * updates


def test_checkpoints_by_steps_and_resuming(tmp_path: Path) -> None:
    """A run may go on from the middle of an epoch in which some are through."""
    folder = tmp_path / "files"
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, Uneven(3, 9, 6), callbacks=(checkpoint,), enable_checkpointing=True)
    assert sorted(path.name for path in folder.glob("*.ckpt")) == [f"step={step}.ckpt" for step in (12, 16, 4, 8)]
    strategy = GossipStrategy(DPSGD(), exchange_timeout_seconds=SECONDS)
    options = {"callbacks": [Ended(tmp_path)], "max_epochs": 2, "ckpt_path": folder / "step=12.ckpt"}
    fit_kept(tmp_path, strategy, 3, Uneven(3, 9, 6), **options)
    ended = saved(tmp_path, 3)
    assert len({(worker["counts"]["steps"], worker["counts"]["epochs"]) for worker in ended}) == 1


# -- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rank"), [("dpsgd", 0), ("saef", 1)])
def test_a_stop_of_one_worker_stops_all(method: str, rank: int, tmp_path: Path) -> None:
    _, counts = fit(tmp_path, Uneven(400, 400, 400), method, callbacks=(StopsAt(rank, 5),))
    assert 5 <= counts["steps"] <= 8
    assert counts["validations"] == 1


@pytest.mark.parametrize(
    ("hook", "options", "steps"),
    [
        ("on_train_batch_start", {}, (5, 8)),
        ("on_validation_end", {"val_check_interval": 4}, (8, 11)),
        ("on_train_epoch_end", {"limit_train_batches": 6}, (6, 6)),
        ("on_train_batch_end", {"accumulate_grad_batches": 2}, (5, 8)),
    ],
)
def test_a_stop_may_come_from_anywhere(hook: str, options: dict[str, Any], steps: Any, tmp_path: Path) -> None:
    module = Uneven(400, 400, 400)
    _, counts = fit(tmp_path, module, callbacks=(StopsAt(1, 5, hook),), **{"max_epochs": 9, **options})
    assert steps[0] <= counts["steps"] <= steps[1]


def test_a_stop_while_others_have_no_more_batches(tmp_path: Path) -> None:
    _, counts = fit(tmp_path, Uneven(2, 400, 400), callbacks=(StopsAt(1, 9),))
    assert 9 <= counts["steps"] <= 12


class Limits(Uneven):
    """Every worker has a limit of its own."""

    def __init__(self, *limits: int, name: str) -> None:
        super().__init__(6, 6, 6)
        self.limits, self.name = limits, name

    def on_fit_start(self) -> None:
        loop: Any = self.trainer.fit_loop if self.name == "max_epochs" else self.trainer.fit_loop.epoch_loop
        setattr(loop, self.name, self.limits[self.global_rank])


@pytest.mark.parametrize("method", ["sync_sgd"])
def test_the_smallest_limit_ends_the_run(method: str, tmp_path: Path) -> None:
    _, counts = fit(tmp_path, Limits(4, 2, 3, name="max_epochs"), method, max_epochs=4)
    assert (counts["epochs"], counts["steps"]) == (2, 12)
    _, counts = fit(tmp_path, Limits(30, 8, 20, name="max_steps"), method, max_epochs=-1, max_steps=30)
    assert 8 <= counts["steps"] <= 11


class Breaks(Uneven):
    """One worker's epoch ends in a hook, or in its step."""

    where = ""

    def ends(self, batch_idx: int) -> bool:
        return self.global_rank == 1 and batch_idx >= 3

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.where == "hook" and self.ends(batch_idx) else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.ends(batch_idx):
            raise StopIteration
        return super().training_step(batch)


@pytest.mark.parametrize("where", ["hook", "step"])
def test_user_code_that_ends_the_epoch_of_one_worker(where: str, tmp_path: Path) -> None:
    module = Breaks(9, 9, 9)
    module.where = where
    ended, counts = fit(tmp_path, module)
    assert [worker["own"] for worker in ended] == [18, 6, 18]
    assert counts["steps"] == 18


class Loads(Uneven):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        self.own += 1
        loss = self.loss(batch)
        self.log("loss", loss, sync_dist=True, batch_size=1)
        return loss


@pytest.mark.parametrize("lengths", [(3, 9, 6), (6, 6, 6)])
def test_steps_that_load_their_batches_themselves(lengths: tuple[int, ...], tmp_path: Path) -> None:
    """Nobody knows which one is the last before it is asked for: the one after it has to be agreed on."""
    ended, counts = fit(tmp_path, Loads(*lengths))
    assert [worker["own"] for worker in ended] == [2 * length for length in lengths]
    assert counts["global_step"] - 2 * max(lengths) in (0, 1, 2)


def test_a_stop_under_an_asynchronous_strategy(tmp_path: Path) -> None:
    options = {"max_epochs": 9, "callbacks": [StopsAt(1, 5), Ended(tmp_path)]}
    fit_kept(tmp_path, AsyncStrategy(exchange_timeout_seconds=SECONDS), 3, Uneven(40_000, 40_000, 40_000), **options)
    counts = [worker["counts"] for worker in saved(tmp_path, 3)]
    assert [(each["epochs"], each["validations"]) for each in counts] == [(1, 1)] * 3


def test_asynchronous_workers_with_unequal_shards_wait_for_each_other(tmp_path: Path) -> None:
    options = {"max_epochs": 2, "callbacks": [Ended(tmp_path)]}
    fit_kept(tmp_path, AsyncStrategy(exchange_timeout_seconds=SECONDS), 3, Uneven(2, 20, 9), **options)
    assert [worker["counts"]["steps"] for worker in saved(tmp_path, 3)] == [4, 40, 18]


# -- what is said -----------------------------------------------------------------------------------------------------


def test_a_wrong_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 'continue' or 'stop'"):
        GossipStrategy(uneven="wait")


class Own(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.check_val_every_n_epoch = 1 + trainer.global_rank


def test_settings_that_would_let_workers_meet_at_different_times_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"check_val_every_n_epoch=.*Give all workers the same"):
        fit(tmp_path, Uneven(3, 3), workers=2, callbacks=(Own(),))


def test_a_worker_without_any_batch_cannot_take_part_in_collectives(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Give every worker at least one batch"):
        fit(tmp_path, Uneven(3, 0, 3))


class Raises(Uneven):
    def training_step(self, batch: Any) -> Any:
        if self.own == 6:
            raise ValueError("a mistake in the user's own code")
        return super().training_step(batch)


def test_a_worker_that_raises_while_others_have_no_batches(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="a mistake in the user's own code"):
        fit(tmp_path, Raises(3, 9, 5))
