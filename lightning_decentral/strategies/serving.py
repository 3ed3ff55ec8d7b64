"""The epochs of a worker that serves only, in Lightning's loop: it has no batches, and counts those of the others.

It counts as a worker of average speed would, so that schedules, progress bars and checkpoints are those of one: a batch
for as many gradients as there are workers that train.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.loops import count_batches, count_updates, only_resumes_validation, step_schedules

_SHOW_BATCHES = (ProgressBar, LearningRateMonitor)  # callbacks that look at the counts of batches, and at no batch


def trainers_of(algorithm: AbstractAlgorithm, size: int) -> list[int]:
    """Tell which workers train, by rank.

    Args:
        algorithm: resolved.
        size: how many workers there are.
    """
    return [rank for rank in range(size) if algorithm.trains(rank)]


def refuse_what_needs_batches(algorithm: AbstractAlgorithm, module: LightningModule) -> None:
    """Refuse, before training, user code that a worker without batches would have to call in each.

    Raises:
        ConfigurationError: if there is any.
    """
    if is_overridden("optimizer_step", module):
        raise ConfigurationError(
            f"{type(algorithm).__name__} got an `optimizer_step` of {type(module).__name__}, which Lightning calls in "
            "batches, and the worker that makes the updates has none. Let a schedule or `on_before_optimizer_step` do "
            "it, or leave server='dedicated' out: worker 0 trains beside serving then."
        )


class NoBatches:
    """A loader without batches that is as long as the others': counts and schedules follow from that.

    Args:
        loader: of the others; those refuse one that has no length.
    """

    def __init__(self, loader: Any) -> None:
        try:
            self._length = len(loader)
        except TypeError:
            self._length = 1

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class ServedEpochs:
    """Lets a worker of a `Trainer` serve in its epochs.

    Args:
        trainer: in training.
        trainers: how many workers train.
        begin: is called at the beginning of each epoch.
        answered: tells how many gradients have been received so far.
        serve: makes steps until those that train have come to their end, and calls what it is given after each.
        end: meets the others there.
    """

    def __init__(
        self,
        trainer: Trainer,
        trainers: int,
        begin: Callable[[], None],
        answered: Callable[[], int],
        serve: Callable[[Callable[[], None]], None],
        end: Callable[[], None],
    ) -> None:
        self._trainer, self._trainers = trainer, trainers
        self._begin, self._answered, self._serve, self._end = begin, answered, serve, end
        self._loop = trainer.fit_loop.epoch_loop
        self._make_batch = self._loop.advance
        self._replaced = [private.replace(self._loop, "advance", self._make_epoch)]
        trainer.val_check_batch = float("inf")  # validate after the last batch

    def close(self) -> None:
        """Leave the loop as it was."""
        for undo in self._replaced:
            undo()

    def _make_epoch(self, fetcher: Any) -> None:
        """Lightning makes a batch: it is all that are left of this epoch."""
        trainer, loop = self._trainer, self._loop
        trainer.val_check_batch = float("inf")
        if only_resumes_validation(trainer, fetcher):
            self._make_batch(fetcher)
            return
        self._begin()
        share = int(trainer.num_training_batches)
        made = before = loop.batch_progress.current.ready
        received = self._answered()

        def follow(last: bool = False) -> None:
            nonlocal made
            batches = (self._answered() - received) * trainer.accumulate_grad_batches // self._trainers
            now = share if last else min(share - 1, before + batches)
            if now > made:
                self._count(made, now)
                made = now

        self._serve(follow)
        self._end()
        loop.batch_progress.is_last_batch = True
        follow(last=True)
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)

    def _count(self, before: int, now: int) -> None:
        """Count batches of a worker of average speed, with the updates and schedules that follow from them."""
        trainer, loop = self._trainer, self._loop
        every, share = trainer.accumulate_grad_batches, int(trainer.num_training_batches)
        count_batches(loop, now)
        updates = now // every - before // every + (now == share and share % every > 0)
        count_updates(trainer, updates)
        private.count_logged_steps(trainer, updates - (now == share))  # Lightning counts the last one of an epoch
        step_schedules(trainer, before, now)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, _SHOW_BATCHES):
                callback.on_train_batch_start(trainer, trainer.lightning_module, None, now - 1)
                callback.on_train_batch_end(trainer, trainer.lightning_module, None, None, now - 1)


@contextmanager
def shared_names(
    results: Any, module: LightningModule, trains: bool, gather: Callable[[bytes], Sequence[bytes]]
) -> Iterator[None]:
    """Let the values of an epoch, if they are read under this, be the means over the workers that train. All together.

    A worker without batches has logged nothing in them: it gets the same names, and adds nothing to their means.

    Args:
        results: what was logged in this loop.
        module: has the metrics.
        trains: whether this worker has batches.
        gather: what every worker passes.
    """
    own, single = {}, []
    for key, result in results.items():
        meta = result.meta
        if trains and meta.on_epoch and not result.has_reset and not meta.sync.rank_zero_only:
            options = {name: getattr(meta, name) for name in ("prog_bar", "logger", "on_step", "add_dataloader_idx")}
            own[key] = [meta.fx, meta.name, meta.reduce_fx.__name__, meta.metric_attribute, options]
            if not meta.sync.should:
                single.append(meta.sync)
                meta.sync.should = True
    tables = [json.loads(each) for each in gather(json.dumps(own).encode())]
    logged = {} if trains else {key: value for table in tables for key, value in table.items()}
    for key, (fx, name, reduction, attribute, options) in logged.items():
        if key not in results:
            value: Any = operator.attrgetter(attribute)(module) if attribute else torch.zeros((), device=module.device)
            reduce, reduce_fx = module.trainer.strategy.reduce, getattr(torch, reduction)
            results.log(fx, name, value, reduce_fx=reduce_fx, sync_dist_fn=reduce, batch_size=1, **options)
        results[key].reset()
        results[key].has_reset = False  # what was reset is not reduced
        results[key].meta.sync.should = True
    try:
        yield
    finally:
        for sync in single:  # or what is logged in the next epoch would be something else
            sync.should = False
