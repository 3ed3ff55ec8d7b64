"""A data set whose samples belong to clients, and the batches of a round in the order of its turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_decentral.federated.clients import Clients, Turn
from lightning_decentral.federated.partition import Partition


class ClientData(Dataset[Any]):
    """A map-style data set with the clients that its samples belong to.

    To any loader it is the data set; strategies of federated methods take the clients from it.

    Args:
        dataset: of any samples.
        partition: which belong to whom.

    Attributes:
        dataset: as given.
        partition: as given.
    """

    def __init__(self, dataset: Any, partition: Partition) -> None:
        self.dataset, self.partition = dataset, partition

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        """Return several samples at once, if the data set can."""
        together = getattr(self.dataset, "__getitems__", None)
        return [self.dataset[index] for index in indices] if together is None else together(indices)


class RoundBatches:
    """The batches of a round on one worker, as lists of sample numbers: those of its first turn, of its second, ...

    A client goes through its samples in an order that follows from the seed, the round, the client and the pass.

    Args:
        partition: which samples belong to whom.
        clients: with their data.
        share: tells the turns of this worker in the round that begins, its number, and how many batches to leave out.
    """

    def __init__(
        self, partition: Partition, clients: Clients, share: Callable[[], tuple[Sequence[Turn], int, int]]
    ) -> None:
        self._partition, self._clients, self._share = partition, clients, share

    def __iter__(self) -> Iterator[list[int]]:
        turns, number, done = self._share()
        batches = (batch for turn in turns for batch in self._of_turn(turn, number))
        yield from itertools.islice(batches, done, None)

    def _of_turn(self, turn: Turn, number: int) -> Iterator[list[int]]:
        own, size, each = self._partition.of(turn.client), self._clients.batch_size, self._clients.batches(turn.client)
        passes = (self._pass(own, turn.client, number, count) for count in itertools.count())
        batches = (order[first * size : (first + 1) * size] for order in passes for first in range(each))
        return itertools.islice(batches, turn.steps)

    def _pass(self, own: torch.Tensor, client: int, number: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(hash((self._clients.seed, number, client, count)) % 2**63)
        found: list[int] = own[torch.randperm(len(own), generator=generator)].tolist()
        return found
