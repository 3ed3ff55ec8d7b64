"""One worker stops, so all stop: in the same epoch, though each is somewhere else in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.clocks import look_at_own_clocks
from lightning_decentral.transport.liveness import Watch

_CLOSED = 1 << 40  # more than any count of workers or batches


class JointStop:
    """Lets ``trainer.should_stop`` of one worker stop all of them after the same epoch.

    Whoever leaves an epoch counts itself in the store that all share. A worker that stops closes this count: if nobody
    had left, that epoch is the last one for all; otherwise the worker goes on and tries the next one. Nobody waits.

    Args:
        trainer: in training.
        watch: sees the stop of another worker soon; its store is where the workers agree.
        run: counts the runs of the loop: a search for a learning rate may come before training.
        end_early: is called after the batch that a worker stops with, before the validation.
        whole_epochs: whether an epoch that a worker stops in goes on to its end: somebody serves in it, and has no
            batches after which it could stop.
    """

    def __init__(
        self, trainer: Trainer, watch: Watch, run: int, end_early: Callable[[], None], whole_epochs: bool = False
    ) -> None:
        self._end_early = end_early
        self._trainer, self._watch, self._whole_epochs = trainer, watch, whole_epochs
        self._stop, self._left, self._ended = f"stop/{run}", f"left/{run}", f"ended/{run}"
        self._seen = False
        watch.listener = self._look
        self._last_epoch: int | None = None
        self._loop = trainer.fit_loop.epoch_loop
        self._finish_batch, self._finish_epoch = self._loop.on_advance_end, trainer.fit_loop.on_advance_end
        self._replaced = [
            private.replace(self._loop, "on_advance_end", self._after_batch),
            private.replace(trainer.fit_loop, "on_advance_end", self._after_epoch),
        ]
        self._replaced += look_at_own_clocks(trainer)

    def close(self) -> None:
        """Leave loop and callbacks as they were."""
        self._watch.listener = None
        for undo in self._replaced:
            undo()

    def request(self) -> None:
        """Tell the others if this worker stops."""
        trainer = self._trainer
        if self._last_epoch is None and trainer.should_stop:
            self._agree(max(trainer.current_epoch, (trainer.fit_loop.min_epochs or 0) - 1))

    def _agree(self, last: int) -> None:
        """Find the first epoch from ``last`` on that nobody has left."""
        store = self._watch.store
        while store.add(f"{self._left}/{last}", _CLOSED) % _CLOSED:
            last += 1
        self._last_epoch = int(store.compare_set(self._stop, "", str(last)))

    def follow(self, ask: bool = False) -> None:
        """Stop if another worker has.

        Args:
            ask: whether to ask the store, after all have met; otherwise it is noticed within a second.
        """
        store = self._watch.store
        if self._last_epoch is None and (self._seen or (ask and store.check([self._stop]))):
            self._last_epoch = int(store.get(self._stop))
        if self._last_epoch is not None:
            self._trainer.should_stop = self._trainer.current_epoch >= self._last_epoch

    def _look(self, store: Any) -> None:
        """Look several times a second, on the thread of the heartbeat."""
        self._seen = self._seen or store.check([self._stop])

    def _after_batch(self, data_fetcher: Any) -> None:
        """Learn that a batch is done; what follows is the validation, if all validate now."""
        self.request()
        self.follow()  # here: whoever stops validates before it leaves the epoch
        if self._whole_epochs and not self._loop.batch_progress.is_last_batch:
            self._trainer.should_stop = False
        if self._trainer.should_stop and private.can_stop_early(self._trainer):
            self._end_early()
        self._finish_batch(data_fetcher)
        if self._trainer.should_stop:
            self.request()
            self.follow()
        if self._loop.done and self._watch.store.add(f"{self._left}/{self._trainer.current_epoch}", 1) > _CLOSED:
            self._last_epoch = int(self._watch.store.get(self._stop))  # its worker may be just about to set it
            self.follow()

    def _after_epoch(self) -> None:
        """Learn that an epoch's last hooks were called. Whoever stops there alone cannot know who has begun another."""
        self._finish_epoch()
        trainer, store = self._trainer, self._watch.store
        progress: Any = trainer.fit_loop.epoch_progress
        epoch = progress.current.processed - 1
        if self._last_epoch is not None:
            trainer.should_stop = trainer.should_stop or epoch >= self._last_epoch
            return
        stops = trainer.should_stop and private.can_stop_early(trainer)
        ended = store.add(f"{self._ended}/{epoch}", 1 + _CLOSED * stops)
        while stops and ended % _CLOSED < trainer.world_size:
            if self._watch.failure is not None:
                raise self._watch.failure
            time.sleep(0.005)
            ended = store.add(f"{self._ended}/{epoch}", 0)
        if stops and ended // _CLOSED < trainer.world_size:  # not all: go on for a batch, where the others notice
            trainer.should_stop = False
            self._agree(epoch + 1)
