"""Checkpoints by time where nobody may wait for others in an epoch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_decentral.strategies import lightning_private as private


class SavesByTheClock:
    """Lets a `ModelCheckpoint` with ``train_time_interval`` look at the clock where all workers meet.

    It asks the first worker after each batch whether it is time, so that all would wait for each other. Here it asks
    where it would save an epoch's checkpoint: at the end of the epoch, or with each validation.

    Args:
        callback: it, of a trainer that fits.

    Attributes:
        undo: let the callback be what it was.
    """

    def __init__(self, callback: ModelCheckpoint) -> None:
        self._callback = callback
        self._look, self._end_epoch = callback.on_train_batch_end, callback.on_train_epoch_end
        self.undo: list[private.Undo] = [
            private.replace(callback, "on_train_batch_end", lambda *_: None),
            private.replace(callback, "on_validation_start", self._before_validation),
            private.replace(callback, "on_train_epoch_end", self._after_epoch),
        ]

    def _before_validation(self, trainer: Trainer, module: Any) -> None:
        if not trainer.sanity_checking and not private.saves_after_epochs(self._callback, trainer):
            self._ask(trainer, module)  # it saves after the validation, if what it monitors comes of that

    def _after_epoch(self, trainer: Trainer, module: Any) -> None:
        if private.saves_after_epochs(self._callback, trainer):
            self._ask(trainer, module)
        self._end_epoch(trainer, module)

    def _ask(self, trainer: Trainer, module: Any) -> None:
        self._look(trainer, module, None, None, trainer.fit_loop.epoch_loop.batch_idx)
