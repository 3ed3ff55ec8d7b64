"""Settings of Lightning as users write them, and what comes of each under a strategy.

`SETTINGS` has one entry for each; `outcome` runs one. ``python tests/strategies/settings.py`` runs them all under every
strategy of the table, and under ``ddp``, and writes what came out to ``docs/concepts/lightning-settings.json``. The
table on the page is made of that. The tests run ours again and compare.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

STRATEGIES = ("dpsgd", "d2", "sync_sgd", "adpsgd", "dsp", "ddp")
RECORD = Path(__file__).parents[2] / "docs/concepts/lightning-settings.json"
WORKS = "works"


class Net(LightningModule):
    """What the settings are tried on: a small network that logs."""

    def __init__(self, hidden: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh() if hidden is None else hidden)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_stages(self) -> Any:  # for pipelines
        return self, [self.backbone, self.head]

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def data(size: int = 32, **options: Any) -> DataLoader[Any]:
    """A loader of random samples, the same in every process."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(size, 4, generator=generator), torch.randn(size, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), **{"batch_size": 4, **options})


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __iter__(self) -> Any:
        return iter(data(16).dataset)


# -- modules ----------------------------------------------------------------------------------------------------------


def net(**methods: Any) -> Callable[[], Net]:
    """`Net` with other methods."""
    return lambda: type("Net", (Net,), methods)()


def with_optimizer(make: Callable[[Any], Any]) -> Callable[[], Net]:
    """`Net` with another optimizer."""
    return net(configure_optimizers=lambda self: make(self.parameters()))


def with_schedule(make: Callable[..., Any], **config: Any) -> Callable[[], Net]:
    """`Net` with a schedule; ``make`` is given the optimizer and the module."""

    def configure_optimizers(self: Net) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer, self), **config}}

    return net(configure_optimizers=configure_optimizers)


def logging_with(**options: Any) -> Callable[[], Net]:
    """`Net` that logs in one way."""

    def training_step(self: Net, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, **options)
        return loss

    return net(training_step=training_step)


def _manual(self: Net, batch: Any, batch_idx: int) -> None:
    optimizer: Any = self.optimizers()
    optimizer.zero_grad()
    self.manual_backward(self.loss(batch))
    self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
    optimizer.step()


def _manual_every_second(self: Net, batch: Any, batch_idx: int) -> None:
    optimizer: Any = self.optimizers()
    self.manual_backward(self.loss(batch))
    if batch_idx % 2:
        optimizer.step()
        optimizer.zero_grad()


def _two(self: Net, batch: Any, batch_idx: int) -> None:
    for optimizer in self.optimizers():  # type: ignore[union-attr]
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def _two_optimizers(self: Net) -> Any:
    return [torch.optim.SGD(each.parameters(), lr=0.05) for each in (self.backbone, self.head)]


def manual(step: Callable[..., Any] = _manual, optimizers: Callable[..., Any] | None = None) -> Callable[[], Net]:
    """`Net` with manual optimization."""
    methods = {"training_step": step} | ({} if optimizers is None else {"configure_optimizers": optimizers})

    def make() -> Net:
        module = net(**methods)()
        module.automatic_optimization = False
        return module

    return make


def _gather_at_the_end(self: Net) -> None:
    self.all_gather(torch.ones(2))


def _gather_in_a_step(self: Net, batch: Any, batch_idx: int) -> Tensor:
    return self.all_gather(self.loss(batch), sync_grads=True).mean()


def _clamp(self: Net, *_: Any) -> None:
    for parameter in self.parameters():
        parameter.data = parameter.data.clamp(-0.3, 0.3)


def _skip_nan(self: Net, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
    optimizer_closure()
    if batch_idx != 1 or self.global_rank:
        optimizer.step()


def _frozen() -> Net:
    module = Net()
    module.backbone.requires_grad_(False)
    return module


def _compiled() -> Net:
    module = Net()
    module.head = torch.compile(module.head, backend="eager")  # type: ignore[assignment]
    return module


class Unfreeze(callbacks.BaseFinetuning):
    """The backbone joins at the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


def pruning(module: Net) -> Callback:
    """Prune half of the backbone's weights, once."""
    return callbacks.ModelPruning(
        "l1_unstructured", [(module.backbone[0], "weight")], amount=0.5, apply_pruning=lambda epoch: epoch == 0
    )


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Args:
        trainer: options of the ``Trainer``; a value that is called makes a new one for each run, given the module and
            the folder.
        module: makes the module.
        loader: makes the training loader.
        then: what is done after ``fit``, given what makes another trainer, the first one, the module and the folder.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    module: Callable[[], Net] = Net
    loader: Callable[[], Any] = data
    then: Callable[[Callable[..., Trainer], Trainer, Net, Path], None] | None = None


def _callback(make: Callable[..., Any], **options: Any) -> Setting:
    return Setting({"callbacks": lambda module, folder: [make(**options)], "logger": _csv})


def _bar(make: Callable[..., Any]) -> Setting:
    return Setting({"callbacks": lambda module, folder: [make()], "enable_progress_bar": True})


def _checkpoint(**options: Any) -> Setting:
    return Setting({"callbacks": lambda module, folder: [callbacks.ModelCheckpoint(dirpath=folder, **options)]})


def _csv(module: Net, folder: Path) -> CSVLogger:
    return CSVLogger(folder)


def _again(again: Callable[..., Trainer], trainer: Trainer, module: Net, folder: Path) -> None:
    again().fit(module, data(), data(8))


def _resume(again: Callable[..., Trainer], trainer: Trainer, module: Net, folder: Path) -> None:
    trainer.save_checkpoint(folder / "saved.ckpt")
    again(max_epochs=3).fit(module, data(), data(8), ckpt_path=folder / "saved.ckpt")


def _validate(again: Callable[..., Trainer], trainer: Trainer, module: Net, folder: Path) -> None:
    again().validate(module, data(8), verbose=False)


_STEP = {"interval": "step"}
SETTINGS: dict[str, Setting] = {
    **{f"precision={p!r}": Setting({"precision": p}) for p in ("32-true", "bf16-mixed", "bf16-true", "64-true")},
    **{f"max_epochs={n}": Setting({"max_epochs": n}) for n in (1, 3)},
    "max_steps=5": Setting({"max_steps": 5, "max_epochs": -1}),
    "min_epochs=2": Setting({"min_epochs": 2}),
    "min_steps=3": Setting({"min_steps": 3}),
    "max_time": Setting({"max_time": {"seconds": 60}}),
    "limit_train_batches=2": Setting({"limit_train_batches": 2}),
    "limit_train_batches=0.5": Setting({"limit_train_batches": 0.5}),
    "limit_val_batches=1": Setting({"limit_val_batches": 1}),
    "limit_val_batches=0": Setting({"limit_val_batches": 0}),
    "overfit_batches=1": Setting({"overfit_batches": 1}),
    "fast_dev_run=True": Setting({"fast_dev_run": True}),
    "fast_dev_run=2": Setting({"fast_dev_run": 2}),
    "val_check_interval=2": Setting({"val_check_interval": 2}),
    "val_check_interval=0.5": Setting({"val_check_interval": 0.5}),
    "val_check_interval as a time": Setting({"val_check_interval": datetime.timedelta(seconds=30)}),
    "check_val_every_n_epoch=2": Setting({"check_val_every_n_epoch": 2}),
    "check_val_every_n_epoch=None": Setting({"check_val_every_n_epoch": None, "val_check_interval": 3}),
    "num_sanity_val_steps=2": Setting({"num_sanity_val_steps": 2}),
    "accumulate_grad_batches=2": Setting({"accumulate_grad_batches": 2}),
    "accumulate_grad_batches=3": Setting({"accumulate_grad_batches": 3}),
    "gradient_clip_val=0.5": Setting({"gradient_clip_val": 0.5}),
    "gradient_clip_algorithm='value'": Setting({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}),
    "deterministic=True": Setting({"deterministic": True}),
    "deterministic='warn'": Setting({"deterministic": "warn"}),
    "benchmark=True": Setting({"benchmark": True}),
    "inference_mode=False": Setting({"inference_mode": False}),
    "use_distributed_sampler=False": Setting({"use_distributed_sampler": False}),
    "profiler='simple'": Setting({"profiler": "simple"}),
    "profiler='advanced'": Setting({"profiler": "advanced"}),
    "detect_anomaly=True": Setting({"detect_anomaly": True}),
    "barebones=True": Setting({"barebones": True}, module=net(log=lambda self, *a, **k: None)),
    "sync_batchnorm=True": Setting({"sync_batchnorm": True}, module=lambda: Net(nn.BatchNorm1d(6))),
    "reload_dataloaders_every_n_epochs=1": Setting({"reload_dataloaders_every_n_epochs": 1}),
    "log_every_n_steps=1": Setting({"log_every_n_steps": 1, "logger": _csv}),
    "logger=CSVLogger": Setting({"logger": _csv}),
    "logger=True": Setting({"logger": True}),
    "enable_checkpointing=True": Setting({"enable_checkpointing": True}),
    "enable_progress_bar=True": Setting({"enable_progress_bar": True}),
    "enable_model_summary=True": Setting({"enable_model_summary": True}),
    "plugins=AsyncCheckpointIO()": Setting(
        {"plugins": lambda module, folder: [AsyncCheckpointIO()], "enable_checkpointing": True}
    ),
    "devices=1": Setting({"devices": 1}),
    # callbacks
    "ModelCheckpoint(save_top_k=2, monitor)": _checkpoint(save_top_k=2, monitor="val_loss"),
    "ModelCheckpoint(save_top_k=-1)": _checkpoint(save_top_k=-1),
    "ModelCheckpoint(save_last=True)": _checkpoint(save_last=True),
    "ModelCheckpoint(save_last='link')": _checkpoint(save_last="link"),
    "ModelCheckpoint(save_weights_only=True)": _checkpoint(save_weights_only=True),
    "ModelCheckpoint(every_n_epochs=2)": _checkpoint(every_n_epochs=2),
    "ModelCheckpoint(every_n_train_steps=2)": _checkpoint(every_n_train_steps=2),
    "ModelCheckpoint(save_on_train_epoch_end=True)": _checkpoint(save_on_train_epoch_end=True),
    "ModelCheckpoint(train_time_interval=...)": _checkpoint(train_time_interval=datetime.timedelta(seconds=30)),
    "OnExceptionCheckpoint": Setting({"callbacks": lambda module, folder: [callbacks.OnExceptionCheckpoint(folder)]}),
    "EarlyStopping('val_loss')": _callback(callbacks.EarlyStopping, monitor="val_loss", patience=1),
    "EarlyStopping(check_on_train_epoch_end)": _callback(
        callbacks.EarlyStopping, monitor="val_loss", check_on_train_epoch_end=True
    ),
    "StochasticWeightAveraging": _callback(callbacks.StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=1),
    "StochasticWeightAveraging with BatchNorm": Setting(
        {"callbacks": lambda module, folder: [callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)]},
        module=lambda: Net(nn.BatchNorm1d(6)),
    ),
    "WeightAveraging": _callback(callbacks.WeightAveraging),
    "EMAWeightAveraging": _callback(callbacks.EMAWeightAveraging, decay=0.9),
    "GradientAccumulationScheduler": _callback(callbacks.GradientAccumulationScheduler, scheduling={1: 2}),
    "LearningRateMonitor": _callback(callbacks.LearningRateMonitor),
    "LearningRateFinder": Setting(
        {"callbacks": lambda module, folder: [callbacks.LearningRateFinder(num_training_steps=4)]},
        module=net(
            lr=0.05, configure_optimizers=lambda self: torch.optim.SGD(self.parameters(), lr=max(self.lr, 0.01))
        ),
    ),
    "BatchSizeFinder": Setting(
        {"callbacks": lambda module, folder: [callbacks.BatchSizeFinder(max_trials=1, steps_per_trial=1)]},
        module=net(batch_size=2, train_dataloader=lambda self: data(batch_size=self.batch_size)),
        loader=lambda: None,
    ),
    "DeviceStatsMonitor": _callback(callbacks.DeviceStatsMonitor, cpu_stats=False),
    "LambdaCallback": _callback(callbacks.LambdaCallback, on_train_epoch_end=lambda trainer, module: None),
    "ModelSummary": _callback(callbacks.ModelSummary),
    "RichProgressBar": _bar(callbacks.RichProgressBar),
    "TQDMProgressBar": _bar(callbacks.TQDMProgressBar),
    "ThroughputMonitor": _callback(
        callbacks.ThroughputMonitor, batch_size_fn=lambda batch: len(batch[0]), window_size=2
    ),
    "Timer(duration)": _callback(callbacks.Timer, duration={"seconds": 60}),
    "Timer(interval='epoch')": _callback(callbacks.Timer, duration={"seconds": 60}, interval="epoch"),
    "SpikeDetection": Setting(
        {
            "callbacks": lambda module, folder: [
                callbacks.SpikeDetection(rtol=1e6, exclude_batches_path=f"{folder}/skipped.json")
            ]
        }
    ),
    "BackboneFinetuning": _callback(
        callbacks.BackboneFinetuning, unfreeze_backbone_at_epoch=1, lambda_func=lambda e: 1
    ),
    "BaseFinetuning": _callback(Unfreeze),
    "ModelPruning": Setting({"callbacks": lambda module, folder: [pruning(module)]}),
    "Callback.on_train_batch_end that clamps": Setting(module=net(on_train_batch_end=_clamp)),
    # optimizers and schedules
    **{
        f"{name}": Setting(module=with_optimizer(make))
        for name, make in {
            "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
            "AdamW(fused=True)": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
            "AdamW(foreach=True)": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
            "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
            "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
            "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
            "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
            "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
            "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
            "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
            "two parameter groups": lambda p: torch.optim.SGD([{"params": [q], "lr": 0.01 + 0.01 * q.ndim} for q in p]),
        }.items()
    },
    "no optimizer": Setting(module=net(configure_optimizers=lambda self: None)),
    "StepLR by epochs": Setting(module=with_schedule(lambda o, m: lr_scheduler.StepLR(o, 1))),
    "StepLR by steps": Setting(module=with_schedule(lambda o, m: lr_scheduler.StepLR(o, 2), **_STEP)),
    "CosineAnnealingLR(estimated_stepping_batches)": Setting(
        module=with_schedule(
            lambda o, m: lr_scheduler.CosineAnnealingLR(o, int(m.trainer.estimated_stepping_batches)), **_STEP
        )
    ),
    "OneCycleLR(estimated_stepping_batches)": Setting(
        module=with_schedule(
            lambda o, m: lr_scheduler.OneCycleLR(o, 0.1, total_steps=int(m.trainer.estimated_stepping_batches)), **_STEP
        )
    ),
    "ReduceLROnPlateau": Setting(
        module=with_schedule(lambda o, m: lr_scheduler.ReduceLROnPlateau(o), monitor="val_loss")
    ),
    "SequentialLR": Setting(
        module=with_schedule(
            lambda o, m: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.StepLR(o, 2)], milestones=[2]
            ),
            **_STEP,
        )
    ),
    "manual optimization": Setting(module=manual()),
    "manual optimization, a step every second batch": Setting(module=manual(_manual_every_second)),
    "manual optimization, two optimizers": Setting(module=manual(_two, _two_optimizers)),
    "manual optimization, two optimizers of one model": Setting(
        module=manual(_two, lambda self: [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)])
    ),
    "optimizer_step that leaves updates out": Setting(module=net(optimizer_step=_skip_nan)),
    "configure_gradient_clipping": Setting(
        {"gradient_clip_val": 0.1},
        module=net(
            configure_gradient_clipping=lambda self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None: (
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            )
        ),
    ),
    # logging and collectives
    "log(on_step=True)": Setting({"logger": _csv}, module=logging_with(on_step=True)),
    "log(on_epoch=True)": Setting({"logger": _csv}, module=logging_with(on_epoch=True)),
    "log(on_epoch=True, sync_dist=True)": Setting(module=logging_with(on_step=False, on_epoch=True, sync_dist=True)),
    "log(on_step=True, sync_dist=True)": Setting(module=logging_with(on_step=True, sync_dist=True)),
    "log(reduce_fx='sum', sync_dist=True)": Setting(
        module=logging_with(on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
    ),
    "log(rank_zero_only=True)": Setting(module=logging_with(rank_zero_only=True)),
    "log(prog_bar=True)": Setting({"enable_progress_bar": True}, module=logging_with(prog_bar=True)),
    "all_gather at the end of the epoch": Setting(module=net(on_train_epoch_end=_gather_at_the_end)),
    "all_gather in the step": Setting(module=net(training_step=_gather_in_a_step)),
    "trainer.strategy.barrier() at the end of the epoch": Setting(
        module=net(on_train_epoch_end=lambda self: self.trainer.strategy.barrier())
    ),
    # models and data
    "BatchNorm": Setting(module=lambda: Net(nn.BatchNorm1d(6))),
    "Dropout": Setting(module=lambda: Net(nn.Dropout(0.5))),
    "a frozen backbone": Setting(module=_frozen),
    "torch.compile of a submodule": Setting(module=_compiled),
    "weight_norm": Setting(module=lambda: Net(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))),
    "spectral_norm": Setting(module=lambda: Net(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))),
    "IterableDataset": Setting(loader=lambda: DataLoader(Stream(), batch_size=4)),
    "num_workers=1": Setting(loader=lambda: data(num_workers=1)),
    "persistent_workers=True": Setting(loader=lambda: data(num_workers=1, persistent_workers=True)),
    "shuffle=True": Setting(loader=lambda: data(shuffle=True)),
    "drop_last=True": Setting(loader=lambda: data(30, drop_last=True)),
    "a last batch that is smaller": Setting(loader=lambda: data(30)),
    "a sampler of one's own": Setting(
        loader=lambda: DataLoader(data().dataset, batch_size=4, sampler=RandomSampler(data().dataset))  # type: ignore[arg-type]
    ),
    "several loaders": Setting(
        module=net(training_step=lambda self, batch, batch_idx: self.loss(batch["a"]) + self.loss(batch["b"])),
        loader=lambda: {"a": data(), "b": data(24)},
    ),
    # other entry points
    "validate after fit": Setting(then=_validate),
    "fit after fit": Setting(then=_again),
    "fit(ckpt_path=...) after fit": Setting(then=_resume),
}


def outcome(setting: Setting, strategy: str, folder: Path, launch: str = "_fork") -> str:
    """What a setting does under a strategy: ``"works"``, or the kind of error and its last line.

    The workers are forked, unless ``launch`` is empty: then this is one of them.
    """
    module = setting.module()
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": strategy + launch,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    made = {
        key: value(module, folder) if callable(value) and key != "profiler" else value
        for key, value in setting.trainer.items()
    }
    if setting.trainer.get("barebones"):
        options = {key: options[key] for key in ("accelerator", "devices", "strategy", "max_epochs")}
    if any(isinstance(each, callbacks.Checkpoint) for each in made.get("callbacks", ())):
        options["enable_checkpointing"] = True
    start = [parameter.detach().clone() for parameter in module.parameters()]
    try:
        trainer = Trainer(**{**options, **made})
        trainer.fit(module, setting.loader(), None if setting.trainer.get("barebones") else data(8))
        if setting.then is not None:
            setting.then(lambda **others: Trainer(**{**options, **made, **others}), trainer, module, folder)
    except Exception as error:
        return _words(error)
    if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        return "not finite"
    same = all(
        torch.equal(one.double(), two.detach().double()) for one, two in zip(start, module.parameters(), strict=False)
    )
    learns = any(each.param_groups for each in trainer.optimizers) and not setting.trainer.get("fast_dev_run")
    return "nothing was learnt" if same and learns else WORKS


def outcome_on_a_worker(rank: int, name: str, strategy: str, folder: Path) -> str:
    """What a setting does on one of two workers that have been started."""
    os.chdir(folder)
    return outcome(SETTINGS[name], strategy, folder, launch="")


def _words(error: Exception) -> str:
    """The kind and the words of an error, without what differs from run to run."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = r"(?:\w+\.)*(\w+(?:Error|Exception|Lost|Failed): .*)"
    matches = [match for line in lines if (match := re.fullmatch(said, line))]
    return matches[-1][1] if matches else f"{type(error).__name__}: {' '.join(lines)}"


def main() -> None:
    """Run every setting under every strategy, or those that are named, and write the record."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    record: dict[str, dict[str, str]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, setting in SETTINGS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        record[name] = {}
        for strategy in STRATEGIES:
            with tempfile.TemporaryDirectory() as folder:
                record[name][strategy] = outcome(setting, strategy, Path(folder))
        print(name, record[name], flush=True)
        RECORD.write_text(json.dumps({name: record[name] for name in SETTINGS if name in record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
