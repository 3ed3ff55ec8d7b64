"""Proved here: what belongs to the model and to no optimizer is in the consensus as it should be, for every method.
Parameters and buffers that differ are averaged, masks and integers are not, what cannot be averaged is left alone and
named; user code that changes something in a validation has the last word; averages that callbacks keep are averaged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_decentral import AsyncStrategy
from strategies.fits import Abreast, Recorder, Regression, flat, loader, make_trainer, saved

pytestmark = pytest.mark.usefixtures("kept_forks")

# No method has a part in what no optimizer has, but for when it has come to rest: in each step, after a round of which
# something may be under way, and after calls.
ONE_OF_EACH_KIND = ["sync_sgd_fork", "dpsgd_fork", "adpsgd_fork"]
MORE_KINDS = [*ONE_OF_EACH_KIND, "choco_sgd_fork", "streaming_diloco_fork", "swarm_fork"]


class Baggage(Regression):
    """A student with what people put beside it; every worker has something else in it."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 1).double())
        self.teacher = nn.Linear(4, 1).double().requires_grad_(False)
        self.counts = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        self.register_buffer("statistic", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(2))
        self.register_buffer("alive", torch.ones(4))
        self.register_buffer("direction", torch.tensor([0.6, 0.8]))
        self.register_buffer("chosen", torch.zeros(4, dtype=torch.bool))
        self.register_buffer("grid", torch.ones(2, 1).expand(2, 3), persistent=False)  # cannot be written to
        self.register_buffer("table", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("only", None)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        rank = self.global_rank
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                mine.lerp_(other, 0.1)
            self.teacher.weight[0, 0] += rank  # also where all workers have the same student
            self.counts += 1 + rank
            self.statistic += 0.25 + rank
            self.phase += 1 + 1j * rank
        self.batches = self.batches + 1 + rank  # in other memory
        self.mask.fill_(rank)
        self.alive[rank] = 0.0
        self.direction[1] = -0.8 if rank else 0.8
        self.chosen[rank] = True
        self.register_buffer("table", torch.full((2 + rank,), float(batch_idx)))
        if batch_idx == 2 and rank == 1:
            self.cache = None
            self.register_buffer("only", torch.ones(2))


class Own(Recorder):
    """Each worker's state before the last consensus, and a checkpoint."""

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.save_checkpoint(self.folder / "end.ckpt")
            trainer.save_checkpoint(self.folder / "end.ckpt")
        self.kept["told"] = [str(each.message) for each in told if "averaged" in str(each.message)]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert pl_module.grid.stride() == (1, 0), "what is equal everywhere is never written to"


def fit_baggage(folder: Path, strategy: str) -> tuple[Baggage, list[dict[str, Tensor]], dict[str, Tensor]]:
    """The model that comes out, each worker's own state before, and the state of the checkpoint."""
    model = Baggage()
    make_trainer(folder, strategy, 2, max_steps=4, callbacks=[Own(folder)]).fit(model)
    checkpoint = torch.load(folder / "end.ckpt", weights_only=False)
    return model, [worker["state"] for worker in saved(folder, 2)], checkpoint["state_dict"]


def check_consensus(got: dict[str, Tensor], own: list[dict[str, Tensor]]) -> None:
    for name in ("network.weight", "teacher.weight", "teacher.bias", "statistic", "phase"):
        mean = torch.stack([state[name] for state in own]).mean(0)
        torch.testing.assert_close(got[name], mean.to(got[name].dtype), msg=name)
    assert not torch.equal(own[0]["teacher.weight"], own[1]["teacher.weight"])
    for name in ("counts", "batches", "table", "cache", "mask", "alive", "chosen", "direction"):  # worker 0's
        torch.testing.assert_close(got[name], own[0][name], msg=name)


@pytest.mark.parametrize("strategy", MORE_KINDS)
def test_what_no_optimizer_has_is_in_the_consensus(strategy: str, tmp_path: Path) -> None:
    model, own, checkpoint = fit_baggage(tmp_path, strategy)
    check_consensus(checkpoint, own)
    check_consensus(model.state_dict(), own)
    (told,) = saved(tmp_path, 2)[0]["told"]  # once
    assert "cache, only (that only some workers have), table (of another shape or type on some workers)." in told


class Resumed(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        torch.save(pl_module.state_dict(), folder / f"resumed-{trainer.global_rank}.pt")


@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork"])
def test_every_worker_goes_on_with_its_own(strategy: str, tmp_path: Path) -> None:
    _, own, _ = fit_baggage(tmp_path, strategy)
    model = Baggage()
    make_trainer(tmp_path, strategy, 2, max_steps=5, callbacks=[Resumed()]).fit(model, ckpt_path=tmp_path / "end.ckpt")
    for rank, before in enumerate(own):
        after = torch.load(tmp_path / f"resumed-{rank}.pt", weights_only=False)
        for name in ("teacher.weight", "statistic", "phase", "counts", "batches"):
            assert torch.equal(after[name], before[name]), name


class ChangesInValidation(Regression):
    """User code of every kind while the module is the consensus."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("replaced", "added_to", "left"):
            self.register_buffer(name, torch.zeros(2), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def on_train_batch_end(self, *_: Any) -> None:
        for name in ("replaced", "added_to", "left"):
            getattr(self, name).fill_(float(self.global_rank))

    def validation_step(self, batch: Any) -> None:
        assert self.left.tolist() == [0.5, 0.5]
        self.seen += 1
        self.replaced = torch.full((3,), 7.0 + self.global_rank)
        self.added_to[0] += 1.0

    def on_validation_epoch_end(self) -> None:
        with torch.no_grad():
            self.network[0].weight.fill_(3.0)
            self.network[2].bias.data = torch.full_like(self.network[2].bias, 4.0)

    def val_dataloader(self) -> Any:
        return loader(8)


def everything(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


class AfterValidation(Recorder):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["after"] = everything(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, AsyncStrategy):
            trainer.strategy.quiesce()  # a slower worker may still call
        self.kept["before"] = everything(pl_module)


@pytest.mark.parametrize("strategy", ONE_OF_EACH_KIND)
def test_what_user_code_changes_in_a_validation_stays(strategy: str, tmp_path: Path) -> None:
    make_trainer(tmp_path, strategy, 2, max_epochs=1, callbacks=[AfterValidation(tmp_path)]).fit(ChangesInValidation())
    for rank, worker in enumerate(saved(tmp_path, 2)):
        before, after = worker["before"], worker["after"]
        assert after["replaced"].tolist() == [7.0 + rank] * 3
        assert after["added_to"].tolist() == [1.5, 0.5]
        assert after["left"].tolist() == [float(rank)] * 2
        assert after["seen"] == 1
        assert bool((after["network.0.weight"] == 3.0).all())
        assert bool((after["network.2.bias"] == 4.0).all())
        for name in ("network.0.bias", "network.2.weight"):
            assert torch.equal(after[name], before[name]), name


class Steps(Recorder):
    """Each worker's own weights at the beginning of every epoch, and what a validation sees."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept.setdefault("epochs", []).append(flat(pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.kept["validated"] = flat(pl_module)


def halves(average: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    return 0.5 * (average + weights)


@pytest.mark.parametrize("strategy", MORE_KINDS)
def test_the_average_of_a_callback_is_that_of_all_workers(strategy: str, tmp_path: Path) -> None:
    model = Regression()
    # Nobody calls between what is recorded and what is averaged.
    callbacks = [Abreast(1), Steps(tmp_path), WeightAveraging(avg_fn=halves), Abreast(1)]
    options = {"max_epochs": 2, "limit_train_batches": 3, "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, strategy, 2, callbacks=callbacks, **options)
    trainer.fit(model, val_dataloaders=loader(8))
    own = []
    for worker in saved(tmp_path, 2):
        average = worker["weights"][0]
        for weights in worker["weights"][1:]:
            average = 0.5 * (average + weights)
        own.append(average)
    mean = torch.stack(own).mean(0)
    torch.testing.assert_close(flat(model), mean, rtol=1e-12, atol=1e-12)
    for worker in saved(tmp_path, 2):
        torch.testing.assert_close(worker["validated"], mean, rtol=1e-12, atol=1e-12)
    (path,) = tmp_path.rglob("epoch=1*.ckpt")
    torch.testing.assert_close(state_of(path), mean)
    for rank, average in enumerate(own):
        (path,) = tmp_path.rglob(f"*-{rank}.ckpt")
        torch.testing.assert_close(state_of(path), average, rtol=0, atol=0)


def state_of(path: Path) -> Tensor:
    state = torch.load(path, weights_only=False)["state_dict"]
    return torch.cat([value.reshape(-1) for value in state.values()])


class Together(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, AsyncStrategy):
            trainer.strategy.quiesce()


@pytest.mark.parametrize("strategy", ONE_OF_EACH_KIND)
def test_stochastic_weight_averaging_is_that_of_all_workers(strategy: str, tmp_path: Path) -> None:
    model = Regression()
    swa = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    callbacks = [Together(), Steps(tmp_path), swa, Together()]
    make_trainer(tmp_path, strategy, 2, max_epochs=3, callbacks=callbacks).fit(model)
    # Lightning adds the weights at the beginning of each epoch.
    own = [torch.stack(worker["epochs"]).mean(0) for worker in saved(tmp_path, 2)]
    torch.testing.assert_close(flat(model), torch.stack(own).mean(0), rtol=1e-12, atol=1e-12)


class PrunesItsOwn(Callback):
    """Prunes at the end of the first epoch, every worker another weight; no validation follows."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            mask = torch.ones(5, 4)
            mask[trainer.global_rank] = 0.0
            prune.custom_from_mask(pl_module.network[0], "weight", mask)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 1:
            assert pl_module.network[0].weight_mask.sum(1).tolist() == [0.0, 4.0, 4.0, 4.0, 4.0]
            assert bool((pl_module.network[0].weight[0] == 0.0).all())


@pytest.mark.parametrize("strategy", ONE_OF_EACH_KIND)
def test_all_workers_prune_what_worker_0_prunes(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy, 2, max_epochs=2, callbacks=[PrunesItsOwn(), Recorder(tmp_path)])
    trainer.fit(Regression())
    for worker in saved(tmp_path, 2):
        assert worker["state"]["network.0.weight_mask"].unique().tolist() == [0.0, 1.0]
