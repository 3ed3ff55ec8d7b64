"""Proved here: a look is the duality gap at the model and the dual variables that are known; with one that is small
enough an epoch ends, all settle, and EarlyStopping decides; who has made no step since all rested sends nothing to rest
again; a model that user code has changed has its true gap."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from reference.primal_dual import problem
from strategies.fits import fit_kept, make_trainer

from lightning_decentral import AsyncStrategy, SimulatedStrategy
from lightning_decentral.algorithms import ACPD, CoCoAPlus
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.primal_dual import Coordinates, LinearDataModule, Loss, PrimalDualModule
from lightning_decentral.primal_dual.looks import Looks

ROWS, LAMBDA = problem(), 0.1
PARTS = {0: np.arange(0, len(ROWS), 2), 1: np.arange(1, len(ROWS), 2)}


class Posts:
    """What a look asks a strategy for."""

    def __init__(self, model: np.ndarray[Any, Any]) -> None:
        self.model, self.value = model, b""

    def current_models(self) -> list[Vector]:
        return [Vector([torch.from_numpy(self.model)])]

    def posted(self, name: str, rank: int) -> bytes | None:
        return self.value or None

    def post(self, name: str, value: bytes) -> None:
        self.value = value


def looked(looks: Looks, duals: np.ndarray[Any, Any]) -> float:
    deadline = time.monotonic() + 20.0
    while (found := looks.step(0, duals)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


@pytest.mark.parametrize("name", ["squared", "logistic", "smoothed_hinge", "hinge"])
def test_a_look_is_the_gap_of_what_is_known(name: str) -> None:
    own, model = Coordinates(ROWS, Loss(name), LAMBDA, len(ROWS)), np.zeros(ROWS.features)
    own.ascend(model, 3 * len(ROWS))
    model += 0.01  # as a server's model is, which has not been told of everything
    posts = Posts(model)
    server, other = (Looks(every, cast(AsyncStrategy, posts), ROWS, own.loss, LAMBDA, PARTS) for every in (1, 2))
    assert server.step(0, own.duals[PARTS[0]]) is None
    assert [other.step(1, own.duals[PARTS[1]]), posts.value] == [None, b""]  # every second step
    other.step(1, own.duals[PARTS[1]])
    assert len(posts.value) == 4 * len(PARTS[1])
    own.duals[PARTS[1]] = own.duals[PARTS[1]].astype(np.float32)
    found = looked(server, own.duals[PARTS[0]])
    assert found == pytest.approx(own.gap(model), rel=1e-12)
    assert found > 0.0
    posts.value = b"four"
    with pytest.raises(ConfigurationError, match=r"posted 4 bytes .* needs 120 for its 30 rows"):
        looked(server, own.duals[PARTS[0]])


class Watches(Callback):
    """Notes what is logged, and what it costs to rest twice."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = cast(AsyncStrategy, trainer.strategy)
        before = strategy.traffic.bytes_sent
        strategy.quiesce("a test")
        assert strategy.traffic.bytes_sent == before > 0
        if trainer.is_global_zero:
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            torch.save(logged, Path(trainer.default_root_dir) / "logged.pt")


def test_an_epoch_ends_with_a_look_that_is_small_enough(tmp_path: Path) -> None:
    strategy = AsyncStrategy(ACPD(group=1, max_delay=1000, ratio=0.2, local_steps=0.2), exchange_timeout_seconds=60.0)
    stop, checkpoint = EarlyStopping("gap", stopping_threshold=1e-5, patience=100), ModelCheckpoint(tmp_path, "last")
    mine = PrimalDualModule(ROWS.features, "logistic", LAMBDA, look_every=3)
    data = LinearDataModule(ROWS.tensor(), ROWS.targets, rounds=3000)
    options: dict[str, Any] = {"callbacks": [stop, checkpoint, Watches()], "enable_checkpointing": True}
    fit_kept(tmp_path, strategy, 2, mine, max_epochs=9, datamodule=data, **options)
    logged = torch.load(tmp_path / "logged.pt")
    assert 0.0 <= logged["gap"] <= 1e-5
    assert 0.0 <= logged["running_gap"] <= 1e-5
    assert logged["passes"] < 300  # of 600 in the first epoch alone
    own, model = Coordinates(ROWS, Loss("logistic"), LAMBDA, len(ROWS)), mine.weight.detach().numpy()
    own.duals = torch.load(tmp_path / "last.ckpt", weights_only=False)["primal_dual"]["duals"].numpy()
    np.testing.assert_allclose(model, own.model(), rtol=0.0, atol=1e-12)  # settled
    assert own.gap(model) == pytest.approx(logged["gap"], rel=1e-9)


class Adds(Callback):
    """Changes the weights before they are evaluated."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cast(torch.nn.Parameter, pl_module.weight).data += 0.01


def test_a_model_that_user_code_has_changed_has_its_true_gap(tmp_path: Path) -> None:
    mine = PrimalDualModule(ROWS.features, "logistic", LAMBDA)
    trainer = make_trainer(tmp_path, "auto", 1, max_epochs=1, callbacks=[Adds()])
    trainer.fit(mine, datamodule=LinearDataModule(ROWS.tensor(), ROWS.targets, rounds=20))
    own, model = Coordinates(ROWS, Loss("logistic"), LAMBDA, len(ROWS), (0, 0)), np.zeros(ROWS.features)
    own.ascend(model, 20 * len(ROWS))
    assert float(trainer.callback_metrics["gap"]) == pytest.approx(own.gap(model + 0.01), rel=1e-6)
    assert own.gap(model + 0.01) > 10 * own.gap(model)


@pytest.mark.parametrize(
    ("strategy", "every", "message"),
    [
        ("auto", 3, "look_every=3 and .*, needs an asynchronous method in which worker 0 trains"),
        (SimulatedStrategy(CoCoAPlus(), 2), 3, r"look_every=3 and CoCoAPlus\(.*, needs an asynchronous method"),
        ("auto", 0, r"PrimalDualModule\(look_every=0\): needs a whole number"),
    ],
)
def test_looks_that_cannot_be_are_refused(tmp_path: Path, strategy: Any, every: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(tmp_path, strategy, 1, max_epochs=1).fit(
            PrimalDualModule(ROWS.features, "logistic", LAMBDA, look_every=every),
            datamodule=LinearDataModule(ROWS.tensor(), ROWS.targets),
        )
