"""Proved here: after a search that restores the weights and optimizers, training is what it would have been without,
for every method: a learning-rate finder, a batch-size finder, a callback that goes back to a checkpoint; and a second
fit begins anew, whatever became of the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_decentral import SimulatedStrategy
from lightning_decentral.algorithms import ADPSGD, APSGD, D2, DPSGD, SAEF, SCAFFOLD, ChocoSGD, FedMom, SyncSGD
from lightning_decentral.callbacks import GradientCompression
from lightning_decentral.compression import Int8, TopK
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Clients
from lightning_decentral.flat import pack
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy
from lightning_decentral.strategies.clients import Rounds
from lightning_decentral.topology import RandomMatching
from strategies.fits import Recorder, Regression, asynchronous, flat, gossip, loader, make_trainer, saved

pytestmark = pytest.mark.usefixtures("kept_forks")

SYNCHRONOUS = [
    DPSGD(RandomMatching(3)),
    D2(),
    ChocoSGD(compressor=Int8(stochastic=True)),
    SAEF(TopK(0.2), 5),
    SyncSGD(),
]
NAMES = ["random", "d2", "choco", "saef", "sync_sgd"]


class Searched(LearningRateFinder):
    """Tries rates at which the weights go far away; training is with the rate that there was before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(min_lr=0.01, max_lr=3.0, num_training_steps=7, **options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = pl_module.learning_rate
        super().on_fit_start(trainer, pl_module)
        assert self.optimal_lr is not None
        assert len(self.optimal_lr.results["lr"]) > 3
        pl_module.learning_rate = before
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = before


class Seeded(Recorder):
    """Training begins with the same random numbers, whatever drew some before: under DDP a search draws some too."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(50 + trainer.global_rank)
        self.kept["start"] = flat(pl_module)
        if isinstance(trainer.strategy, AbstractDecentralizedStrategy):
            self.kept["steps_before"] = trainer.strategy.steps


class Normed(Regression):
    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)).double(), size=48
        )
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return loader(self.size, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(12)


def fit(folder: Path, name: str, strategy: Any, *callbacks: Callback, **options: Any) -> list[dict[str, Any]]:
    module = Normed()
    torch.manual_seed(8)
    workers = options.pop("devices", 3)
    trainer = make_trainer(
        folder, strategy, workers, **{"max_epochs": 1, "callbacks": [*callbacks, Seeded(folder, name)], **options}
    )
    trainer.fit(module)
    return saved(folder, workers, name)


def assert_same_training(plain: list[dict[str, Any]], searched: list[dict[str, Any]]) -> None:
    for one, other in zip(plain, searched, strict=True):
        assert len(one["weights"]) == len(other["weights"]) > 0
        for step, (ours, theirs) in enumerate(zip(one["weights"], other["weights"], strict=True)):
            assert torch.equal(ours, theirs), step
        assert all(torch.equal(value, other["state"][key]) for key, value in one["state"].items())


@pytest.mark.parametrize("algorithm", SYNCHRONOUS, ids=NAMES)
def test_a_search_for_a_learning_rate_leaves_no_trace(algorithm: Any, tmp_path: Path) -> None:
    plain = fit(tmp_path, "plain", gossip(algorithm))
    assert_same_training(plain, fit(tmp_path, "searched", gossip(algorithm), Searched()))
    assert not list(tmp_path.glob(".lr_find*"))


@pytest.mark.parametrize("options", [{"worker_checkpoints": False}, {"resume": "consensus"}], ids=str)
def test_whatever_the_checkpoints_of_the_run_are(options: dict[str, Any], tmp_path: Path) -> None:
    plain = fit(tmp_path, "plain", gossip(D2(), **options))
    assert_same_training(plain, fit(tmp_path, "searched", gossip(D2(), **options), Searched()))


@pytest.mark.parametrize("algorithm", [ADPSGD(), APSGD()], ids=["adpsgd", "apsgd"])
def test_asynchronous_workers_start_where_they_were(algorithm: Any, tmp_path: Path) -> None:
    """Later on no two runs are equal. A server has updates of its own beside training, and nothing left of the search's
    schedule in these."""
    plain = fit(tmp_path, "plain", asynchronous(algorithm))
    searched = fit(tmp_path, "searched", asynchronous(algorithm), Searched(early_stop_threshold=None))
    for one, other in zip(plain, searched, strict=True):
        assert torch.equal(one["start"], other["start"])
        assert other["steps_before"] == 0
    assert sum(len(one["weights"]) for one in searched) == 12


@pytest.mark.parametrize("algorithm", [FedMom(), SCAFFOLD()], ids=["fedmom", "scaffold"])
def test_clients_start_where_they_were(algorithm: Any, tmp_path: Path) -> None:
    """The rounds, too: the search ends within one. Real workers have unequal shares of it, and refuse."""
    clients = Clients(6, per_round=3, stateful=True)
    strategies = [SimulatedStrategy(algorithm, clients=clients) for _ in range(2)]
    plain = fit(tmp_path, "plain", strategies[0], devices=1, max_epochs=2)
    searched = fit(tmp_path, "searched", strategies[1], Searched(early_stop_threshold=None), devices=1, max_epochs=2)
    assert_same_training(plain, searched)
    trainer = make_trainer(tmp_path, "auto", 1, max_epochs=1, callbacks=[Searched()])
    with pytest.raises(ConfigurationError, match="Search with SimulatedStrategy"):
        Rounds(trainer, algorithm, rank=0, world_size=2)


class SizeSearched(BatchSizeFinder):
    def __init__(self) -> None:
        super().__init__(init_val=2, max_trials=3, steps_per_trial=2)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = pl_module.batch_size
        super().on_fit_start(trainer, pl_module)
        assert pl_module.batch_size > before
        pl_module.batch_size = before
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()


@pytest.mark.parametrize("search", [Searched, SizeSearched])
@pytest.mark.parametrize("algorithm", [ADPSGD(), D2(), SAEF(TopK(0.2), 5)], ids=["adpsgd", "d2", "saef"])
def test_virtual_workers_start_where_they_were(algorithm: Any, search: Any, tmp_path: Path) -> None:
    plain = fit(tmp_path, "plain", SimulatedStrategy(algorithm, workers=3), devices=1)
    searched = fit(tmp_path, "searched", SimulatedStrategy(algorithm, workers=3), search(), devices=1)
    assert_same_training(plain, searched)
    assert plain[0]["metrics"] == searched[0]["metrics"]


class Plain(Normed):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@pytest.mark.parametrize("compressor", ["topk", "powersgd", "dgc", "onebit"])
def test_gradient_compression_remembers_nothing_of_a_search(compressor: str, tmp_path: Path) -> None:
    runs = []
    for name in ("plain", "searched"):
        callbacks = [GradientCompression(compressor, min_elements=0), *[Searched()][: name == "searched"]]
        make_trainer(
            tmp_path, DDPStrategy(start_method="fork"), 2, max_epochs=1, callbacks=[*callbacks, Seeded(tmp_path, name)]
        ).fit(Plain())
        runs.append(saved(tmp_path, 2, name))
    for one, other in zip(*runs, strict=True):
        for ours, theirs in zip(one["weights"], other["weights"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-8)  # float32 scales, and DDP's other order


class GoesBack(Recorder):
    """Saves after an epoch, and goes back there after the next: what it finds then is what it had."""

    def remembered(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        optimizer = trainer.optimizers[0]
        found: dict[str, Any] = {
            "weights": flat(module),
            "buffers": [buffer.clone() for buffer in module.buffers()],
            "momentum": [state["momentum_buffer"].clone() for state in optimizer.state.values()],
        }
        strategy = trainer.strategy
        assert isinstance(strategy, AbstractDecentralizedStrategy)
        for index, stepper in enumerate(strategy._steppers):
            worker = stepper.worker
            found[f"worker {index}"] = (worker.step, worker.version, worker.rng.getstate(), pack(worker.state))
        return found

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self.folder / "back.ckpt"
        if trainer.current_epoch == 0 and not self.kept.get("gone_back"):
            trainer.strategy.quiesce()  # type: ignore[attr-defined]
            self.kept["then"] = self.remembered(trainer, pl_module)
            trainer.save_checkpoint(path)
        if trainer.current_epoch == 1 and not self.kept.get("gone_back"):
            self.kept["gone_back"] = True
            trainer._checkpoint_connector.restore(path)
            self.kept["again"] = self.remembered(trainer, pl_module)
            trainer.strategy.barrier()


@pytest.mark.parametrize("algorithm", [*SYNCHRONOUS, ADPSGD()], ids=[*NAMES, "adpsgd"])
def test_a_callback_that_goes_back_gets_all_back(algorithm: Any, tmp_path: Path) -> None:
    strategy = asynchronous(algorithm) if isinstance(algorithm, ADPSGD) else gossip(algorithm)
    make_trainer(tmp_path, strategy, 3, max_epochs=3, callbacks=[GoesBack(tmp_path)]).fit(Normed())
    for worker in saved(tmp_path, 3):
        torch.testing.assert_close(worker["again"], worker["then"], rtol=0.0, atol=0.0)
        assert len(worker["weights"]) > 8


class GoesBackVirtually(Recorder):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, SimulatedStrategy)
        path = self.folder / "back.ckpt"
        if trainer.current_epoch == 0 and not self.kept.get("gone_back"):
            trainer.save_checkpoint(path)
        if trainer.current_epoch == 1 and not self.kept.get("gone_back"):
            self.kept["gone_back"] = True
            assert strategy.consensus_distance() > 0
            seconds = strategy.virtual_seconds
            trainer._checkpoint_connector.restore(path)
            self.kept["distance"] = strategy.consensus_distance()
            self.kept["loaded"] = strategy.lightning_module_state_dict()
            self.kept["seconds"] = (seconds, strategy.virtual_seconds)

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["end"] = trainer.strategy.virtual_seconds  # type: ignore[attr-defined]


@pytest.mark.parametrize("algorithm", [ADPSGD(), D2(), ChocoSGD()], ids=["adpsgd", "d2", "choco"])
def test_virtual_workers_go_back_together(algorithm: Any, tmp_path: Path) -> None:
    strategy = SimulatedStrategy(algorithm, workers=3)
    make_trainer(tmp_path, strategy, 1, max_epochs=3, callbacks=[GoesBackVirtually(tmp_path)]).fit(Normed())
    (kept,) = saved(tmp_path, 1)
    state = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(kept["loaded"], state, rtol=0.0, atol=1e-15)
    assert kept["distance"] < 1e-28
    assert kept["seconds"][0] == kept["seconds"][1] < kept["end"]
