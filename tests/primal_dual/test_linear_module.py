"""Proved here: in Lightning the module is SDCA on one device, and ACPD or CoCoA+ with virtual and real workers; the gap
that it logs is the gap, and stops a run; a run that was resumed is the one that was not, and others may go on with what
a checkpoint has; what cannot work is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from reference.primal_dual import NOTES, NotedACPD, problem
from strategies.fits import fit_kept, make_trainer

from lightning_decentral import SimulatedStrategy, Strategy
from lightning_decentral.algorithms import ACPD, CoCoAPlus, SyncSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual import Coordinates, LinearDataModule, Loss, PrimalDualModule
from lightning_decentral.primal_dual.coordinates import divided
from lightning_decentral.recipes.speeches import RowSeconds
from lightning_decentral.simulation.cluster import Cluster

ROWS, LAMBDA = problem(), 0.1  # few rounds are enough


def data(rounds: int = 20, **options: Any) -> LinearDataModule:
    return LinearDataModule(ROWS.tensor(), ROWS.targets, rounds=rounds, **options)


def module(loss: str = "logistic") -> PrimalDualModule:
    return PrimalDualModule(ROWS.features, loss, LAMBDA)


def optimum(loss: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    own, model = Coordinates(ROWS, Loss(loss), LAMBDA, len(ROWS)), np.zeros(ROWS.features)
    own.ascend(model, 200 * len(ROWS))
    assert own.gap(model) < 1e-12
    return model


class Gaps(Callback):
    """Notes what is logged, in a file of the run's folder."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            assert 0.0 <= values["gap"] == pytest.approx(values["primal"] - values["dual"], abs=1e-15)
            torch.save(values, Path(trainer.default_root_dir) / "logged.pt")


class Divided(Callback):
    """Notes which rows a worker has, with their dual variables."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PrimalDualModule)
        rank = trainer.global_rank
        noted = {"rows": pl_module._rows_of[rank], "duals": pl_module._own[rank].duals, "all": pl_module._all_duals()}
        torch.save(noted, Path(trainer.default_root_dir) / f"divided-{rank}.pt")


@pytest.mark.parametrize("method", [ACPD(ratio=0.5, local_steps=5), CoCoAPlus(local_steps=5)])
def test_rows_are_divided_by_measured_speed(tmp_path: Path, method: Any) -> None:
    callbacks = [RowSeconds(2e-3, {2: 8.0}), Divided(), Gaps()]
    mine, rows = module(), data(20, shares="measured")
    fit_kept(tmp_path, Strategy(method), 3, mine, datamodule=rows, max_epochs=4, callbacks=callbacks)
    noted = [torch.load(tmp_path / f"divided-{rank}.pt", weights_only=False) for rank in range(3)]
    sizes = [len(each["rows"]) for each in noted]
    assert sum(sizes) == len(ROWS)
    assert sorted(np.concatenate([each["rows"] for each in noted])) == list(range(len(ROWS)))
    assert sizes[2] < 0.5 * min(sizes[:2])
    for each in noted:
        np.testing.assert_array_equal(each["duals"], noted[0]["all"][each["rows"]])
    assert torch.load(tmp_path / "logged.pt")["gap"] < 1e-3
    whole = ROWS.combined(noted[0]["all"] / (LAMBDA * len(ROWS)))
    np.testing.assert_allclose(mine.weight.detach().numpy(), whole, rtol=0.0, atol=1e-10)


def test_a_look_does_not_put_off_the_measuring_and_a_resumed_run_has_its_rows(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True)
    slowed, strategy = RowSeconds(2e-3, {1: 8.0}), Strategy(ACPD(ratio=0.5, local_steps=5))
    options: dict[str, Any] = {"callbacks": [slowed, Divided(), saving], "enable_checkpointing": True, "max_epochs": 2}
    for begins_at in (None, tmp_path / "last.ckpt"):
        mine, rows = PrimalDualModule(ROWS.features, regularization=LAMBDA, look_every=2), data(30, shares="measured")
        fit_kept(tmp_path, strategy, 2, mine, datamodule=rows, ckpt_path=begins_at, **options)
        noted = [torch.load(tmp_path / f"divided-{rank}.pt", weights_only=False) for rank in range(2)]
        assert len(noted[1]["rows"]) < 0.5 * len(noted[0]["rows"])
        assert sorted(np.concatenate([each["rows"] for each in noted])) == list(range(len(ROWS)))
        np.testing.assert_array_equal(noted[0]["all"][noted[1]["rows"]], noted[1]["duals"])


def test_on_one_device_it_is_sdca(tmp_path: Path) -> None:
    stop = EarlyStopping("gap", stopping_threshold=1e-9, patience=100)
    trainer = make_trainer(tmp_path, "auto", 1, max_epochs=50, callbacks=[stop])
    mine = module("smoothed_hinge")
    trainer.fit(mine, datamodule=data())
    assert trainer.current_epoch < 50
    alone, model = Coordinates(ROWS, Loss("smoothed_hinge"), LAMBDA, len(ROWS), (0, 0)), np.zeros(ROWS.features)
    alone.rows = ROWS.some(np.arange(len(ROWS)))
    alone.ascend(model, 20 * trainer.current_epoch * len(ROWS))
    np.testing.assert_allclose(mine.weight.detach().numpy(), model, rtol=0.0, atol=1e-12)
    scores = torch.cat(trainer.predict(mine, datamodule=data()))  # type: ignore[arg-type]
    np.testing.assert_allclose(scores.numpy(), ROWS.scores(model), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("method", [ACPD(group=2, ratio=0.2), CoCoAPlus()])
def test_virtual_workers_reach_the_optimum(tmp_path: Path, method: Any) -> None:
    strategy = SimulatedStrategy(method, workers=4, cluster=Cluster(slowdown={3: 4.0}))
    mine = module()
    make_trainer(tmp_path, strategy, 1, max_epochs=2, callbacks=[Gaps()]).fit(mine, datamodule=data(30))
    logged = torch.load(tmp_path / "logged.pt")
    assert logged["gap"] < 1e-7
    np.testing.assert_allclose(mine.weight.detach().numpy(), optimum("logistic"), rtol=0.0, atol=2e-3)
    # Eight of 40 values, each with its position; once in an epoch all meet to settle.
    assert logged["density"] == pytest.approx(0.3 if isinstance(method, ACPD) else 1.5, rel=0.2)


@pytest.mark.parametrize("method", [ACPD(group=2, max_delay=3, ratio=0.2, local_steps=10), CoCoAPlus()])
def test_real_workers_reach_the_optimum_and_settle(tmp_path: Path, method: Any) -> None:
    strategy = Strategy(method, exchange_timeout_seconds=60.0)
    mine = module()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"callbacks": [Gaps(), checkpoint], "enable_checkpointing": True}
    fit_kept(tmp_path, strategy, 2, mine, max_epochs=3, datamodule=data(60), **options)
    logged = torch.load(tmp_path / "logged.pt")
    assert logged["gap"] < 1e-6
    if isinstance(method, ACPD):
        # 8 of 40 values with their positions are 0.3 on the wire; whole models, which all send when they settle, are 1,
        # and weigh more the fewer rounds the slower worker has made by then.
        assert 0.3 < logged["density"] < 0.5
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=False)
    own = Coordinates(ROWS, Loss("logistic"), LAMBDA, len(ROWS))
    own.duals = saved["primal_dual"]["duals"].numpy()
    np.testing.assert_allclose(mine.weight.detach().numpy(), own.model(), rtol=0.0, atol=1e-12)  # w is w(alpha)
    assert own.gap(mine.weight.detach().numpy()) < 1e-6
    # Another number of workers goes on with the dual variables of all.
    trainer = make_trainer(tmp_path, "auto", 1, max_epochs=4, callbacks=[Gaps()])
    again = module()
    trainer.fit(again, datamodule=data(60), ckpt_path=str(tmp_path / "epoch=2.ckpt"))
    assert torch.load(tmp_path / "logged.pt")["gap"] < 1e-10


class KeepsNotes(Callback):
    """Leaves what `NotedACPD` has noted."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(list(NOTES), Path(trainer.default_root_dir) / f"notes{trainer.global_rank}.pt")
        NOTES.clear()


@pytest.mark.parametrize("place", ["beside", "dedicated"])
def test_processes_know_what_the_server_has_not_pending(tmp_path: Path, place: Any) -> None:
    """``w_k + p_k = w`` at every answer; some rows are with the faster one, and shares may be an array."""
    method = NotedACPD(group=1, max_delay=3, ratio=0.1, local_steps=5, server=place)
    strategy = Strategy(method, exchange_timeout_seconds=60.0)
    mine, shares = module("smoothed_hinge"), [3, 2, 1] if place == "beside" else [2, 1]
    checkpoint = ModelCheckpoint(tmp_path, "last")
    options: dict[str, Any] = {"callbacks": [KeepsNotes(), checkpoint], "enable_checkpointing": True}
    fit_kept(tmp_path, strategy, 3, mine, max_epochs=1, datamodule=data(20, shares=np.array(shares)), **options)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["primal_dual"]["duals"].numpy()
    own = Coordinates(ROWS, Loss("smoothed_hinge"), LAMBDA, len(ROWS))
    own.duals = saved  # of all rows, though whoever only serves has none of them
    np.testing.assert_allclose(mine.weight.detach().numpy(), own.model(), rtol=0.0, atol=1e-12)
    notes = [torch.load(tmp_path / f"notes{rank}.pt", weights_only=False) for rank in range(3)]
    for rank in (1, 2):
        should = [known for source, known in notes[0] if source == rank]
        assert len(should) == len(notes[rank]) > 0
        for (_, known), expected in zip(notes[rank], should, strict=True):
            np.testing.assert_allclose(known, expected, rtol=0.0, atol=1e-12)
        assert bool(should[-1].any())


def test_a_run_that_was_resumed_is_the_one_that_was_not(tmp_path: Path) -> None:
    """With the whole group nobody's order counts, but for rounding."""
    method = ACPD(group=2, ratio=0.2, local_steps=10)
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"datamodule": data(12), "max_epochs": 2}
    whole, again = module("hinge"), module("hinge")
    saving = {"callbacks": [checkpoint], "enable_checkpointing": True}
    fit_kept(tmp_path, Strategy(method, share_epoch=False), 2, whole, **options, **saving)
    path = str(tmp_path / "epoch=0.ckpt")
    fit_kept(tmp_path, Strategy(method, share_epoch=False), 2, again, **options, ckpt_path=path)
    torch.testing.assert_close(again.weight, whole.weight, rtol=0.0, atol=1e-13)
    assert bool(whole.weight.any())


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"strategy": SimulatedStrategy(SyncSGD(), 2)}, data(), r"got SyncSGD\(\), needs a method"),
        ({"gradient_clip_val": 1.0}, data(), r"got Trainer\(gradient_clip_val=1\.0\), needs each step applied"),
        ({"accumulate_grad_batches": 2}, data(), "accumulate_grad_batches=2"),
        ({"precision": "bf16-true"}, data(), "precision='bf16-true'"),
        ({"strategy": SimulatedStrategy(CoCoAPlus(), 61)}, data(), "60 rows and 61 workers"),
        ({}, LinearDataModule(np.eye(3), [1, 2, 1]), "got 40 features and data of 3"),
        ({}, LinearDataModule(ROWS.tensor(), np.arange(60)), r"the labels 0, 1, 2, 3, 4, \.\.\., needs two classes"),
        ({}, LinearDataModule(ROWS.tensor(), ROWS.targets, positive=3), "the labels -1, 1 and positive=3"),
        ({}, data(shares=[1, 2]), r"1 workers and shares=\[1, 2\], needs one positive number for each"),
        ({}, None, "got NoneType for its data, needs a LinearDataModule"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, options: dict[str, Any], given: LinearDataModule | None, message: str
) -> None:
    trainer = make_trainer(tmp_path, **{"strategy": "auto", "devices": 1, "max_epochs": 1, **options})
    mine = module()
    loader = BoringModel().train_dataloader() if given is None else None
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(mine, loader, datamodule=given)


def test_other_weights_and_other_data_modules_are_refused(tmp_path: Path) -> None:
    mine = module()
    mine.weight.data += 1.0
    with pytest.raises(ConfigurationError, match="got weights, and no dual variables"):
        make_trainer(tmp_path, "auto", 1, max_epochs=1).fit(mine, datamodule=data())
    with pytest.raises(ConfigurationError, match="needs a positive number"):
        PrimalDualModule(3, regularization=0.0)
    with pytest.raises(ConfigurationError, match="a matrix without targets"):
        LinearDataModule(np.eye(3))
    with pytest.raises(ConfigurationError, match="rounds=0"):
        LinearDataModule(np.eye(3), [1, 2, 1], rounds=0)


def test_one_label_may_be_told_from_all_others() -> None:
    given = LinearDataModule(np.eye(3), [1, 2, 3], positive=2)
    assert given.classes().tolist() == [-1.0, 1.0, -1.0]


def test_rows_are_divided_by_shares() -> None:
    parts = divided(103, 4, seed=3, shares=[10, 10, 10, 1])
    assert [len(part) for part in parts] == [33, 33, 33, 4]
    assert sorted(np.concatenate(parts)) == list(range(103))
    assert [len(part) for part in divided(5, 4, shares=[1e6, 1, 1, 1])] == [2, 1, 1, 1]  # a row for each
    for wrong in ([1, 1], [1, 1, 1, 0], [1, 1, 1, np.inf]):
        with pytest.raises(ConfigurationError, match="needs one positive number for each worker"):
            divided(103, 4, shares=wrong)
