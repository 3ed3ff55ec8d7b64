"""Callbacks that look at a clock after each batch: Lightning's ask worker 0 each time, and all wait for its answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from lightning_decentral.strategies import lightning_private as private

_MOST_BATCHES = 1 << 20  # after which worker 0 is asked again


def look_at_own_clocks(trainer: Trainer) -> list[private.Undo]:
    """Let each worker look at its own clock for ``max_time``, and nobody at worker 0's: one stop then stops all.

    Returns:
        What undoes it.
    """
    return [
        private.replace_look(callback, LooksAtItsClock(callback))
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and private.looks_after_batches(callback)
    ]


def ask_rarely(trainer: Trainer, timers: bool) -> list[private.Undo]:
    """Let checkpoints by time ask worker 0 when one may be due, and not in each batch.

    For workers that make their batches together.

    Args:
        trainer: about to train.
        timers: whether ``max_time`` does so, too.

    Returns:
        What undoes it.
    """
    undo = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and private.saves_by_the_clock(callback):
            rarely = AsksRarely(callback.on_train_batch_end, partial(private.seconds_until_saved, callback))
            undo.append(private.replace(callback, "on_train_batch_end", rarely))
        if timers and isinstance(callback, Timer) and private.looks_after_batches(callback):
            rarely = AsksRarely(private.look_of(callback), callback.time_remaining)
            undo.append(private.replace_look(callback, rarely))
    return undo


def ask_where_all_meet(trainer: Trainer) -> list[private.Undo]:
    """Let checkpoints by time ask the first worker at the end of an epoch or with a validation, and in no batch.

    For workers of which nobody may wait for others in an epoch.

    Returns:
        What undoes it.
    """
    return [
        undo
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and private.saves_by_the_clock(callback)
        for undo in SavesByTheClock(callback).undo
    ]


class LooksAtItsClock:
    """In the place of what a `Timer` does after each batch: every worker looks at its own clock."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer

    def __call__(self, trainer: Trainer) -> None:
        remaining = self._timer.time_remaining()
        trainer.should_stop = trainer.should_stop or (remaining is not None and remaining <= 0)


class AsksRarely:
    """In the place of what a callback does after each batch, when all ask worker 0 whether something is due.

    Worker 0 also says after how many batches they ask again: half of those that fit into the time that is left, as fast
    as batches were so far.

    Args:
        ask: what the callback does.
        seconds_left: until something is due, by this worker's clock; none: it never is.
    """

    def __init__(self, ask: Callable[..., None], seconds_left: Callable[[], float | None]) -> None:
        self._ask, self._seconds_left = ask, seconds_left
        self._began, self._batches, self._next = time.monotonic(), 0, 1

    def __call__(self, trainer: Trainer, *arguments: Any) -> None:
        self._batches += 1
        if self._batches < self._next:
            return
        self._ask(trainer, *arguments)
        per_batch = max(time.monotonic() - self._began, 1e-6) / self._batches
        left = self._seconds_left()
        wait = _MOST_BATCHES if left is None else min(int(left / per_batch / 2), _MOST_BATCHES)
        self._next = self._batches + int(trainer.strategy.broadcast(max(1, wait)))


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
