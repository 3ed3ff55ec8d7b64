"""Proved here: the strategies work with what Lightning users do: seeds, samplers, accumulation, mixed precision with
skipped steps, manual optimization, unused, frozen, unfrozen and tied parameters, memory formats, BatchNorm;
steps begin before their batch is loaded;
evaluation sees the consensus and leaves the local model bit for bit; one device is plain SGD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral import GossipStrategy
from lightning_decentral.algorithms import ADPSGD, APSGD, D2, DPSGD, ChocoSGD, SyncSGD
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep
from lightning_decentral.topology import Ring
from lightning_decentral.worker import Worker
from strategies.fits import (
    Abreast,
    Recorder,
    Regression,
    Samples,
    asynchronous,
    fit_kept,
    flat,
    gossip,
    loader,
    make_trainer,
    saved,
    trajectories,
)

pytestmark = pytest.mark.usefixtures("kept_forks")

EVERY = ["sync_sgd_fork", "dpsgd_fork", "d2_fork", "adpsgd_fork"]


class RandomStart(Regression):
    """Every worker draws other weights and another buffer."""

    def configure_model(self) -> None:
        if not hasattr(self, "buffer"):
            torch.manual_seed(100 + self.global_rank)
            self.network = nn.Linear(4, 1).double()
            self.register_buffer("buffer", torch.full((2,), float(self.global_rank)))


class Start(Recorder):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["start"] = flat(pl_module)
        self.kept["buffer"] = pl_module.buffer.clone()


@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork"])
def test_all_workers_start_from_worker_0(strategy: str, tmp_path: Path) -> None:
    make_trainer(tmp_path, strategy, 3, max_steps=1, callbacks=[Start(tmp_path)]).fit(RandomStart(nn.Identity()))
    torch.manual_seed(100)
    expected = flat(nn.Linear(4, 1).double())
    for worker in saved(tmp_path, 3):
        assert torch.equal(worker["start"], expected)
        assert torch.equal(worker["buffer"], torch.zeros(2))


class Seen(Recorder):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.kept.setdefault("inputs", []).append(batch[0].clone())


@pytest.mark.parametrize("strategy", EVERY)
def test_the_workers_divide_the_data(strategy: str, tmp_path: Path) -> None:
    """Equal shards with the synchronous methods; with the asynchronous one whatever each takes. Every sample once."""
    make_trainer(tmp_path, strategy, 2, max_epochs=1, callbacks=[Seen(tmp_path)]).fit(Regression(size=32))
    workers = [torch.cat(worker["inputs"]) for worker in saved(tmp_path, 2)]
    if strategy != "adpsgd_fork":
        assert [len(inputs) for inputs in workers] == [16, 16]
    samples = {tuple(sample) for inputs in workers for sample in inputs.tolist()}
    assert sum(len(inputs) for inputs in workers) == len(samples) == 32


@pytest.mark.parametrize("strategy", EVERY)
def test_accumulation_makes_one_exchange_per_update(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        strategy,
        2,
        limit_train_batches=7,
        max_epochs=1,
        accumulate_grad_batches=3,
        callbacks=[Recorder(tmp_path)],
    )
    trainer.fit(Regression(size=64))
    for rank, worker in enumerate(saved(tmp_path, 2)):
        assert worker["global_step"] == 3  # of 3, 3 and 1 batches
        calls = rank == 1 or strategy != "adpsgd_fork"  # of two AD-PSGD workers one calls and one answers
        least = 1 if strategy == "adpsgd_fork" else 3  # its calls may go on beside the next steps
        assert least * calls <= worker["traffic"][2] <= 3 * calls
        weights = worker["weights"]
        moved = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
        if strategy != "adpsgd_fork":  # there a call may move the weights that the next step begins with
            assert moved == [False, True, False, False, True, True]


class Gradients(Recorder):
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.kept.setdefault("before", []).append(norm_of_gradients(pl_module))

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.kept.setdefault("after", []).append(norm_of_gradients(pl_module))


def norm_of_gradients(module: nn.Module) -> float:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return float(torch.cat([gradient.reshape(-1) for gradient in gradients]).norm()) if gradients else 0.0


@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork"])
def test_every_worker_clips_its_own_gradient(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, strategy, 2, max_steps=4, gradient_clip_val=0.01, callbacks=[Gradients(tmp_path), Moves(tmp_path)]
    )
    trainer.fit(Regression(momentum=0.0, learning_rate=1.0))
    first, second = saved(tmp_path, 2)
    for worker in (first, second):
        assert min(worker["before"]) > 0.02
    assert first["before"] != second["before"]
    for worker in saved(tmp_path, 2, "moves"):
        assert all(move == pytest.approx(0.01, rel=1e-3) for move in worker["moves"])


class Moves(Recorder):
    """How far the optimizer itself moves the weights, without the averaging."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "moves")
        self.kept["moves"] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        before: list[Tensor] = []
        # clipping happens in the closure, before the parameters change and after the pre-hook of the optimizer
        update = optimizer.step

        def stepped(closure: Any = None) -> Any:
            loss = closure()
            before.append(flat(pl_module))
            update()
            self.kept["moves"].append(float((flat(pl_module) - before[-1]).norm()))
            return loss

        optimizer.step = stepped


# -- precision --------------------------------------------------------------------------------------------------------


class Overflow(Regression):
    """Worker 1 meets an infinite gradient in step 2."""

    def on_after_backward(self) -> None:
        if self.global_rank == 1 and self.global_step == 2:
            next(self.parameters()).grad.fill_(math.inf)


class Skips(Recorder):
    """Counts the optimizer's real updates, and how far the weights jump."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["updates"] = []
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.kept["updates"].append(trainer.global_step))

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["scale"] = trainer.precision_plugin.scaler.get_scale()
        self.kept["versions"] = [stepper.worker.version for stepper in trainer.strategy._steppers]
        self.kept["steps"] = [stepper.worker.step for stepper in trainer.strategy._steppers]


@pytest.mark.parametrize("make", [lambda: gossip(DPSGD(Ring(3))), lambda: gossip(D2()), asynchronous])
def test_a_step_that_mixed_precision_skips_on_one_worker_keeps_the_others_going(make: Any, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer = make_trainer(
        tmp_path,
        make(),
        3,
        max_steps=6,
        plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler),
        callbacks=[Skips(tmp_path)],
    )
    trainer.fit(Overflow(nn.Linear(4, 1), size=128))
    workers = saved(tmp_path, 3)
    assert [len(worker["updates"]) for worker in workers] == [6, 5, 6]
    assert [worker["scale"] for worker in workers] == [2.0**10, 2.0**9, 2.0**10]
    assert [worker["steps"] for worker in workers] == [[6], [6], [6]]
    assert {worker["traffic"][2] for worker in workers} == {6}
    for worker in workers:
        assert all(bool(weights.isfinite().all()) for weights in worker["weights"])


def test_synchronous_sgd_skips_a_step_on_all_workers(tmp_path: Path) -> None:
    """The mean gradient is infinite everywhere."""
    trainer = make_trainer(
        tmp_path,
        "sync_sgd_fork",
        2,
        max_steps=5,
        plugins=MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0)),
        callbacks=[Skips(tmp_path)],
    )
    trainer.fit(Overflow(nn.Linear(4, 1), size=128))
    first, second = saved(tmp_path, 2)
    assert len(first["updates"]) == len(second["updates"]) == 4
    assert first["scale"] == second["scale"] == 2.0
    assert torch.equal(first["weights"][-1], second["weights"][-1])


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any, strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy, 2, max_steps=8, precision=precision, callbacks=[Recorder(tmp_path)])
    module = Regression(nn.Linear(4, 1), size=64)
    trainer.fit(module)
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    first, second = saved(tmp_path, 2)
    for worker in (first, second):
        assert worker["weights"][-1].dtype == dtype
        assert not torch.equal(worker["weights"][0], worker["weights"][-1])
    elements = worker["weights"][0].numel()
    size = torch.finfo(dtype).bits // 8
    if strategy != "adpsgd_fork":
        assert first["traffic"][0] == 8 * elements * size


class Apart(Recorder):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(float(trainer.global_rank) * 0.37)


def test_averaging_in_bfloat16_goes_on_to_consensus(tmp_path: Path) -> None:
    """Without learning, workers that begin apart agree to the last bit: a mean is rounded once."""

    trainer = make_trainer(
        tmp_path, gossip(DPSGD(Ring(3))), 3, max_steps=3, precision="bf16-true", callbacks=[Apart(tmp_path)]
    )
    trainer.fit(Regression(nn.Linear(4, 1), learning_rate=0.0))
    last = trajectories(tmp_path, 3)[-1]
    assert torch.equal(last[0], last[1])
    assert torch.equal(last[1], last[2])


# -- manual optimization ----------------------------------------------------------------------------------------------


class Adversaries(LightningModule):
    """Two networks and two optimizers, as in a GAN; a third module that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(5)
        self.generator, self.critic = nn.Linear(4, 3).double(), nn.Linear(3, 1).double()
        self.unused = nn.Linear(2, 2).double()

    def training_step(self, batch: Any) -> None:
        inputs, _ = batch
        generator, critic = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(critic)
        loss = self.critic(self.generator(inputs).detach()).square().mean()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        loss = (1 - self.critic(self.generator(inputs))).square().mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self) -> Any:
        generator = torch.optim.SGD([*self.generator.parameters(), *self.unused.parameters()], lr=0.1)
        return [generator, torch.optim.Adam(self.critic.parameters(), lr=0.01)]

    def train_dataloader(self) -> Any:
        return loader(128)


@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork", "sync_sgd_fork"])
def test_manual_optimization_with_two_optimizers(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy, 3, limit_train_batches=5, max_epochs=2, callbacks=[Recorder(tmp_path)])
    module = Adversaries()
    start = flat(module)
    trainer.fit(module)
    workers = saved(tmp_path, 3)
    for worker in workers:
        assert worker["global_step"] == 20
        assert worker["traffic"][2] == 20  # 10 exchanges of each network
        assert not torch.allclose(worker["weights"][-1][: 4 * 3], start[: 4 * 3])
    if strategy == "sync_sgd_fork":
        assert torch.equal(workers[0]["weights"][-1], workers[1]["weights"][-1])


@pytest.mark.parametrize("hosts", [1, 2])
def test_two_optimizers_that_gossip_equal_two_references(hosts: int, tmp_path: Path) -> None:
    """With two workers both networks are averaged with weight 1/2, each at its own step."""
    strategy, callbacks = GossipStrategy(exchange_timeout_seconds=60.0), [Recorder(tmp_path)]
    fit_kept(tmp_path, strategy, 2, TwoQuadratics(), hosts, max_steps=2 * 6, callbacks=callbacks)
    measured = trajectories(tmp_path, 2)
    x = torch.zeros(2, 2, dtype=torch.float64)
    for step in range(6):
        gradient = torch.stack([x[rank] - torch.tensor([rank + 1.0, -rank]) for rank in range(2)])
        x = x.mean(0, keepdim=True) - torch.tensor([0.1, 0.2], dtype=torch.float64) * gradient
        torch.testing.assert_close(measured[step], x, rtol=0.0, atol=1e-14)


class TwoQuadratics(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def training_step(self, batch: Any) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer, parameter, target in (
            (first, self.a, self.global_rank + 1.0),
            (second, self.b, -self.global_rank),
        ):
            optimizer.zero_grad()
            self.manual_backward((parameter - target).square().sum() / 2)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.a], lr=0.1), torch.optim.SGD([self.b], lr=0.2)]

    def train_dataloader(self) -> Any:
        return loader(64)


# -- parameters -------------------------------------------------------------------------------------------------------


class Branches(Regression):
    """One layer is used by worker 0 only, one by nobody, one is frozen, and one is tied to another."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4).double())
        self.only_zero, self.unused, self.frozen = (nn.Linear(4, 4).double() for _ in range(3))
        self.tied = nn.Linear(4, 4).double()
        self.tied.weight = self.network.weight
        self.frozen.requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        hidden = self.frozen(self.tied(self.network(batch[0])))
        return (self.only_zero(hidden) if self.global_rank == 0 else hidden).square().mean()


@pytest.mark.parametrize("strategy", EVERY)
def test_unused_frozen_and_tied_parameters(strategy: str, tmp_path: Path) -> None:
    module = Branches()
    start = {key: value.clone() for key, value in module.state_dict().items()}
    # Abreast, or worker 1 might have made its last call before worker 0 has changed what only that one uses.
    trainer = make_trainer(tmp_path, strategy, 2, max_steps=6, callbacks=[Abreast(1), Recorder(tmp_path)])
    trainer.fit(module)
    assert module.tied.weight is module.network.weight
    for worker in saved(tmp_path, 2):
        state = worker["state"]
        assert torch.equal(state["tied.weight"], state["network.weight"])
        for key in ("unused.weight", "frozen.weight"):
            torch.testing.assert_close(state[key], start[key], rtol=0.0, atol=1e-15)
        for key in ("network.weight", "only_zero.weight"):
            assert not torch.allclose(state[key], start[key])


class Unfreeze(BaseFinetuning):
    """The backbone joins at epoch 1, as in ``BackboneFinetuning``."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


class Finetuned(Regression):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 1).double(), momentum=0.0)
        self.backbone = nn.Linear(4, 4).double()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.network(self.backbone(batch[0])), batch[1] + self.global_rank)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.05)


class StandStill(Callback):
    """No learning in the last step: two workers that average are equal after it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.0


@pytest.mark.parametrize("algorithm", [DPSGD(), D2(), SyncSGD()], ids=repr)
def test_parameters_unfrozen_on_the_way_are_exchanged_from_then_on(algorithm: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        gossip(algorithm),
        2,
        max_epochs=2,
        limit_train_batches=4,
        callbacks=[Unfreeze(), StandStill(), Recorder(tmp_path)],
    )
    module = Finetuned()
    start = module.backbone.weight.detach().clone()
    trainer.fit(module)
    workers = saved(tmp_path, 2)
    sent = 5 * 8, (5 + 20) * 8  # bytes of the head, and of head and backbone
    assert workers[0]["traffic"][0] == 4 * sent[0] + 4 * sent[1]
    backbones = [worker["state"]["backbone.weight"] for worker in workers]
    assert not torch.allclose(backbones[0], start)
    torch.testing.assert_close(backbones[0], backbones[1], rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("algorithm", [APSGD(), ADPSGD()], ids=repr)
def test_calls_over_connections_are_answered_with_what_was_unfrozen(algorithm: Any, tmp_path: Path) -> None:
    """As between hosts: the server, or the other worker, has memory for the larger vector from then on."""
    strategy = asynchronous(algorithm, shared_memory=False)
    trainer = make_trainer(tmp_path, strategy, 2, max_epochs=2, callbacks=[Unfreeze(), Recorder(tmp_path)])
    module = Finetuned()
    start = module.backbone.weight.detach().clone()
    trainer.fit(module)
    assert not torch.allclose(module.backbone.weight, start)
    own = [worker["state"]["backbone.weight"] for worker in saved(tmp_path, 2)]
    assert all(not torch.allclose(weight, start) for weight in own)


class Swap(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.first.requires_grad_(trainer.current_epoch == 0)
        pl_module.second.requires_grad_(trainer.current_epoch == 1)


class Two(Regression):
    def __init__(self) -> None:
        super().__init__(nn.Identity(), momentum=0.0)
        self.first, self.second = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))

    def loss(self, batch: Any) -> Tensor:
        return (self.first + self.second - self.global_rank).square().sum() / 2


def test_a_parameter_frozen_in_exchange_for_another_is_noticed(tmp_path: Path) -> None:
    """As many parameters as before, but others."""

    trainer = make_trainer(
        tmp_path, "sync_sgd_fork", 2, max_epochs=2, limit_train_batches=3, callbacks=[Swap(), Recorder(tmp_path)]
    )
    trainer.fit(Two())
    first, second = saved(tmp_path, 2)
    assert float(first["state"]["second"].norm()) > 0
    torch.testing.assert_close(first["state"]["second"], second["state"]["second"], rtol=0.0, atol=1e-14)


class ChannelsLast(Regression):
    def __init__(self) -> None:
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 4, 1)).double()
        super().__init__(layers.to(memory_format=torch.channels_last))

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.network[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert not self.network[0].weight.is_contiguous()

    def train_dataloader(self) -> Any:
        return loader(32, shape=(3, 6, 6))


@pytest.mark.parametrize("strategy", EVERY)
def test_channels_last_weights_stay_channels_last(strategy: str, tmp_path: Path) -> None:
    module = ChannelsLast()
    start = module.network[0].weight.detach().clone()
    make_trainer(tmp_path, strategy, 2, max_steps=4).fit(module)
    assert module.network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert 0 < (module.network[0].weight.detach() - start).abs().max() < 1


class OfImages(Regression):
    def train_dataloader(self) -> Any:
        return loader(32, shape=(3, 6, 6))


def test_channels_last_gives_the_numbers_of_contiguous_weights(tmp_path: Path) -> None:
    for name, memory_format in (("last", torch.channels_last), ("first", torch.contiguous_format)):
        torch.manual_seed(0)
        layers = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 1)).double().to(memory_format=memory_format)
        )
        trainer = make_trainer(tmp_path, "d2_fork", 3, max_steps=3, callbacks=[Recorder(tmp_path, name)])
        trainer.fit(OfImages(layers))
    torch.testing.assert_close(
        trajectories(tmp_path, 3, "last"), trajectories(tmp_path, 3, "first"), rtol=1e-10, atol=1e-12
    )


# -- evaluation -------------------------------------------------------------------------------------------------------


class Normalized(Regression):
    """BatchNorm, and other data for each worker."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double())

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.network(batch[0] * (1 + self.global_rank)), batch[1] + self.global_rank)

    def val_dataloader(self) -> Any:
        return loader(8)


class Evaluation(Recorder):
    """What the module is before, during and after a validation."""

    def states(self, module: LightningModule) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in module.state_dict().items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.steps:
            trainer.strategy.quiesce()  # a call of a slower worker may still come in before
        self.kept.setdefault("before", []).append(self.states(pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.kept.setdefault("during", []).append(self.states(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch > 0:
            self.kept.setdefault("next", []).append(self.states(pl_module))

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.quiesce()
        self.kept["distance"] = trainer.strategy.last_consensus_distance
        self.kept["last"] = self.states(pl_module)


@pytest.mark.parametrize("strategy", EVERY)
def test_validation_sees_the_consensus_and_leaves_the_local_model(strategy: str, tmp_path: Path) -> None:
    workers = 3
    trainer = make_trainer(
        tmp_path,
        strategy,
        workers,
        max_epochs=2,
        limit_train_batches=3,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        callbacks=[Evaluation(tmp_path)],
    )
    module = Normalized()
    trainer.fit(module)
    results = saved(tmp_path, workers)
    for index in (1, 2):  # after each epoch; 0 is the sanity check
        for key, value in results[0]["during"][index].items():
            local = torch.stack([worker["before"][index][key] for worker in results])
            mean = local.mean(0) if local.is_floating_point() else local[0]
            for worker in results:
                torch.testing.assert_close(worker["during"][index][key], mean, rtol=1e-12, atol=1e-14)
            assert torch.equal(value, results[1]["during"][index][key])
        if strategy != "sync_sgd_fork":
            assert not torch.equal(
                results[0]["before"][index]["network.0.weight"], results[0]["during"][index]["network.0.weight"]
            )
        assert not torch.equal(
            results[0]["before"][index]["network.1.running_mean"], results[0]["during"][index]["network.1.running_mean"]
        )
    for worker in results:
        for key, value in worker["before"][1].items():
            if strategy != "adpsgd_fork" or "running" in key:  # there calls may have come in before the next batch
                assert torch.equal(worker["next"][0][key], value), key
    # After fit the module, brought back from worker 0, is the consensus.
    for key, value in module.state_dict().items():
        local = torch.stack([worker["last"][key] for worker in results])
        mean = local.mean(0) if local.is_floating_point() else local[0]
        torch.testing.assert_close(value, mean, rtol=1e-12, atol=1e-14)
    before = [
        torch.cat([v.reshape(-1) for k, v in w["before"][2].items() if "weight" in k or "bias" in k]) for w in results
    ]
    stacked = torch.stack(before)
    distance = float((stacked - stacked.mean(0)).square().sum(1).mean())
    assert results[0]["distance"] == pytest.approx(distance, rel=1e-9, abs=1e-25)


def test_the_model_can_stay_local_at_the_end(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gossip(average_at_end=False), 2, max_steps=3, callbacks=[Recorder(tmp_path)])
    module = Regression()
    trainer.fit(module)
    assert torch.equal(flat(module), saved(tmp_path, 2)[0]["weights"][-1])


class Evaluated(Normalized):
    def test_step(self, batch: Any) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any) -> Tensor:
        return self.network(batch[0])


@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork"])
def test_validate_test_and_predict_work_alone(strategy: str, tmp_path: Path) -> None:
    module = Evaluated()
    start = flat(module)
    expected = float(nn.functional.mse_loss(module.network.eval()(loader(8).dataset.inputs), loader(8).dataset.targets))
    single = make_trainer(tmp_path, strategy, 1).test(module, loader(8, 8), verbose=False)
    assert single[0]["test_loss"] == pytest.approx(expected)
    assert make_trainer(tmp_path, strategy, 2).validate(module, loader(8), verbose=False)[0]["val_loss"] > 0
    make_trainer(tmp_path, strategy, 2).predict(module, loader(8), return_predictions=False)
    assert torch.equal(flat(module), start)


# -- optimizers and one device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["sync_sgd", "dpsgd", "d2", "choco_sgd", "moniqua_sgd", "adpsgd"])
def test_one_device_is_plain_sgd_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    modules = []
    for name in (strategy, "auto"):
        module = Regression()
        trainer = make_trainer(
            tmp_path,
            name,
            1,
            max_epochs=2,
            gradient_clip_val=0.5,
            accumulate_grad_batches=2,
            use_distributed_sampler=False,  # Lightning's permutes the training data, on one device too
        )
        trainer.fit(module)
        modules.append(flat(module))
    assert torch.equal(*modules)


class WithAdam(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("strategy", ["dpsgd_fork", "adpsgd_fork"])
def test_adam_with_weight_decay_and_a_closure_free_second_fit(strategy: str, tmp_path: Path) -> None:
    """A module can be trained again, by another trainer, from where it is."""

    module = WithAdam()
    losses: list[float] = [float(module.loss(each)) for each in _one(loader(32, 32))]
    for _ in range(2):
        make_trainer(tmp_path, strategy, 2, max_epochs=4).fit(module)
        losses += [float(module.loss(each)) for each in _one(loader(32, 32))]
    assert losses[0] > losses[1] > losses[2]


def _one(batches: Any) -> Iterator[Any]:
    yield next(iter(batches))


@dataclass(frozen=True)
class NotesBeginnings(AbstractAlgorithm):
    """Local SGD that says when a step begins."""

    def resolved(self, world_size: int) -> NotesBeginnings:
        return self

    def init(self, worker: Worker) -> None:
        pass

    async def step(self, worker: Worker) -> None:
        EVENTS.append("begin")
        await Gradient()
        await LocalStep()


class NotesLoads(Samples):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        EVENTS.append("load")
        return super().__getitem__(index)


class NotesEvents(Recorder):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        EVENTS.clear()  # of the fit before, by the same workers

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["events"] = list(EVENTS)


class ChangesWeightsAtTheEnd(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        EVENTS.append("change")


class ChangesWeightsAtTheStart(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        EVENTS.append("change")


class ChangesItself(Regression):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        EVENTS.append("change")


class TakesTheIterator(Regression):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        return self.loss(next(dataloader_iter)[0])


EVENTS: list[str] = []


@pytest.mark.parametrize(
    ("module", "callback", "expected"),
    [
        (Regression, LearningRateMonitor, ["begin", "load"]),
        (Regression, ChangesWeightsAtTheEnd, ["begin", "load", "change"]),
        (Regression, ChangesWeightsAtTheStart, ["load", "change", "begin"]),
        (ChangesItself, LearningRateMonitor, ["load", "change", "begin"]),
        (TakesTheIterator, LearningRateMonitor, ["begin", "load"]),
    ],
)
def test_a_step_begins_before_its_batch_is_loaded_unless_a_hook_might_change_weights_until_then(
    module: type[Regression], callback: type[Callback], expected: list[str], tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path,
        gossip(NotesBeginnings()),
        max_epochs=2,
        callbacks=[callback(), NotesEvents(tmp_path)],
        logger=CSVLogger(tmp_path),
    )
    trainer.fit(module(), DataLoader(NotesLoads(6), batch_size=1))
    for worker in saved(tmp_path, 2):
        assert worker["events"] == expected * 6


class ClipsWeights(Callback):
    """As for a Wasserstein GAN."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.clamp_(-0.1, 0.1)


class ClipsAndWaits(ClipsWeights):
    """The same, with the exchange begun after the batch is there."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pass


@pytest.mark.parametrize("algorithm", [DPSGD(), D2(), ChocoSGD()])
def test_when_a_step_begins_changes_no_bit(algorithm: AbstractAlgorithm, tmp_path: Path) -> None:
    """With weights that change between the steps, validation within an epoch, and several epochs."""
    for name, callback in (("before", ClipsWeights()), ("after", ClipsAndWaits())):
        trainer = make_trainer(
            tmp_path,
            gossip(algorithm),
            3,
            max_epochs=2,
            val_check_interval=2,
            callbacks=[callback, Recorder(tmp_path, name)],
        )
        trainer.fit(Regression(size=48), val_dataloaders=loader(12))
    before, after = (trajectories(tmp_path, 3, name) for name in ("before", "after"))
    assert len(before) == 8
    assert before.abs().max() <= 0.1
    assert torch.equal(before, after)
