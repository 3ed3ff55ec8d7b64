"""Proved here: what user code does to weights, buffers and optimizers counts in a simulation as on one device, for
every method: constraints, changes in the forward pass, teachers, buffers that grow, pruning, moving averages of
callbacks, unfreezing, new optimizers. Every virtual worker has its own; the consensus has the mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from lightning_decentral import SimulatedStrategy
from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, EF21, SAEF, ChocoSGD, MoniquaSGD, SyncSGD
from lightning_decentral.topology import Ring
from strategies.fits import Indices, Regression, flat, loader, make_trainer

METHODS = [SyncSGD(), DPSGD(), DPSGD(Ring(3)), D2(), ChocoSGD(), MoniquaSGD(), SAEF(), EF21(), ADPSGD()]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
A_FEW = [SyncSGD(), DPSGD(Ring(3)), ADPSGD()]
a_few_methods = pytest.mark.parametrize("method", A_FEW, ids=str)
WHOLE = [each for each in METHODS if not isinstance(each, SAEF | EF21)]  # each message has all of an update
every_whole_method = pytest.mark.parametrize("method", WHOLE, ids=str)
WORKERS = 3


def fit(folder: Path, method: Any, model: LightningModule, *callbacks: Callback, **options: Any) -> Trainer:
    validation = options.pop("val_dataloaders", None)
    strategy = SimulatedStrategy(method, workers=WORKERS)
    trainer = make_trainer(folder, strategy, 1, callbacks=list(callbacks), **{"max_epochs": 2, **options})
    trainer.fit(model, val_dataloaders=validation)
    return trainer


def rank_shown(trainer: Trainer) -> int:
    strategy = trainer.strategy
    assert isinstance(strategy, SimulatedStrategy)
    assert strategy._models is not None
    assert strategy._models.shown is not None
    return strategy._models.shown


class Falls(LightningModule):
    """Every gradient is 1: every update takes the learning rate off each weight."""

    def __init__(self, hook: Callable[[Falls], None] | None = None, in_step: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.5)
        self.hook, self.in_step = hook, in_step

    def training_step(self, batch: Tensor) -> Tensor:
        if self.hook is not None and self.in_step:
            self.hook(self)
        return self.layer.weight.sum()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hook is not None and not self.in_step:
            self.hook(self)

    def train_dataloader(self) -> Any:
        return DataLoader(Indices(16), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def clamp_data(model: Falls) -> None:
    model.layer.weight.data = model.layer.weight.data.clamp(0.35, 1.0)


def clamp_in_place(model: Falls) -> None:
    with torch.no_grad():
        model.layer.weight.clamp_(0.35, 1.0)


@every_method
def test_a_constraint_after_each_batch_holds(method: Any, tmp_path: Path) -> None:
    model = Falls(clamp_data)
    fit(tmp_path, method, model)
    torch.testing.assert_close(model.layer.weight, torch.full((1, 4), 0.35))


@a_few_methods
@pytest.mark.parametrize("hook", [clamp_data, clamp_in_place])
def test_a_constraint_in_the_forward_pass_counts(hook: Any, method: Any, tmp_path: Path) -> None:
    model = Falls(hook, in_step=True)
    fit(tmp_path, method, model)  # the last update of each worker follows its last constraint
    assert bool(((model.layer.weight > 0.35 - 0.21) & (model.layer.weight < 0.351)).all()), model.layer.weight


class Teacher(Regression):
    """A momentum teacher as people write it, and a table that grows as each worker needs it."""

    def __init__(self, style: str) -> None:
        super().__init__(momentum=0.0)
        self.teacher = nn.Linear(4, 5).double().requires_grad_(False)
        self.backbone = nn.Linear(4, 4).double().requires_grad_(False)
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("latest", None, persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.style = style
        self.expected: dict[int, Tensor] = {}

    def training_step(self, batch: Any) -> Tensor:
        rank = rank_shown(self.trainer)
        if len(self.table) < 2 + rank:
            self.register_buffer("table", torch.full((2 + rank,), float(rank)))
        self.latest = torch.full((3,), float(rank))
        self.seen += 1
        return super().training_step(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        rank = rank_shown(self.trainer)
        student = self.network[0].weight
        start = self.expected.get(rank, self.expected.get(-1, self.teacher.weight.detach().clone()))
        self.expected.setdefault(-1, start)
        self.expected[rank] = start * 0.9 + student.detach() * 0.1
        if self.style == "in place":
            with torch.no_grad():
                self.teacher.weight.lerp_(student, 0.1)
        elif self.style == "data in place":
            self.teacher.weight.data.mul_(0.9).add_(student.data, alpha=0.1)
        else:
            self.teacher.weight.data = self.teacher.weight.data * 0.9 + student.data * 0.1
        torch.testing.assert_close(self.teacher.weight.detach(), self.expected[rank])
        assert self.latest.tolist() == [float(rank)] * 3 or self.latest.numel() == 3


@a_few_methods
@pytest.mark.parametrize("style", ["in place", "data in place", "data replaced"])
def test_every_worker_has_its_own_teacher_and_buffers(style: str, method: Any, tmp_path: Path) -> None:
    model = Teacher(style)
    backbone = model.backbone.weight.detach().clone()
    fit(tmp_path, method, model, val_dataloaders=loader(4))
    mean = torch.stack([model.expected[rank] for rank in range(WORKERS)]).mean(0)
    torch.testing.assert_close(model.teacher.weight.detach(), mean)
    assert model.table.tolist() == [0.0, 0.0]  # worker 0's
    assert torch.equal(model.backbone.weight, backbone)


@every_method
def test_pruned_weights_stay_zero(method: Any, tmp_path: Path) -> None:
    model = Regression(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)).double())
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(model.network[0], "weight")],
        amount=0.5,
        apply_pruning=lambda epoch: epoch == 1,
        use_lottery_ticket_hypothesis=False,
    )
    fit(tmp_path, method, model, pruning, max_epochs=4)
    assert int((model.network[0].weight == 0).sum()) == 16


class Shown(Callback):
    """What callbacks see after each batch, at the beginning of each epoch, and in a validation."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.epochs: list[Tensor] = []
        self.validated = torch.empty(0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(flat(pl_module))
        strategy = trainer.strategy
        assert isinstance(strategy, SimulatedStrategy)
        assert strategy._simulator is not None
        torch.testing.assert_close(flat(pl_module), strategy._simulator.consensus().buffers[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.batches.append(flat(pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.validated = flat(pl_module)


@every_method
def test_a_moving_average_is_that_of_the_workers_in_turn(method: Any, tmp_path: Path) -> None:
    model, shown = Regression(), Shown()
    fit(tmp_path, method, model, shown, EMAWeightAveraging(decay=0.5), val_dataloaders=loader(4))
    average = shown.batches[0]
    for weights in shown.batches[1:]:
        average = 0.5 * (average + weights)
    torch.testing.assert_close(shown.validated, average)
    torch.testing.assert_close(flat(model), average)


@a_few_methods
@pytest.mark.parametrize("with_batch_norm", [False, True])
def test_stochastic_weight_averaging_is_of_the_consensus(with_batch_norm: bool, method: Any, tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(4) if with_batch_norm else nn.Identity()
    model = Regression(nn.Sequential(norm, nn.Linear(4, 1)).double(), size=24)
    shown = Shown()
    swa = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    fit(tmp_path, method, model, shown, swa, max_epochs=3)
    torch.testing.assert_close(flat(model), torch.stack(shown.epochs[:3]).mean(0))
    if with_batch_norm:
        batches = [inputs for inputs, _ in model.train_dataloader()]
        torch.testing.assert_close(model.network[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
        torch.testing.assert_close(model.network[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))


class Unfreezes(Falls):
    """A second weight, of which every gradient is 1 too, that is trained in the second epoch."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.late = nn.Parameter(torch.zeros(2), requires_grad=way == "group")
        self.way = way

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layer.weight.sum() + self.late.sum()

    def configure_optimizers(self) -> Any:
        parameters = self.layer.parameters() if self.way == "group" else self.parameters()
        return torch.optim.SGD(parameters, lr=0.1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            if self.way == "group":
                self.trainer.optimizers[0].add_param_group({"params": [self.late]})
            self.late.requires_grad_()
            if self.way == "new optimizer":
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.1)]

    def train_dataloader(self) -> Any:
        return DataLoader(Indices(15), batch_size=1)


@a_few_methods
@pytest.mark.parametrize("way", ["flag", "group", "new optimizer"])
def test_what_is_unfrozen_makes_as_many_steps(way: str, method: Any, tmp_path: Path) -> None:
    model = Unfreezes(way)
    fit(tmp_path, method, model)
    before, after = (0.5 - model.layer.weight) / 0.1, -model.late / 0.1
    assert bool(((before - 10).abs() <= 1.01).all()), before  # fifteen batches of three workers, twice
    assert bool(((after - 5).abs() <= 1.01).all()), after


class SwitchesOff(Falls):
    """Every other batch trains one of two weights, the other is frozen meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.other.requires_grad_(batch_idx % 2 == 0)
        return self.layer.weight.sum() + self.other.sum()


@every_whole_method
def test_a_weight_may_be_frozen_for_a_while(method: Any, tmp_path: Path) -> None:
    model = SwitchesOff()
    fit(tmp_path, method, model, max_epochs=3)
    assert bool((model.other < -0.1).all()), model.other
    assert bool((model.layer.weight < -0.2).all())


@every_method
def test_weights_loaded_in_a_validation_are_those_of_all(method: Any, tmp_path: Path) -> None:
    class Loads(Falls):
        def validation_step(self, batch: Any) -> None:
            pass

        def on_validation_epoch_end(self) -> None:
            self.load_state_dict({"layer.weight": torch.full((1, 4), 7.0)})

    model = Loads()
    fit(tmp_path, method, model, val_dataloaders=loader(4))
    torch.testing.assert_close(model.layer.weight, torch.full((1, 4), 7.0))


@pytest.mark.parametrize("method", [DPSGD(), ADPSGD()], ids=str)
def test_parametrizations_are_trained(method: Any, tmp_path: Path) -> None:
    network = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 3)), parametrizations.spectral_norm(nn.Linear(3, 1))
    )
    model = Regression(network.double(), momentum=0.0)
    before = float(model.loss(next(iter(loader(32, 32)))))
    fit(tmp_path, method, model, max_epochs=8)
    assert float(model.loss(next(iter(loader(32, 32))))) < before
