"""One epoch of data for workers of unequal speed: whoever is free takes the next batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler


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
        claim: the next unclaimed batch number of an epoch, counted from 0 by all workers together.

    It has no length: how many batches a worker takes is known when the epoch is over.
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
        claim: Callable[[int], int],
    ) -> None:
        self.size, self.batch_size, self.drop_last, self.shuffle = size, batch_size, drop_last, shuffle
        self.seed, self.rank, self.world_size, self.claim = seed, rank, world_size, claim
        self.epoch = 0

    @property
    def num_batches(self) -> int:
        """Batches of all workers together in one epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the beginning of each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + epoch))
        else:
            order = torch.arange(self.size)
        batch = self.rank
        while batch < self.num_batches:
            yield from order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            batch = self.world_size + self.claim(epoch)


def share_epoch(loader: DataLoader[Any], rank: int, world_size: int, claim: Callable[[int], int]) -> bool:
    """Let a loader that Lightning prepared for distributed training take shared batches instead of a fixed shard.

    Returns:
        Whether the loader could be changed: it needs a map-style data set and the `DistributedSampler` that Lightning
        puts in (``use_distributed_sampler=True``).
    """
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler or not isinstance(batches.sampler, DistributedSampler):
        return False
    sampler = batches.sampler
    if type(sampler).__iter__ is not DistributedSampler.__iter__:  # it deals the samples in its own way
        return False
    size = len(loader.dataset)  # type: ignore[arg-type]
    if size < world_size * batches.batch_size:
        return False
    batches.sampler = SharedEpochSampler(
        size, batches.batch_size, batches.drop_last, sampler.shuffle, sampler.seed, rank, world_size, claim
    )
    return True
