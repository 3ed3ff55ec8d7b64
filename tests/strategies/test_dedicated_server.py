"""Proved here: in the `Trainer` a worker that only serves has no batches, makes every update by the user's optimizer
exactly as the rule says for the order in which the gradients came, and counts epochs, schedules and steps as a worker
of average speed; what the others log of an epoch, and their BatchNorm statistics, are the means over those that train;
a resumed run goes on; a stop in an epoch is one at its end; what it cannot do is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.test_servers import WORKERS, AtTheEnd, LoggedAPSGD, replayed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from reference.runs import equal_start
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral.algorithms import APSGD
from strategies.fits import Indices, QuadraticModule, asynchronous, make_trainer, saved

pytestmark = pytest.mark.usefixtures("kept_forks")

BATCHES = 12  # of each worker that trains
EPOCHS = 3


class Served(QuadraticModule):
    def __init__(self) -> None:
        super().__init__(equal_start(WORKERS), lambda step: 0.05 * 0.9**step)
        self.norm = nn.BatchNorm1d(2, affine=False)

    def training_step(self, batch: Tensor) -> Tensor:
        assert self.trainer.strategy.algorithm.trains(self.global_rank)  # type: ignore[attr-defined]
        self.norm(torch.randn(4, 2) + self.global_rank)
        self.log("rank", float(self.global_rank), on_step=False, on_epoch=True)
        return super().training_step(batch)

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        configured["optimizer"].param_groups[0]["momentum"] = 0.5
        return configured

    def validation_step(self, batch: Tensor) -> None:
        self.log("distance", (self.x.detach() - self.quadratic.optimum).abs().max(), sync_dist=True)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices((WORKERS - 1) * BATCHES), batch_size=1)

    def val_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices(WORKERS), batch_size=1)


class Rates(AtTheEnd):
    """Also at which rates updates were made, and what is counted."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_rank == 0:
            self.kept.setdefault("rates", []).append(optimizer.param_groups[0]["lr"])

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().keep(trainer, pl_module)
        self.kept["norm"] = pl_module.norm.running_mean.clone()  # type: ignore[union-attr]


def fit(folder: Path, method: Any, *callbacks: Callback, path: Path | None = None, **options: Any) -> Trainer:
    given: dict[str, Any] = {"max_epochs": EPOCHS, "callbacks": [Rates(folder), *callbacks], **options}
    trainer = make_trainer(folder, asynchronous(method), WORKERS, **given)
    trainer.fit(Served(), ckpt_path=path)
    return trainer


@pytest.mark.parametrize("number", [1, 3])
def test_the_users_optimizer_makes_all_updates(number: int, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "last")
    bar = TQDMProgressBar()
    method = LoggedAPSGD(number, server="dedicated")
    trainer = fit(tmp_path, method, saves, bar, enable_checkpointing=True, enable_progress_bar=True)
    results = saved(tmp_path, WORKERS)
    state, rates = results[0]["server"], iter(results[0]["rates"])
    weight = nn.Parameter(equal_start(WORKERS).start[0].clone())
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)

    def update(x: Tensor, direction: Tensor) -> Tensor:
        optimizer.param_groups[0]["lr"] = next(rates)
        weight.grad = direction.clone()
        optimizer.step()
        return weight.detach().clone()

    gradients = EPOCHS * BATCHES * (WORKERS - 1)
    assert [len(state["log"]), state["version"]] == [gradients, gradients // number]
    assert state["accepted"].keys() == {1, 2}
    models = replayed(equal_start(WORKERS), state["log"], number, update)
    for x in (results[0]["x"], trainer.lightning_module.x.detach()):  # type: ignore[union-attr]
        torch.testing.assert_close(x, models[-1], rtol=0.0, atol=1e-12)
    # A schedule has made a step for each two gradients, when the server updates next: of the last ones not all.
    assert results[0]["rates"][0] == 0.05
    assert results[0]["rates"][-1] == pytest.approx(0.05 * 0.9 ** (EPOCHS * BATCHES - 2), rel=0.25)
    assert results[0]["global_step"] == EPOCHS * BATCHES
    assert 1.0 <= float(trainer.callback_metrics["rank"]) <= 2.0  # of two workers that share the batches
    assert len({result["metrics"]["rank"] for result in results}) == 1
    norms = torch.stack([result["norm"] for result in results])
    torch.testing.assert_close(trainer.lightning_module.norm.running_mean, norms[1:].mean(0))  # type: ignore[union-attr]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == EPOCHS * BATCHES


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    method = APSGD(server="dedicated")
    fit(tmp_path, method, ModelCheckpoint(tmp_path, "half"), max_epochs=1, enable_checkpointing=True)
    fit(tmp_path, method, path=tmp_path / "half.ckpt")
    result = saved(tmp_path, WORKERS)[0]
    assert sum(result["server"]["accepted"].values()) == EPOCHS * BATCHES * (WORKERS - 1)
    assert result["global_step"] == EPOCHS * BATCHES


class Stops(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or (trainer.current_epoch == 1 and trainer.global_rank == 2)


def test_a_stop_in_an_epoch_is_one_at_its_end(tmp_path: Path) -> None:
    fit(tmp_path, APSGD(server="dedicated"), Stops(), max_epochs=9)
    results = saved(tmp_path, WORKERS)
    (epoch,) = {result["epoch"] for result in results}
    assert epoch in (2, 3)  # another may have been at the end of the second one already
    assert sum(results[0]["server"]["accepted"].values()) == epoch * BATCHES * (WORKERS - 1)


class Warm(Served):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


def test_what_needs_batches_is_refused(tmp_path: Path) -> None:
    strategy = asynchronous(APSGD(server="dedicated"))
    with pytest.raises(Exception, match="APSGD got an `optimizer_step` of Warm"):
        make_trainer(tmp_path, strategy, 2, max_epochs=1).fit(Warm())
    strategy = asynchronous(APSGD(server="dedicated"), buffers="local")
    with pytest.raises(Exception, match=r"APSGD got buffers='local' with BatchNorm statistics \('norm'\)"):
        make_trainer(tmp_path, strategy, 2, max_epochs=1).fit(Served())
    for options, reason in [
        ({"max_steps": 4}, "max_steps and min_steps count each worker's own steps"),
        ({"max_epochs": 1, "limit_train_batches": 2}, "limit_train_batches and overfit_batches"),
    ]:
        strategy = asynchronous(APSGD(server="dedicated"))
        with pytest.raises(Exception, match=f"share epochs: {reason}"):
            make_trainer(tmp_path, strategy, 2, **options).fit(Served())
