"""This package, and Lightning alone, through Lightning's `Trainer` as a user would: nothing is called but `fit`.

The Trainer is made with ``barebones=True``, Lightning's own setting for measurements: no logger, checkpoints, bar.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_decentral.algorithms import (
    APSGD,
    BMUF,
    DPSGD,
    SGP,
    BackupWorkers,
    ChocoSGD,
    DiLoCo,
    EagerDiLoCo,
    MoniquaSGD,
    NoLoCo,
    SlowMo,
    SparseLoCo,
    StreamingDiLoCo,
)
from lightning_decentral.callbacks import GradientCompression
from lightning_decentral.compression import FP4, ScaledSign
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench.record import Recorder
from lightning_decentral.lab.bench.task import PERIOD, STREAMING_DELAY, STREAMING_PERIOD, Batch, Task, flat_parameters
from lightning_decentral.methods import METHODS
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep
from lightning_decentral.strategies import AsyncStrategy, GossipStrategy
from lightning_decentral.topology import from_name
from lightning_decentral.worker import Worker

_DPSGD = {
    "dpsgd_ring": "ring",
    "dpsgd_matching": "hypercube_matching",
    "dpsgd_alternating": "alternating_matching",
    "dpsgd_sites": "sites",
}
"""The graphs of D-PSGD, by the name of the contender."""

_SERVED: dict[str, AbstractAlgorithm] = {"apsgd_4_servers": APSGD(shards=4), "backup_workers_6": BackupWorkers(6)}
"""Methods with a server and other options than by default, by the name of the contender."""

_COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp_cast": ("cast", {"dtype": "float16", "error_feedback": False}),  # as torch's hook
    "ddp_low_rank": ("powersgd", {"rank": 1}),  # likewise
    "ddp_int8": ("int8", {}),
    "ddp_scaled_sign": ("scaled_sign", {}),
    "ddp_topk": ("topk", {}),  # 1 %
}
"""The compressors of DDP, and their options, by the name of the contender."""


@dataclass(frozen=True)
class NoCommunication(AbstractAlgorithm):
    """The same loop with no communication at all."""

    def resolved(self, world_size: int) -> NoCommunication:
        return self

    def init(self, worker: Worker) -> None:
        pass

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()


class Module(LightningModule):
    """The model of a task."""

    def __init__(self, task: Task, rank: int) -> None:
        super().__init__()
        self.task = task
        self.network = task.model(rank)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the task's."""
        return self.task.optimizer(self.parameters())


class Batches(IterableDataset[Batch]):
    """This worker's batches, as long as the recorder has not seen enough."""

    def __init__(self, task: Task, recorder: Recorder) -> None:
        self.task, self.recorder = task, recorder

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        while self.recorder.more:
            yield self.task.batch(self.recorder.rank, self.recorder.world_size, step)
            step += 1


class Record(Callback):
    """Notes the steps, and ends the training when the recorder has seen enough.

    Args:
        recorder: of this worker.
        together: whether all workers stop after the same step. Otherwise, a stop of one would stop the others before
            they have made their steps: a worker ends with its batches, of which the loop has loaded one ahead.
    """

    def __init__(self, recorder: Recorder, together: bool) -> None:
        self.recorder, self.together = recorder, together

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Learn that a step begins."""
        if not self.recorder.more:
            return
        if self.recorder.meets_next and isinstance(trainer.strategy, AsyncStrategy):
            trainer.strategy.quiesce("the end of the warm-up")  # or some would wait for answers that need the others
        self.recorder.begin_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn that a step has ended."""
        if self.recorder.more:
            self.recorder.end_step(outputs["loss"])
        if self.together and not self.recorder.more:
            trainer.should_stop = True


def run(task: Task, recorder: Recorder, options: Mapping[str, str]) -> None:
    """Train one worker with ``options["strategy"]``."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # that a loader could have more processes, and the like
    module = Module(task, recorder.rank)
    trainer = Trainer(
        strategy=_strategy(options["strategy"], recorder.world_size),
        accelerator="cpu",
        devices=1,
        num_nodes=recorder.world_size,
        max_epochs=1,
        barebones=True,
        use_distributed_sampler=False,
        callbacks=[*_compression(options["strategy"]), Record(recorder, not _is_asynchronous(options["strategy"]))],
    )
    trainer.fit(module, DataLoader(Batches(task, recorder), batch_size=None))
    recorder.finish(flat_parameters(module))


def _compression(name: str) -> list[Callback]:
    if name not in _COMPRESSED:
        return []
    compressor, options = _COMPRESSED[name]
    return [GradientCompression(compressor, **options)]


def _strategy(name: str, workers: int) -> Strategy:
    if name == "ddp" or name in _COMPRESSED:
        return DDPStrategy()
    algorithm: Any = algorithm_of(name, workers)
    if _is_asynchronous(name):
        return AsyncStrategy(algorithm, share_epoch=False, average_at_end=False)
    return GossipStrategy(algorithm, average_at_end=False)


def algorithm_of(name: str, workers: int) -> AbstractAlgorithm:
    """Return what a contender races with.

    Args:
        name: of its strategy, which is not DDP.
        workers: how many.

    Raises:
        ConfigurationError: if there is no such strategy.
    """
    if name in _SERVED:
        return _SERVED[name]
    if name in _DPSGD:
        return DPSGD(from_name(_DPSGD[name], workers))
    algorithms: dict[str, AbstractAlgorithm] = {
        "none": NoCommunication(),
        "moniqua_sgd": MoniquaSGD(theta=0.25),
        "sgp_overlap": SGP(overlap=1),
        "choco_sgd_sign": ChocoSGD(compressor=ScaledSign(), consensus_step_size=0.45),
        # Rounds as long as those of the other packages.
        "slowmo": SlowMo(PERIOD),
        "bmuf": BMUF(PERIOD),
        "diloco": DiLoCo(PERIOD),
        "diloco_32": DiLoCo(STREAMING_PERIOD),
        "streaming_diloco": StreamingDiLoCo(PERIOD, fragments=4, delay=1),
        "streaming_diloco_32": StreamingDiLoCo(STREAMING_PERIOD, fragments=2, delay=STREAMING_DELAY),
        "streaming_diloco_32_fp4": StreamingDiLoCo(
            STREAMING_PERIOD, fragments=2, delay=STREAMING_DELAY, compressor=FP4()
        ),
        "eager_diloco": EagerDiLoCo(PERIOD),
        "sparseloco": SparseLoCo(PERIOD),
        "noloco": NoLoCo(every=PERIOD),
    }
    if name not in algorithms and name not in METHODS:
        known = ", ".join(dict.fromkeys(("ddp", *_COMPRESSED, *METHODS, *_SERVED, *_DPSGD, *algorithms)))
        raise ConfigurationError(f"Got the strategy {name!r}, need one of {known}.")
    return algorithms.get(name) or METHODS[name].load()()


def _is_asynchronous(name: str) -> bool:
    return name in _SERVED or (name in METHODS and METHODS[name].asynchronous)
