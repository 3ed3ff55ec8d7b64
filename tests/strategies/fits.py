"""Small models, data and trainers. Workers are forked: a fit takes about a second, and results come back as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from helpers.waiting import wait_until
from helpers.workers import kept_workers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from reference.quadratic import Quadratic
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_decentral import AsyncStrategy, GossipStrategy
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.transport import shared_memory

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


def make_trainer(folder: Path, strategy: str | Strategy, devices: int = 2, **options: Any) -> Trainer:
    """A trainer that prints and writes nothing unless asked to."""
    return Trainer(**{**QUIET, "default_root_dir": folder, "strategy": strategy, "devices": devices, **options})


def gossip(algorithm: AbstractAlgorithm | None = None, **options: Any) -> GossipStrategy:
    """A gossip strategy whose workers are forked, and who give up within a minute."""
    return GossipStrategy(algorithm, start_method="fork", **{"exchange_timeout_seconds": 60.0, **options})


def asynchronous(algorithm: AbstractAlgorithm | None = None, **options: Any) -> AsyncStrategy:
    """An asynchronous strategy whose workers are forked, and who give up within a minute."""
    return AsyncStrategy(algorithm, start_method="fork", **{"exchange_timeout_seconds": 60.0, **options})


_OF_A_FIT = ("datamodule", "ckpt_path", "weights_only")


def fit_kept(
    folder: Path, strategy: str | Strategy, workers: int, module: LightningModule, hosts: int = 0, **options: Any
) -> None:
    """Fit with workers that are kept from test to test, for less than half of what forking them costs.

    Args:
        folder: of the run; its files and the module's state on worker 0 are all that comes back.
        strategy: one that starts no worker, neither by its name nor by ``start_method``. It is pickled, and so are the
            module and the options.
        workers: how many.
        module: is trained.
        hosts: among which the workers are divided, in the order of their ranks; 0: this machine is one.
        options: of the trainer, and a ``datamodule``, ``ckpt_path`` or ``weights_only`` of its fit.
    """
    options |= {"folder": folder, "strategy": strategy, "devices": workers}
    states = kept_workers(workers).run(_fit, options, module, hosts)
    module.load_state_dict(states[0])


def _fit(rank: int, options: dict[str, Any], module: LightningModule, hosts: int) -> dict[str, Any]:
    given = {name: options.pop(name) for name in _OF_A_FIT if name in options}
    with pytest.MonkeyPatch.context() as patch:
        if hosts:
            workers = options["devices"]
            patch.setattr(shared_memory, "host_name", lambda: f"host {rank * hosts // workers}")
        make_trainer(**options).fit(module, **given)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Indices(Dataset[int]):
    """A data set of numbers that name themselves."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Random inputs and targets, the same in every process; a larger set begins with a smaller one. Up to 4096."""

    def __init__(self, size: int = 32, shape: Sequence[int] = (4,), dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(11)
        inputs = torch.randn((4096, *shape), generator=generator, dtype=torch.float64)
        targets = torch.randn((4096, 1), generator=generator, dtype=torch.float64)
        self.inputs, self.targets = inputs[:size].to(dtype), targets[:size].to(dtype)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


def loader(size: int = 32, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    """A loader of `Samples`."""
    shape, dtype = options.pop("shape", (4,)), options.pop("dtype", torch.float64)
    return DataLoader(Samples(size, shape, dtype), batch_size=batch_size, **options)


class QuadraticModule(LightningModule):
    """Every worker minimizes its own quadratic with full gradients; the batch only counts steps."""

    def __init__(self, quadratic: Quadratic, rate: Callable[[int], float]) -> None:
        super().__init__()
        self.quadratic, self.rate = quadratic, rate
        self.x = nn.Parameter(quadratic.start[0].clone())

    def training_step(self, batch: Tensor) -> Tensor:
        a, b = self.quadratic.a[self.global_rank], self.quadratic.b[self.global_rank]
        return (a * (self.x - b) ** 2).sum() / 2

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices(4096), batch_size=1)


class Regression(LightningModule):
    """A small network in double precision, with momentum; made in the parent, so equal on all forked workers."""

    def __init__(
        self, network: nn.Module | None = None, learning_rate: float = 0.05, momentum: float = 0.9, size: int = 32
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network = (
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double() if network is None else network
        )
        self.learning_rate, self.momentum, self.size = learning_rate, momentum, size

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def training_step(self, batch: Any) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=self.momentum)

    def train_dataloader(self) -> DataLoader[Any]:
        dtypes = {parameter.dtype for parameter in self.parameters()}
        return loader(self.size, dtype=torch.float64 if torch.float64 in dtypes else torch.float32)


class Recorder(Callback):
    """Each worker writes what it saw, when training ends: its own weights after every batch, and anything more."""

    def __init__(self, folder: Path, name: str = "worker") -> None:
        self.folder, self.name = folder, name
        self.kept: dict[str, Any] = {"weights": []}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.kept["weights"].append(flat(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.keep(trainer, pl_module)
        strategy = trainer.strategy
        if isinstance(strategy, AsyncStrategy):
            strategy.quiesce()  # a slower worker may still call, and each call moves the weights that are copied below
        traffic = strategy.traffic if isinstance(strategy, (GossipStrategy, AsyncStrategy)) else None
        if traffic is not None:
            self.kept["traffic"] = (traffic.bytes_sent, traffic.messages, traffic.exchanges)
        self.kept["state"] = {key: value.detach().clone() for key, value in pl_module.state_dict().items()}
        self.kept["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.kept["global_step"] = trainer.global_step
        torch.save(self.kept, self.folder / f"{self.name}-{trainer.global_rank}.pt")

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add to `kept`; for subclasses."""


class Abreast(Callback):
    """Asynchronous workers meet after every so many steps, so that none has made all of its own before another begins.

    For tests of what comes of the averages of all: a worker that comes late finds nobody who has still to call.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(trainer.strategy, AsyncStrategy) and (batch_idx + 1) % self.every_n_steps == 0:
            trainer.strategy.quiesce()


class OneLongGradient(Callback):
    """One worker's first gradient: begun before any step of the others, done when these have made so many.

    So nothing depends on how fast the machine is. If the others waited for this worker in a step, it would wait for
    ever, and gives up after a minute. Workers tell each other by a file in the run's folder, of a byte for each step.
    """

    def __init__(self, rank: int, steps_of_others: int) -> None:
        self.rank, self.steps_of_others, self.name = rank, steps_of_others, f"steps of the others {uuid4()}"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_rank != self.rank:
            wait_until(self._file(trainer).exists, f"worker {self.rank} has begun no gradient")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        file = self._file(trainer)
        if trainer.global_rank == self.rank and not file.exists():
            file.touch()
            wait_until(lambda: file.stat().st_size >= self.steps_of_others, "the others wait in their steps")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_rank != self.rank:
            with open(self._file(trainer), "ab") as file:
                file.write(b".")

    def _file(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.name


class Remembered(Recorder):
    """Also what the algorithm remembers, of one vector each, at the beginning and the end; leaves ``end.ckpt``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("first", trainer)

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("last", trainer)
        trainer.save_checkpoint(self.folder / "end.ckpt")

    def note(self, when: str, trainer: Trainer) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, GossipStrategy)
        (stepper,) = strategy._steppers
        state = {name: vector.buffers[0].clone() for name, vector in stepper.worker.state.items()}
        self.kept[when] = {"x": stepper.x.buffers[0].clone(), "step": stepper.worker.step, **state}


def saved(folder: Path, workers: int, name: str = "worker") -> list[dict[str, Any]]:
    """What the recorders of all workers wrote, by rank."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(workers)]


def flat(module: nn.Module) -> Tensor:
    """All parameters, in a copy."""
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in module.parameters()])


def trajectories(folder: Path, workers: int, name: str = "worker") -> Tensor:
    """The recorded weights, [steps, workers, parameters]."""
    return torch.stack([torch.stack(each["weights"]) for each in saved(folder, workers, name)], dim=1)
