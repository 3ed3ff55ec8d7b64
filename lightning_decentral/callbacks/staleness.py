"""How old a gradient is when it is applied."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral.strategies import AsyncStrategy, SimulatedStrategy


class Staleness(Callback):
    """Logs the staleness of an asynchronous algorithm's gradients.

    Staleness is the number of versions by which a worker's parameters advanced, through calls of other workers, between
    the snapshot at which a gradient was taken and its update. ``staleness`` is that of worker 0's last step;
    ``staleness/mean`` and ``staleness/max``, at the end of an epoch, are over the epoch's steps of worker 0.

    Example:
        >>> callback = Staleness()
    """

    def __init__(self) -> None:
        self._sum, self._count, self._max = 0, 0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, (AsyncStrategy, SimulatedStrategy)):
            staleness = strategy.staleness
            self._sum, self._count, self._max = self._sum + staleness, self._count + 1, max(self._max, staleness)
            self.log("staleness", float(staleness), prog_bar=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._count:
            self.log("staleness/mean", self._sum / self._count, rank_zero_only=True)
            self.log("staleness/max", float(self._max), rank_zero_only=True)
        self._sum, self._count, self._max = 0, 0, 0
