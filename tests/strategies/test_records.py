"""Proved here: the method, its options and the number of workers are among the hyper-parameters of every logger, once
and beside the user's own, whatever the strategy; a logger that refuses them does not end the run. An optimizer that
does not call its closure is told so under every strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_decentral import SimulatedStrategy
from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, EF21, SAEF, ChocoSGD, MoniquaSGD, SyncSGD
from lightning_decentral.callbacks import GradientCompression
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm
from lightning_decentral.strategies.records import described
from lightning_decentral.topology import Ring
from strategies.fits import Regression, asynchronous, gossip, make_trainer

pytestmark = pytest.mark.usefixtures("kept_forks")

ALGORITHMS = [SyncSGD(), DPSGD(), D2(), ChocoSGD(), MoniquaSGD(), SAEF(), EF21(), ADPSGD()]


class WithOptions(Regression):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()


class Noting(Logger):
    """Writes down what it is told, one line for each call."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "noting"

    @property
    def version(self) -> str:
        return "0"

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(params)) + "\n")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass


class Refusing(Noting):
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        if any("decentral" in name for name in params):
            raise RuntimeError("this logger wants no slash")
        super().log_hyperparams(params)


def strategy_of(algorithm: AbstractAlgorithm) -> Strategy:
    return (asynchronous if isinstance(algorithm, AbstractAsynchronousAlgorithm) else gossip)(algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)
def test_every_option_has_a_plain_value(algorithm: AbstractAlgorithm) -> None:
    values = described(algorithm.resolved(4), 4)
    assert values["decentral/method"] == type(algorithm).__name__
    assert values["decentral/workers"] == 4
    assert {"decentral/topology", "decentral/compressor"} <= values.keys()
    assert all(isinstance(value, bool | int | float | str) for value in values.values())
    json.dumps(values)


@pytest.mark.parametrize("algorithm", [D2(Ring(3, lazy=True)), ChocoSGD(), ADPSGD()], ids=["D2", "CHOCO", "AD-PSGD"])
def test_loggers_get_them_beside_the_users_own(algorithm: AbstractAlgorithm, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    refusing = Refusing(tmp_path / "refused")
    loggers = [CSVLogger(tmp_path, name="csv", version=0), refusing, Noting(path)]
    trainer = make_trainer(tmp_path, strategy_of(algorithm), 3, max_steps=2, logger=loggers)
    trainer.fit(WithOptions(width=7))
    expected = described(algorithm.resolved(3), 3)
    written = yaml.safe_load((tmp_path / "csv" / "version_0" / "hparams.yaml").read_text())
    assert written == {"width": 7, **expected}
    ours, users = [json.loads(line) for line in path.read_text().splitlines()]
    assert ours == {"width": 7, **expected}
    assert users == {"width": 7}  # Lightning's own
    assert json.loads((tmp_path / "refused").read_text()) == {"width": 7}


def test_virtual_workers_and_compressed_gradients_are_recorded_too(tmp_path: Path) -> None:
    virtual = make_trainer(
        tmp_path, SimulatedStrategy(DPSGD(), workers=5), 1, max_steps=2, logger=Noting(tmp_path / "virtual")
    )
    virtual.fit(Regression())
    (values,) = [json.loads(line) for line in (tmp_path / "virtual").read_text().splitlines()]
    assert values == described(DPSGD().resolved(5), 5)
    compressed = make_trainer(
        tmp_path, "ddp_fork", 2, max_steps=2, logger=Noting(tmp_path / "ddp"), callbacks=[GradientCompression("int8")]
    )
    compressed.fit(Regression())
    (values,) = [json.loads(line) for line in (tmp_path / "ddp").read_text().splitlines()]
    assert values["decentral/method"] == "DistributedDataParallel"
    assert values["decentral/compressor"].startswith("Int8(")
    assert values["decentral/workers"] == 2


def test_wandb_can_group_by_them(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="records")
    make_trainer(tmp_path, SimulatedStrategy(DPSGD(), workers=3), 1, max_steps=2, logger=logger).fit(WithOptions())
    config = dict(logger.experiment.config)
    logger.experiment.finish()
    assert config == {"width": 5, **described(DPSGD().resolved(3), 3)}


# -- the closure -------------------------------------------------------------------------------------------------------


class Forgetful(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step()


class Forgetting(Regression):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def configure_optimizers(self) -> Any:
        kind = Forgetful if self.where == "optimizer" else torch.optim.SGD
        return kind(self.parameters(), lr=0.1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.where == "hook":
            optimizer.step()
        else:
            optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("where", ["optimizer", "hook"])
@pytest.mark.parametrize("strategy", ["dpsgd_fork", "sync_sgd_fork", "adpsgd_fork", "simulated"])
def test_a_closure_that_is_not_called_is_told(strategy: str, where: str, tmp_path: Path) -> None:
    virtual = strategy == "simulated"
    given: Any = SimulatedStrategy(workers=2) if virtual else strategy
    module: LightningModule = Forgetting(where)
    with pytest.raises(Exception, match="The closure hasn't been executed"):
        make_trainer(tmp_path, given, 1 if virtual else 2, max_steps=2).fit(module)
