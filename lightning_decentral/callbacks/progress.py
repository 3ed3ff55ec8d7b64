"""What to compare runs by: seconds, batches and bytes at every validation."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral.callbacks.communication import bytes_sent


class Progress(Callback):
    """Logs, at every validation, how far the whole run is, so that strategies can be compared at equal cost.

    * ``progress/seconds``: since training began, of the slowest worker, validations not counted;
    * ``progress/batches``: of all workers together;
    * ``progress/megabytes``: sent by all workers together, in 10^6 bytes of payload.

    Example:
        >>> callback = Progress()
    """

    def __init__(self) -> None:
        self._seconds, self._batches, self._since = 0.0, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The strategy has averaged the models by now: waiting for the slowest worker is part of training.
        if not trainer.sanity_checking:
            self._seconds += time.perf_counter() - self._since

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        mine = [float(self._batches), bytes_sent(trainer, pl_module) / 1e6]
        total = torch.tensor(mine, dtype=torch.float64, device=pl_module.device)
        total = trainer.strategy.reduce(total, reduce_op="sum")
        seconds = torch.tensor(self._seconds, dtype=torch.float64, device=pl_module.device)
        seconds = trainer.strategy.reduce(seconds, reduce_op="max")
        values = {"seconds": float(seconds), "batches": float(total[0]), "megabytes": float(total[1])}
        self.log_dict({f"progress/{name}": value for name, value in values.items()}, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
