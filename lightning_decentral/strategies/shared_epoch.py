"""One epoch of data for workers of unequal speed: whoever is free takes the next batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.claims_ahead import ClaimsAhead
from lightning_decentral.strategies.loops import step_schedules


class SharedEpochSampler(Sampler[int]):
    """Indices of the batches that this worker takes from an epoch that all workers share.

    All workers draw the same permutation; batch ``k`` of it belongs to whoever claims ``k`` first. The first
    ``world_size`` batches go to one worker each, so that nobody has an empty epoch.

    Args:
        size: samples in the data set.
        batch_size: samples in a batch of one worker.
        drop_last: whether a last, smaller batch is left out.
        shuffle: whether the samples are permuted in each epoch.
        seed: of the permutation, the same on all workers.
        rank: this worker.
        claim: the next unclaimed batch number of an epoch, counted from 0 by all workers together; it is given how
            many there are to claim.
        begin: told of the beginning of each epoch.

    Attributes:
        taken: the numbers of the batches that this worker has taken in this epoch, in order.
        skip: batches at the beginning of the next epoch that were used before this run.

    Its length is an equal share of the samples, as if all workers were equally fast. How many it gives is known when
    the epoch is over. If it is iterated again in the same epoch, it gives an equal share.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        drop_last: bool,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        claim: Callable[[int, int], int],
        begin: Callable[[int], None] | None = None,
    ) -> None:
        self.size, self.batch_size, self.drop_last, self.shuffle = size, batch_size, drop_last, shuffle
        self.seed, self.rank, self.world_size, self.claim, self.begin = seed, rank, world_size, claim, begin
        self.epoch = 0
        self.skip = 0
        self.taken: deque[int] = deque()
        self._begun: int | None = None

    @property
    def num_batches(self) -> int:
        """The number of batches of all workers together in one epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the beginning of each epoch."""
        self.epoch = epoch
        if self.begin is not None:
            self.begin(epoch)

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch))
        else:
            order = torch.arange(self.size)
        if epoch == self._begun:  # user code looks at the data again, in the epoch or after it
            for batch in range(self.rank, self.num_batches, self.world_size):
                yield from order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            return
        self._begun, self.taken = epoch, deque()
        first = min(self.skip, self.num_batches - self.world_size)  # everybody has a batch
        batch = first + self.rank
        while batch < self.num_batches:
            self.taken.append(batch)
            yield from order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            begin = first + self.world_size
            batch = begin + self.claim(epoch, self.num_batches - begin)


class SharedEpochs:
    """Lets the workers of a `Trainer` share its epochs.

    Lightning's counts stay those of equal shards: ``trainer.num_training_batches`` and ``len`` of the loader are an
    equal share of the batches. An epoch ends when its data are used up, whoever took how many. Schedules by steps
    follow the data that all workers together have taken, so that their values are those of workers of equal speed.

    Args:
        trainer: in training.
        rank: this worker.
        world_size: the number of workers.
        claim: claims batches of an epoch; see `ClaimsAhead`.
        on_begin: told of the beginning of each epoch, perhaps twice, before anything is taken of it.
    """

    def __init__(
        self,
        trainer: Trainer,
        rank: int,
        world_size: int,
        claim: Callable[[int, int, list[int]], list[int]],
        on_begin: Callable[[int, SharedEpochSampler], None] | None = None,
    ) -> None:
        self._on_begin = on_begin
        self._trainer, self._rank, self._world_size, self._claims = trainer, rank, world_size, ClaimsAhead(claim)
        self._loop = trainer.fit_loop.epoch_loop
        self._update_schedules = self._loop.update_lr_schedulers
        self._replaced: list[private.Undo] = []
        self._sampler: SharedEpochSampler | None = None
        self._started = False
        self._first_epoch = trainer.current_epoch
        self._passed = 0

    def share(self, loader: Any) -> str | None:
        """Let a loader take shared batches.

        Returns:
            Why that is not possible; ``None``: it is.
        """
        sampler = share_epoch(loader, self._rank, self._world_size, self._claims.next, self._begin)
        self._sampler = sampler or self._sampler
        return why_not_dealt(loader, self._world_size) if sampler is None else None

    def start(self, used: int, joins: bool = False) -> None:
        """Share the epochs from here on.

        Only in ``on_train_start``, and not when the loader is made: Lightning has sized its loops then.

        Args:
            used: batches of this epoch that all workers together used before, if it was interrupted.
            joins: whether this worker has just been given where the others are.
        """
        assert self._sampler is not None
        self._sampler.skip = used
        # An epoch would end, and its learning rates change, after an equal share.
        self._replaced = [
            private.replace_is_last_ready(self._trainer, self._is_last_batch),
            private.replace(self._loop, "update_lr_schedulers", self._follow_the_data),
        ]
        self._sampler.set_epoch(self._trainer.current_epoch)
        self._started = True
        if private.reloads_loader(self._trainer):
            return  # an iterator of this loader would claim batches that nobody uses
        if joins and self._trainer.current_epoch > 0:
            return  # the loop makes the iterator, as in every epoch but the first
        iter(private.data_fetcher(self._trainer))

    @property
    def sampler(self) -> SharedEpochSampler:
        """What takes the batches, once a loader is shared."""
        assert self._sampler is not None
        return self._sampler

    def unfinished(self) -> list[int]:
        """Return the batches of this epoch that this worker has claimed and not trained on; waits for a claim under
        way."""
        sampler = self.sampler
        return [*sampler.taken.copy(), *(number + sampler.world_size for number in self._claims.in_hand())]

    def stop(self) -> None:
        """Leave the loop as it was."""
        self._claims.close()
        for undo in self._replaced:
            undo()

    def _begin(self, epoch: int) -> None:
        """Learn that an epoch begins; its loader may be new."""
        sampler = self._sampler
        assert sampler is not None
        if self._on_begin is not None:
            self._on_begin(epoch, sampler)
        if not isinstance(private.data_fetcher(self._trainer), _FetchesAhead):
            fetcher = _FetchesAhead()
            private.set_data_fetcher(self._trainer, fetcher)
            fetcher.setup(private.combined_loader(self._trainer))
            fit_loop = self._trainer.fit_loop
            if self._started and (epoch == 0 or fit_loop.is_resuming or self._loop.restarting):
                iter(fetcher)  # in the epoch of a resumed run the loop does so before this one is there
        self._trainer.val_check_batch = float("inf")  # validate after the last batch
        if epoch != self._first_epoch:
            sampler.skip = 0
        self._passed = sampler.skip // self._world_size

    def _is_last_batch(self) -> bool:
        return self._loop.batch_progress.is_last_batch

    def _follow_the_data(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Make the steps of schedules that a worker of average speed has made by now."""
        if interval != "step" or update_plateau_schedulers:
            self._update_schedules(interval, update_plateau_schedulers)
            return
        assert self._sampler is not None
        trainer, share = self._trainer, int(self._trainer.num_training_batches)
        taken = self._sampler.taken.popleft() if self._sampler.taken else 0
        now = share if self._is_last_batch() else min(share, taken // self._world_size + 1)
        if trainer.lightning_module.automatic_optimization:
            step_schedules(trainer, self._passed, now)
        self._passed = max(self._passed, now)


class _FetchesAhead(private.PrefetchDataFetcher):
    """Asks for a batch before the last one is used, and so knows which one is the last, whatever the loader's length.

    A worker that comes to the end of the epoch's data then applies the gradients that it has accumulated.
    """

    def reset(self) -> None:
        super().reset()
        self.length, self.done = None, False


def why_not_shared(trainer: Trainer, counts_together: bool = False) -> str | None:
    """Tell what in a run counts each worker's own steps or batches, which must be equal then; ``None``: nothing.

    Args:
        trainer: of the run.
        counts_together: whether ``max_steps`` is a count of all workers together, by the batches that they take.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "fast_dev_run counts each worker's own batches"
    if (trainer.max_steps != -1 and not counts_together) or trainer.min_steps is not None:
        return "max_steps and min_steps count each worker's own steps"
    if trainer.max_steps != -1 and (trainer.accumulate_grad_batches != 1 or trainer.fit_loop.min_epochs):
        return "max_steps counts the batches of all workers, without accumulate_grad_batches and min_epochs"
    if trainer.max_steps != -1 and not trainer.lightning_module.automatic_optimization:
        return "max_steps counts the batches of all workers, and training_step may make any number of steps in one"
    if _counts(trainer.limit_train_batches) or trainer.overfit_batches:  # type: ignore[attr-defined]
        return "limit_train_batches and overfit_batches count each worker's own batches"
    if _counts(trainer.val_check_interval) or trainer.check_val_every_n_epoch is None:
        return "val_check_interval counts each worker's own batches"
    if not trainer.lightning_module.automatic_optimization and any(
        isinstance(config.scheduler, OneCycleLR) for config in trainer.lr_scheduler_configs
    ):
        return "OneCycleLR allows each worker an exact number of steps, which training_step makes itself"
    if len(private.combined_loader(trainer).flattened) != 1:
        return "there are several training loaders"
    if private.takes_iterator(private.data_fetcher(trainer)):
        return "training_step takes the loader's iterator, and loads as many batches as it likes"
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and private.saves_every_steps(callback):
            return "ModelCheckpoint(every_n_train_steps=...) counts each worker's own steps"
    return None


def _counts(setting: float | None) -> bool:
    """Tell whether a setting of Lightning says how many batches, or which part of them; 1 is one batch, 1.0 is all."""
    return setting is not None and (isinstance(setting, int) or setting != 1.0)


def why_not_dealt(loader: Any, world_size: int) -> str | None:
    """Tell what in a training loader keeps its batches from being dealt one by one; ``None``: nothing.

    That needs a map-style data set with a batch for each worker, and the `DistributedSampler` that Lightning puts in.
    """
    if not isinstance(loader, DataLoader):
        return (
            f"the training loader is a {type(loader).__name__}, and only a DataLoader can be told which samples to take"
        )
    if isinstance(loader.dataset, IterableDataset):
        return f"the data set {type(loader.dataset).__name__} is iterable, of which nobody knows which samples come"
    batches = loader.batch_sampler
    if batches is None:
        return "the training loader makes no batches (batch_size=None)"
    if type(batches) is not BatchSampler:
        return f"the training loader has a batch sampler of its own, {type(batches).__name__}"
    sampler = batches.sampler
    # one of the user's, also if Lightning has wrapped it
    if not isinstance(sampler, DistributedSampler) or type(sampler).__iter__ is not DistributedSampler.__iter__:
        return (
            f"the training loader takes its samples from a {type(sampler).__name__}, and Lightning's "
            "DistributedSampler is needed (no sampler in the DataLoader, shuffle=True or False, "
            "use_distributed_sampler=True in the Trainer)"
        )
    samples = len(loader.dataset)  # type: ignore[arg-type]  # a map-style one
    if samples < world_size * batches.batch_size:
        return (
            f"the data set has {samples} samples, fewer than one batch of {batches.batch_size} for each of "
            f"{world_size} workers"
        )
    return None


def share_epoch(
    loader: Any,
    rank: int,
    world_size: int,
    claim: Callable[[int, int], int],
    begin: Callable[[int], None] | None = None,
) -> SharedEpochSampler | None:
    """Let a loader that Lightning prepared for distributed training take shared batches instead of a fixed shard.

    Returns:
        The new sampler; ``None`` if the loader could not be changed, of which `why_not_dealt` tells the reason.
    """
    if why_not_dealt(loader, world_size) is not None:
        return None
    batches, sampler = loader.batch_sampler, loader.batch_sampler.sampler
    shared = batches.sampler = SharedEpochSampler(
        *(len(loader.dataset), batches.batch_size, batches.drop_last, sampler.shuffle, sampler.seed),
        *(rank, world_size, claim, begin),
    )
    return shared
