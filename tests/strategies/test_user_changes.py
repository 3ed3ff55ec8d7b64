"""Proved here: what user code does to weights and optimizers counts as it does with ``ddp``, under every method.

All workers have the same data, so a run of several must give what one process gives; where they differ, workers are
compared with each other or with a stacked recursion.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.kinds import KINDS
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from lightning_decentral import AsyncStrategy, GossipStrategy
from lightning_decentral.algorithms import D2, DPSGD, SAEF, ChocoSGD, LocalSGD, SyncSGD
from lightning_decentral.compression import Identity
from lightning_decentral.methods import METHODS
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.topology import Complete
from lightning_decentral.worker import Worker
from strategies.fits import Recorder, Samples, fit_kept, flat, loader, make_trainer, saved, trajectories

pytestmark = pytest.mark.usefixtures("kept_forks")

# Those with a momentum of their own refuse the momentum that modules here have.
NAMES = [name for name in KINDS if not METHODS[name].load().brings_momentum]
ONE_MODEL = ("apsgd", "backup_workers", "hogwild")
UNSEEN = ("apsgd", "acpd")  # updates after the last hook of worker 0, with max_steps; the model has a sum of changes
SYNCHRONOUS = ["sync_sgd", "dpsgd", "d2"]
EXACT = [
    *SYNCHRONOUS,
    "gradient_tracking",
    "sgp",
    "adpsgd",
]  # without compression: equal workers are one process, to rounding
PARAMETERS = ["dpsgd", "d2", "adpsgd"]  # exchange parameters, so that any change of them counts


def fit_beside_one(
    folder: Path, strategy: str, workers: int, module: Callable[[], LightningModule], **options: Any
) -> list[Tensor]:
    """All weights after a fit in one process, and after one by so many workers with the same data."""
    alone, together = module(), module()
    options["use_distributed_sampler"] = False
    make_trainer(folder, "auto", 1, **options).fit(alone)
    fit_kept(folder, strategy, workers, together, **options)
    return [flat(alone), flat(together)]


class Downhill(LightningModule):
    """The gradient is 1 everywhere: each step takes the learning rate off each weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)
        nn.init.constant_(self.layer.weight, 0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return loader(12, 1)


def by_assignment(weight: nn.Parameter) -> None:
    weight.data = weight.data.clamp(0.35, 1.0)


def by_data(weight: nn.Parameter) -> None:
    weight.data.clamp_(0.35, 1.0)


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.clamp_(0.35, 1.0)


class AtTheEnd(Downhill):
    def __init__(self, change: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self.change = change

    def on_train_batch_end(self, *_: Any) -> None:
        self.change(self.layer.weight)


class AtTheStart(Downhill):
    def __init__(self, change: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self.change = change

    def on_train_batch_start(self, *_: Any) -> None:
        self.change(self.layer.weight)


class InTheStep(Downhill):
    def __init__(self, change: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.change(self.layer.weight)
        return super().training_step(batch, batch_idx)


class ByHand(Downhill):
    """Manual optimization, before and after the update, as the first GAN with clipped weights."""

    def __init__(self, change: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self.change, self.automatic_optimization = change, False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.change(self.layer.weight)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer.weight.sum())
        optimizer.step()
        if batch_idx % 2:
            self.change(self.layer.weight)


@pytest.mark.parametrize("change", [by_assignment, by_data, in_place])
@pytest.mark.parametrize("module", [AtTheEnd, AtTheStart, InTheStep, ByHand])
def test_weights_that_are_clamped(module: Any, change: Any, tmp_path: Path) -> None:
    alone = module(change)
    make_trainer(tmp_path, "auto", 1, max_steps=6).fit(alone)
    assert not torch.allclose(flat(alone), torch.tensor(-0.1))  # the change does something
    for strategy in EXACT if change is by_assignment else PARAMETERS:
        together = module(change)
        fit_kept(tmp_path, strategy, 2, together, max_steps=6)
        late = 0.1 if strategy == "adpsgd" else 0.0  # who is averaged with may have made an update less
        assert (flat(together) - flat(alone)).abs().max() < late + 1e-6, strategy


@pytest.mark.parametrize("strategy", [name for name in NAMES if name not in UNSEEN])
def test_a_constraint_holds_with_every_method(strategy: str, tmp_path: Path) -> None:
    module = AtTheEnd(by_assignment)
    fit_kept(tmp_path, strategy, 3, module, max_steps=9)
    weight = module.layer.weight.detach()
    # Calls after the last batch average, and nobody clamps after them; SwarmSGD averages models before the clamp, too,
    # and A2CiD2 mixes a model with its companion, which nobody clamps.
    late = {"adpsgd": 0.02, "acid": 0.05, "swarm": 0.05}.get(strategy, 0.0)
    assert weight.min() >= 0.35 - late - 1e-6
    assert weight.mean() < 0.48


class Restarts(Callback):
    """In the middle of training, weights are loaded, as after a divergence."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            pl_module.load_state_dict({name: torch.ones_like(value) for name, value in pl_module.state_dict().items()})


@pytest.mark.parametrize("strategy", SYNCHRONOUS)
def test_weights_that_are_loaded_on_the_way(strategy: str, tmp_path: Path) -> None:
    module = Downhill()
    fit_kept(tmp_path, strategy, 2, module, max_steps=6, callbacks=[Restarts()])
    torch.testing.assert_close(flat(module), torch.full((12,), 1 - 3 * 0.1))


class Reparametrized(Downhill):
    """Weight norm, and spectral norm, put on before training and taken off in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        nn.init.normal_(self.layer.weight)
        parametrizations.weight_norm(self.layer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer(batch[0].float()) - batch[1].float()).square().mean()


@pytest.mark.parametrize("strategy", SYNCHRONOUS)
def test_parametrizations(strategy: str, tmp_path: Path) -> None:
    modules = []
    for name, devices in (("auto", 1), (f"{strategy}_fork", 2)):
        module = Reparametrized()
        make_trainer(tmp_path, name, devices, max_steps=6, use_distributed_sampler=False).fit(module)
        modules.append(flat(module))
    torch.testing.assert_close(modules[1], modules[0])


# -- optimizers -------------------------------------------------------------------------------------------------------


class Replaces(torch.optim.SGD):
    """Puts new tensors in the place of the parameters, by as much less as the worker's number says."""

    rank = 0

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.1 * (1 + self.rank) * parameter.grad
        return loss


class Replaced(Downhill):
    def configure_optimizers(self) -> Any:
        optimizer = Replaces(self.parameters(), lr=0.1)
        optimizer.rank = self.trainer.global_rank
        return optimizer


def test_what_an_optimizer_puts_in_the_place_of_parameters_is_averaged_in_the_same_step(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "replaced")
    fit_kept(tmp_path, GossipStrategy(LocalSGD(every=1)), 2, Replaced(), max_steps=3, callbacks=[recorder])
    for step, models in enumerate(trajectories(tmp_path, 2, "replaced")):
        torch.testing.assert_close(models, torch.full_like(models, 0.5 - 0.15 * (step + 1)))


class Climbing(torch.optim.Optimizer):
    """Sharpness-aware minimization in two steps of its own; nobody ever calls ``step``."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)
        self.climbed: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.climbed = [(p, 0.05 * p.grad / (p.grad.norm() + 1e-12)) for p in parameters]
        for parameter, climb in self.climbed:
            parameter.add_(climb)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter, climb in self.climbed:
            parameter.sub_(climb)
        self.base.step()
        self.zero_grad()


class Sharpness(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def training_step(self, batch: Any) -> None:
        optimizer = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            self.manual_backward((self.weight - 1 - 2 * self.global_rank).square().sum() / 2)
            step()

    def configure_optimizers(self) -> Any:
        return Climbing(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return loader(64)


def test_an_optimizer_with_methods_of_its_own_is_averaged_once_a_batch(tmp_path: Path) -> None:
    options = {"limit_train_batches": 5, "max_epochs": 1, "callbacks": [Recorder(tmp_path)]}
    fit_kept(tmp_path, GossipStrategy(DPSGD(Complete(2))), 2, Sharpness(), **options)
    x = torch.zeros(2, 2, dtype=torch.float64)
    target = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    for measured in trajectories(tmp_path, 2):
        gradient = x - target
        climb = 0.05 * gradient / (gradient.norm(dim=1, keepdim=True) + 1e-12)
        x = x.mean(0, keepdim=True) - 0.1 * (x + climb - target)
        torch.testing.assert_close(measured, x, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("strategy", ["d2", "choco_sgd", "moniqua_sgd", "saef", "adpsgd"])
def test_an_optimizer_with_methods_of_its_own_is_exchanged_by_every_method(strategy: str, tmp_path: Path) -> None:
    options = {"limit_train_batches": 16, "max_epochs": 2, "callbacks": [Recorder(tmp_path)]}
    fit_kept(tmp_path, strategy, 2, Sharpness(), **options)
    first, second = (worker["weights"][-1] for worker in saved(tmp_path, 2))
    assert (first - second).abs().max() < 1.5  # 2 apart without any exchange
    assert saved(tmp_path, 2)[1]["traffic"][2] >= 16


def test_a_method_that_exchanges_gradients_refuses_what_it_does_not_see(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="changed in a batch without a step of any optimizer") as error:
        make_trainer(tmp_path, "sync_sgd_fork", 2, max_epochs=1).fit(Sharpness())
    assert "DPSGD" in str(error.value)


class Newton(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(4, 1).double()

    def training_step(self, batch: Any) -> Tensor:
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

    def train_dataloader(self) -> Any:
        return loader(32, 32)


@pytest.mark.parametrize("strategy", PARAMETERS)
@pytest.mark.parametrize("devices", [1, 2])
def test_lbfgs_evaluates_as_often_as_it_likes(devices: int, strategy: str, tmp_path: Path) -> None:
    modules = fit_beside_one(tmp_path, strategy, devices, Newton, max_epochs=4)
    late = 0.1 if strategy == "adpsgd" and devices > 1 else 1e-9  # an update less at who is averaged with
    torch.testing.assert_close(modules[1], modules[0], rtol=1e-7, atol=late)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_method_that_exchanges_gradients_refuses_lbfgs(devices: int, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="LBFGS evaluates the loss more than once") as error:
        make_trainer(tmp_path, "sync_sgd_fork", devices, max_steps=2).fit(Newton())
    assert "DPSGD" in str(error.value)


class Raw(Downhill):
    """``step`` of the optimizer itself, by hand or in an override: Lightning does not see it."""

    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = ((self.layer(batch[0]) - self.global_rank) * torch.linspace(0.1, 1, 3)).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


class Usual(Downhill):
    training_step = Raw.training_step


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("algorithm", [DPSGD(Complete(2)), SyncSGD(), D2(), ChocoSGD(Complete(2), Identity(), 1.0)])
def test_a_step_past_the_strategy_is_exchanged(algorithm: AbstractAlgorithm, manual: bool, tmp_path: Path) -> None:
    runs = []
    for name, module in (("raw", Raw(manual)), ("usual", Usual().double())):
        options = {"limit_train_batches": 6, "max_epochs": 1, "callbacks": [Recorder(tmp_path, name)]}
        fit_kept(tmp_path, GossipStrategy(algorithm), 2, module, **options)
        runs.append(trajectories(tmp_path, 2, name))
    torch.testing.assert_close(*runs, rtol=0.0, atol=1e-12)


class Critics(LightningModule):
    """Several updates of one network in a batch, none of it in some, and frozen by hand between two."""

    def __init__(self, frozen_at_start: bool = False, skips: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.skips = skips
        torch.manual_seed(4)
        self.critic, self.generator = nn.Linear(3, 1, bias=False), nn.Linear(3, 3, bias=False)
        self.critic.requires_grad_(not frozen_at_start)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, generator = self.optimizers()  # type: ignore[misc]
        x = batch[0][:, :3].float() + self.global_rank
        self.critic.requires_grad_(True)
        for repetition in range(2):
            critic.zero_grad()
            self.manual_backward((self.critic(self.generator(x).detach()) - 1).square().mean())
            if not (self.skips and repetition == batch_idx % 2 == self.global_rank):
                critic.step()
        self.critic.requires_grad_(False)
        if batch_idx % 3 == 0:
            generator.zero_grad()
            self.manual_backward(-self.critic(self.generator(x)).mean())
            generator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(p.parameters(), lr=0.01, momentum=0.5) for p in (self.critic, self.generator)]

    def train_dataloader(self) -> Any:
        return loader(96)


class Apart(Recorder):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["end"] = {name: getattr(pl_module, name).weight.detach().clone() for name in ("critic", "generator")}
        super().on_train_end(trainer, pl_module)


@pytest.mark.parametrize(("frozen_at_start", "skips"), [(False, False), (True, True)])
@pytest.mark.parametrize("algorithm", [SyncSGD(), DPSGD(), D2(), SAEF(), ChocoSGD()], ids=lambda a: type(a).__name__)
def test_updates_in_any_number_and_networks_frozen_by_hand(
    algorithm: AbstractAlgorithm, frozen_at_start: bool, skips: bool, tmp_path: Path
) -> None:
    options = {"limit_train_batches": 7, "max_epochs": 3, "callbacks": [Apart(tmp_path)]}
    fit_kept(tmp_path, GossipStrategy(algorithm), 2, Critics(frozen_at_start, skips), **options)
    first, second = (worker["end"] for worker in saved(tmp_path, 2))
    exact = isinstance(algorithm, (SyncSGD, SAEF))
    for name in ("critic", "generator"):
        apart = float((first[name] - second[name]).abs().max())
        assert apart < (1e-6 if exact else 0.12), name


class Shared(LightningModule):
    """Two optimizers have all parameters, and take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(6)
        self.layer = nn.Linear(4, 2).double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.layer(batch[0]).square().mean())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.Adam(self.parameters(), lr=0.01)]

    def train_dataloader(self) -> Any:
        return loader(32)


@pytest.mark.parametrize("strategy", [*PARAMETERS, "choco_sgd", "saef"])
def test_two_optimizers_for_the_same_parameters(strategy: str, tmp_path: Path) -> None:
    modules = fit_beside_one(tmp_path, strategy, 2, Shared, max_epochs=2)
    tolerance = {"choco_sgd": 1e-6, "saef": 0.2, "adpsgd": 0.1}.get(strategy, 1e-10)
    torch.testing.assert_close(modules[1], modules[0], rtol=0.0, atol=tolerance)


def test_gradients_of_parameters_with_two_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Optimizers 0 and 1 have a parameter in common") as error:
        make_trainer(tmp_path, "sync_sgd_fork", 2, max_steps=2).fit(Shared())
    assert "DPSGD" in str(error.value)


class Adam(Newton):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return loader(32)


class Lookahead(torch.optim.Optimizer):
    """A wrapper as they are written by hand: torch's constructor is never called."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.made = inner, 0
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
        self.slow = [parameter.detach().clone() for parameter in self.param_groups[0]["params"]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.made += 1
        if self.made % 2 == 0:
            for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
                parameter.data.copy_(slow.lerp_(parameter.data, 0.5))
        return loss


class Looks(Newton):
    def configure_optimizers(self) -> Any:
        return Lookahead(torch.optim.Adam(self.parameters(), lr=0.01))


@pytest.mark.parametrize("strategy", ["sync_sgd", "dpsgd"])
def test_an_optimizer_without_torchs_constructor(strategy: str, tmp_path: Path) -> None:
    modules = fit_beside_one(tmp_path, strategy, 2, Looks, max_steps=5)
    torch.testing.assert_close(modules[1], modules[0], rtol=0.0, atol=1e-10)


class NewOptimizer(Callback):
    """Another optimizer from the second epoch on: for the same parameters, or for one more layer."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.05, momentum=0.9)]


@pytest.mark.parametrize("strategy", EXACT)
def test_an_optimizer_that_takes_another_ones_place(strategy: str, tmp_path: Path) -> None:
    modules = fit_beside_one(tmp_path, strategy, 2, Adam, max_epochs=2, callbacks=[NewOptimizer()])
    torch.testing.assert_close(modules[1], modules[0], rtol=0.0, atol=0.3 if strategy == "adpsgd" else 1e-10)


# -- updates that only some workers make ------------------------------------------------------------------------------


class Skips(LightningModule):
    """One worker meets a NaN now and then, and leaves that update out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        return loss * float("nan") if batch_idx % 5 == 2 + self.global_rank else loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.parameters()):
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)

    def train_dataloader(self) -> Any:
        return DataLoader(Samples(270, dtype=torch.float32), batch_size=2)


@pytest.mark.parametrize("strategy", NAMES)
def test_updates_that_one_worker_leaves_out(strategy: str, tmp_path: Path) -> None:
    module = Skips()
    fit_kept(tmp_path, strategy, 3, module, max_epochs=2, callbacks=[Recorder(tmp_path)])
    assert (module.layer.weight - 1).abs().max() < 0.1
    if strategy in ("sync_sgd", "saef"):
        first, *others = [worker["weights"][-1] for worker in saved(tmp_path, 3)]
        for other in others:
            torch.testing.assert_close(other, first, rtol=0.0, atol=1e-6)


class Decays(Downhill):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)


class Still(AbstractAlgorithm):
    """A step that asks for no update."""

    def resolved(self, world_size: int) -> Still:
        return self

    def init(self, worker: Worker) -> None:
        pass

    async def step(self, worker: Worker) -> None:
        await Gradient()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_without_an_update_leaves_the_weights(devices: int, tmp_path: Path) -> None:
    module = Decays()
    fit_kept(tmp_path, GossipStrategy(Still()), devices, module, max_steps=4)
    assert torch.equal(flat(module), torch.full((12,), 0.5))


# -- weights that change places ---------------------------------------------------------------------------------------


class Swaps(Callback):
    """Other weights for a validation, put in by assignment; what was there before is kept, and put back."""

    def __init__(self, back: str) -> None:
        self.back = back
        self.kept: list[Tensor] = []
        self.seen: list[float] = []

    def swap(self, module: LightningModule) -> None:
        for i, parameter in enumerate(module.parameters()):
            parameter.data, self.kept[i] = self.kept[i], parameter.data

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = [torch.full_like(parameter.data, 0.125) for parameter in pl_module.parameters()]
        self.swap(pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Who calls an asynchronous worker after its last batch still moves it a little.
        late = 0.4 if isinstance(trainer.strategy, AsyncStrategy) else 1e-6
        assert (flat(pl_module) - 0.125).abs().max() < late

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.back == "validation":
            self.swap(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.back == "epoch" and trainer.current_epoch:
            self.swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.back == "epoch":
            self.swap(pl_module)


class Validated(Downhill):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def val_dataloader(self) -> Any:
        return loader(2, 1)


@pytest.mark.parametrize(
    ("strategy", "back"),
    [*((name, "validation") for name in NAMES), *((name, "epoch") for name in (*SYNCHRONOUS, "adpsgd", "apsgd"))],
)
def test_weights_that_others_stand_in_for_come_back(strategy: str, back: str, tmp_path: Path) -> None:
    alone, together = Validated(), Validated()
    options = {"max_epochs": 3, "limit_train_batches": 4, "callbacks": [Swaps(back)]}
    make_trainer(tmp_path, "auto", 1, **options).fit(alone)
    fit_kept(tmp_path, strategy, 2, together, **options)
    exact = strategy in SYNCHRONOUS
    if strategy in ONE_MODEL:  # 24 updates of 0.1, of which none is lost
        most = -1.9 if strategy in ("apsgd", "hogwild") else -0.7  # some are dropped, or count less
        assert -1.9 - 1e-5 <= flat(together).mean() <= most + 1e-5
        return
    assert (flat(together).mean() - flat(alone).mean()).abs() < (1e-5 if exact else 0.9)
    assert flat(together).mean() < 0.3


class Merges(Validated):
    """A product of trained numbers is added to frozen weights for each validation, as a LoRA is, and taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (1 + self.global_rank) * (self.a + 2 * self.b)

    def on_validation_start(self) -> None:
        self.layer.weight.data += self.a.data * self.b.data

    def on_validation_end(self) -> None:
        self.layer.weight.data -= self.a.data * self.b.data


@pytest.mark.parametrize("strategy", ["dpsgd", "diloco", "swarm", "adpsgd"])
def test_what_is_merged_into_frozen_weights_for_a_validation_comes_out_again(strategy: str, tmp_path: Path) -> None:
    module = Merges()
    fit_kept(tmp_path, strategy, 2, module, max_epochs=2, limit_train_batches=3)
    torch.testing.assert_close(module.layer.weight, torch.full((3, 4), 0.5), rtol=0.0, atol=1e-5)  # float32 of up to 9


class Accumulates(Critics):
    """An override steps in every third batch, and keeps the gradients in between."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        return (self.critic(self.generator(batch[0][:, :3].float())) - 1).square().mean()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        if batch_idx % 3 == 2:
            optimizer.step()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 3 == 0:
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class OfItsOwn(Accumulates):
    """No optimizer that Lightning knows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_fit_start(self) -> None:
        self.own = torch.optim.SGD(self.parameters(), lr=0.05)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.own.zero_grad()
        self.manual_backward((self.critic(self.generator(batch[0][:, :3].float())) - self.global_rank).square().mean())
        self.own.step()

    def configure_optimizers(self) -> Any:
        return None


@pytest.mark.parametrize("strategy", SYNCHRONOUS)
def test_gradients_that_user_code_accumulates(strategy: str, tmp_path: Path) -> None:
    modules = fit_beside_one(tmp_path, strategy, 2, Accumulates, max_epochs=1)
    torch.testing.assert_close(modules[1], modules[0])


def test_an_optimizer_that_lightning_does_not_know(tmp_path: Path) -> None:
    fit_kept(tmp_path, "dpsgd", 2, OfItsOwn(), max_epochs=2, callbacks=[Recorder(tmp_path)])
    first, second = (worker["weights"][-1] for worker in saved(tmp_path, 2))
    assert (first - second).abs().max() < 0.1  # five times as far apart without any exchange
    with pytest.raises(
        Exception, match="updated by something else than an optimizer that configure_optimizers"
    ) as error:
        make_trainer(tmp_path, "sync_sgd_fork", 2, max_epochs=1).fit(OfItsOwn())
    assert "DPSGD" in str(error.value)
