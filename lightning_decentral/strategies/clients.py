"""Federated rounds in Lightning's loop: an epoch is a round, and a worker is its clients one after the other.

A round is what the loader's batches are of: those of the first turn, then of the second, and so on. When a turn begins,
the optimizer forgets, and the buffers (batch normalization) are the common ones again; when the round is over, they are
the weighted mean of those of all clients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated.algorithm import AbstractFederatedAlgorithm
from lightning_decentral.federated.clients import Clients, Round, Turn
from lightning_decentral.federated.data import ClientData, RoundBatches
from lightning_decentral.federated.partition import Partition, iid
from lightning_decentral.flat import pack, unpack
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.loops import epochs_made, searches_for_rate
from lightning_decentral.worker import Worker

ROUNDS = "lightning_decentral_rounds"
"""Key of what a checkpoint has of rounds."""

_COUNTED = ("last", "_ended", "_loaded")  # and what a checkpoint does not have
_SAVED = ("number", "seconds", "bytes", "drift", "_index", "_made", "_common", "_sums", "_weight")

Sum = Callable[[Tensor], Tensor]
"""Adds up a tensor over all workers."""


def _same(value: Tensor) -> Tensor:
    return value


def with_clients(
    name: str, algorithm: AbstractAlgorithm | None, clients: Clients | int, per_round: int | None
) -> AbstractAlgorithm:
    """Return the algorithm with a population.

    Args:
        name: of the strategy; for messages.
        algorithm: that the user has given.
        clients: that the user has given.
        per_round: likewise.

    Raises:
        ConfigurationError: if the algorithm has no clients, or one of the two numbers is missing.
    """
    if not isinstance(algorithm, AbstractFederatedAlgorithm):
        raise ConfigurationError(
            f"{name} got clients={clients!r} with {algorithm!r}, needs a method whose workers are clients in turn. Use "
            "FedAvg(), FedMom() or another of the federated methods, or leave clients out."
        )
    if isinstance(clients, int):
        if per_round is None:
            raise ConfigurationError(
                f"{name} got clients={clients} without per_round, needs to know how many take part in a round. Write "
                f"per_round={min(clients, 20)}, or clients=Clients(...)."
            )
        clients = Clients(clients, per_round)
    elif per_round is not None:
        raise ConfigurationError(
            f"{name} got per_round={per_round} beside {clients}, needs one number of clients in a round. Leave "
            "per_round out."
        )
    return algorithm.of_population(clients)


class Rounds:
    """The rounds of a strategy whose algorithm has a population of clients.

    Args:
        trainer: whose loop it is.
        algorithm: with clients.
        rank: of this worker.
        world_size: how many workers there are.

    Attributes:
        algorithm: with the data of its clients, once the loader is known.
        partition: which samples belong to whom, likewise.
        number: of the round that comes, or is under way.
        last: the round that was made last.
        seconds: of all rounds so far, by the clients' speeds.
        bytes: that all clients have received and sent so far.
        drift: how far the clients of the last round were from their mean; see `AbstractFederatedAlgorithm.drift`.
    """

    def __init__(self, trainer: Trainer, algorithm: AbstractFederatedAlgorithm, rank: int, world_size: int) -> None:
        self.algorithm = algorithm
        self.partition: Partition | None = None
        self.number = 0
        self.last: Round | None = None
        self.seconds, self.bytes, self.drift = 0.0, 0.0, 0.0
        self._trainer, self._rank, self._world_size = trainer, rank, world_size
        self._turns: list[Turn] = []
        self._planned = -1  # the number of the round of which these are
        self._index: int | None = None  # whose turn it is among these
        self._made = 0  # batches of the round
        self._loaded = False  # whether it goes on from a state of its own
        self._entered = -1  # the epoch of the round, if it has begun here
        self._ended = -1  # the last epoch whose round is over
        self._common: dict[str, Tensor] = {}  # buffers at the beginning of the round
        self._sums: dict[str, Tensor] = {}  # of the clients' buffers
        self._weight = 0.0  # that these have
        self._start: dict[str, Any] | None = None  # what there was when training began
        _require_whole_rounds(trainer)
        if world_size > 1 and searches_for_rate(trainer):
            raise ConfigurationError(
                f"{type(algorithm).__name__} with clients got a search for a learning rate (LearningRateFinder, or "
                f"Tuner.lr_find) on {world_size} workers, which ends within a round, of which they have unequal "
                "numbers of batches. Search with SimulatedStrategy, or on one worker, and give that rate to all."
            )

    # -- data ---------------------------------------------------------------------------------------------------------

    def follow(self, loader: Any) -> Any:
        """Make a loader of the rounds in the place of the user's, with its data set, batch size and workers.

        Raises:
            ConfigurationError: if its data set is not one of numbered samples.
        """
        name, population = type(self.algorithm).__name__, self.algorithm.population
        assert population is not None
        dataset: Any = getattr(loader, "dataset", None)
        if not isinstance(loader, DataLoader) or loader.batch_size is None or isinstance(dataset, IterableDataset):
            raise ConfigurationError(
                f"{name} got {type(loader).__name__} of {type(dataset).__name__} for {population}, needs one "
                "DataLoader of a map-style data set, with a batch_size, so that it can take each client's samples. "
                "Return one from train_dataloader."
            )
        if not _takes_all(loader.sampler, len(dataset)):
            raise ConfigurationError(
                f"{name} got a training loader with a {type(loader.sampler).__name__}, and needs one without a sampler "
                "of its own: each client goes through its own samples, once in a pass. Leave the sampler out; give a "
                "Subset, or a ClientData with a partition, to say which samples there are and whose they are."
            )
        if not self._loaded:
            self.number = epochs_made(self._trainer)
            self._loaded = True
        self.partition = _partition_of(dataset, population, name)
        if len(self.partition) != population.number:
            raise ConfigurationError(
                f"{name} got {population}, and data of {len(self.partition)} clients ({self.partition.name}); it needs "
                f"as many. Use Clients({len(self.partition)}, ...), or divide the data among {population.number}."
            )
        population = population.of_data(self.partition.sizes, loader.batch_size, loader.drop_last)
        self.algorithm = self.algorithm.of_population(population)
        batches: Any = RoundBatches(self.partition, population, self._share)
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def _share(self) -> tuple[Sequence[Turn], int, int]:
        return self.turns, self.number, self._made

    @property
    def turns(self) -> Sequence[Turn]:
        """The turns of this worker in the round."""
        if self._planned != self.number:
            self._turns = self.algorithm.shares(self.number, self._world_size)[self._rank]
            self._planned = self.number
        return self._turns

    @property
    def under_way(self) -> bool:
        """Whether a round has begun, and is not over."""
        return self._index is not None

    @property
    def batches(self) -> int:
        """How many batches this worker has in the round."""
        return sum(turn.steps for turn in self.turns)

    def begin(self) -> None:
        """Begin training, of which a search may be the first part."""
        if self._start is None:
            self._start = {name: copy(getattr(self, name)) for name in (*_SAVED, *_COUNTED)}

    def go_back(self, saved: dict[str, Any] | None) -> None:
        """Go back in the middle of a run, if training has begun.

        Args:
            saved: what the checkpoint has of the rounds; ``None``: as one of before training, a search's, has nothing.
        """
        if self._start is None:
            return
        for name, value in self._start.items():
            setattr(self, name, copy(value))
        self._entered = -1
        if saved is not None:
            self.load_state_dict(saved)
        self._planned = -1

    # -- turns --------------------------------------------------------------------------------------------------------

    def before_batch(self, batch_idx: int, module: Module, optimizers: Sequence[Any]) -> None:
        """Keep what the last client has left, and forget it, if a turn begins with the batch that is about to be used.

        Args:
            batch_idx: its number in the round.
            module: the user's model.
            optimizers: whose ``state`` is emptied.

        Raises:
            ConfigurationError: if the round before was cut.
        """
        epoch = self._trainer.current_epoch
        if self.under_way and self._entered not in (-1, epoch):
            raise ConfigurationError(
                f"{type(self.algorithm).__name__} with clients got an epoch that ended with batch {self._made} of the "
                f"{self.batches} of its round, as one does in which on_train_batch_start returns -1; it needs "
                "whole rounds: what some of the clients have learnt counts for all. Let Clients(local_steps=...) say "
                "how many batches a client has, and stop a run with trainer.should_stop."
            )
        self._made, self._entered = batch_idx + 1, epoch
        ends = itertools.accumulate(turn.steps for turn in self.turns)
        index = next((index for index, end in enumerate(ends) if batch_idx < end), self._index)
        if index == self._index:
            return
        buffers = _buffers(module)
        self._collect(buffers)
        if self._index is None:
            self._common = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        else:
            _give(buffers, self._common)
        self._index = index
        for optimizer in optimizers:
            optimizer.state.clear()

    def _collect(self, buffers: dict[str, Tensor]) -> None:
        """Add up the buffers of the client whose turn has ended."""
        if self._index is None:
            return
        weight = self.turns[self._index].weight
        self._weight += weight
        for name, buffer in buffers.items():
            before = self._sums.get(name, torch.zeros((), dtype=torch.float64, device=buffer.device))
            self._sums[name] = torch.add(before, buffer.detach(), alpha=weight)  # a checkpoint may have the last one

    def end_round(self, module: Module, workers: Sequence[Worker], add_up: Sum | None = None) -> bool:
        """Make the buffers the mean of the clients', and count what was sent, if the round is over.

        Args:
            module: the user's model.
            workers: this one, with the parameters of each optimizer.
            add_up: over all workers; all of them call this together then.

        Returns:
            Whether it is over now.
        """
        epoch = self._trainer.current_epoch
        if self._trainer.sanity_checking or epoch == self._ended or self._made < self.batches:
            return False
        self._ended = epoch
        buffers = _buffers(module)
        self._collect(buffers)
        self.last = drawn = self.algorithm.round(self.number, self._world_size)
        self.seconds += drawn.seconds
        self.drift = math.sqrt(sum(self.algorithm.drift(worker) ** 2 for worker in workers))
        num_bytes = sum(worker.x.num_bytes for worker in workers)
        answers = len(drawn.turns) + len(drawn.late)
        self.bytes += float(num_bytes * self.algorithm.vectors_sent * (drawn.asked + answers))
        if buffers:
            add_up = add_up or _same
            weight = float(add_up(torch.tensor(self._weight, dtype=torch.float64)))
            sums = {name: self._sums.get(name, torch.zeros_like(b, dtype=torch.float64)) for name, b in buffers.items()}
            _give(buffers, {name: add_up(value) / weight for name, value in sums.items()})
        self.number, self._made, self._index = self.number + 1, 0, None
        self._common, self._sums, self._weight = {}, {}, 0.0
        return True

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tell what a run goes on from, beside what the algorithm remembers."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name in _SAVED:
            setattr(self, name, state[name])
        self._loaded, self._entered = True, -1


def saved_worker(worker: Worker, rounds: Rounds) -> dict[str, Any]:
    """Tell what a checkpoint has of the only worker beside its model: what its algorithm remembers, and its rounds.

    Args:
        worker: before a step, or in one that waits for its gradient.
        rounds: of the strategy.
    """
    return {
        "algorithm": repr(rounds.algorithm),
        "rounds": rounds.state_dict(),
        "state": pack(worker.state),
        "step": worker.step,
        "version": worker.version,
        "rng": worker.rng.getstate(),
    }


def require_same(saved: Mapping[str, Any], algorithm: AbstractAlgorithm) -> None:
    """Refuse what another method, or one with other clients, remembers.

    Raises:
        ConfigurationError: if it is of another one.
    """
    if saved["algorithm"] != repr(algorithm):
        raise ConfigurationError(
            f"The checkpoint is of {saved['algorithm']}, but this run uses {algorithm!r}: what one method remembers "
            "means nothing to another. Resume with the same algorithm and clients; to go on with another, load the "
            "weights alone: call load_from_checkpoint of the module's class, and fit without ckpt_path."
        )


def resume_worker(worker: Worker, rounds: Rounds, before: Worker | None) -> None:
    """Let a worker, which has its model, begin the round that comes, or go on from where another one is.

    Args:
        worker: that has just been made.
        rounds: of the strategy.
        before: a worker with another state of the same algorithm; none: there is none.
    """
    if before is not None:
        worker.state.clear()
        worker.state.update(before.state)
        worker.step, worker.version = before.step, before.version
        worker.rng.setstate(before.rng.getstate())
    if not rounds.under_way:
        rounds.algorithm.enter_round(worker, rounds.number)


def loaded_worker(worker: Worker, saved: Mapping[str, Any], device: torch.device) -> Worker:
    """Tell what `saved_worker` gave, as a worker like another one."""
    state = unpack(saved["state"], device)
    assert isinstance(state, dict)
    loaded = Worker(worker.rank, worker.world_size, worker.x, worker.snapshot, state)
    loaded.step, loaded.version = saved["step"], saved["version"]
    version, internal, gauss = saved["rng"]
    loaded.rng.setstate((version, tuple(internal), gauss))
    return loaded


def _partition_of(dataset: Any, population: Clients, name: str) -> Partition:
    if isinstance(dataset, ClientData):
        return dataset.partition
    samples = len(dataset)
    if samples < population.number:
        raise ConfigurationError(
            f"{name} got {population} and {samples} samples, needs 1 for each client at least. Use fewer clients."
        )
    return iid(samples, population.number, population.seed)


def _takes_all(sampler: object, samples: int) -> bool:
    """Tell whether a sampler is one that a `DataLoader`, or Lightning, makes by itself: each sample once."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == samples
    return type(sampler) in (SequentialSampler, DistributedSampler)


def _require_whole_rounds(trainer: Trainer) -> None:
    """Refuse what would cut a round, or add up gradients of two clients."""
    settings: Any = trainer
    problems = {
        "max_steps": (trainer.max_steps, -1),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        "val_check_interval": (trainer.val_check_interval, 1.0),
        "limit_train_batches": (trainer.limit_train_batches, 1.0),
        "overfit_batches": (settings.overfit_batches, 0.0),
    }
    for setting, (value, needed) in problems.items():
        if value != needed and not settings.fast_dev_run:
            raise ConfigurationError(
                f"Trainer({setting}={value!r}) with clients: an epoch is a round, and a batch is of one client, so it "
                f"needs {setting}={needed!r}. Leave it out; check_val_every_n_epoch counts rounds, and Clients("
                "local_steps=...) says how many batches a client has."
            )
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and (
            private.saves_every_steps(callback) or private.saves_by_the_clock(callback)
        ):
            raise ConfigurationError(
                "ModelCheckpoint got every_n_train_steps or train_time_interval with clients, and would save one "
                "client's model in the middle of a round; it needs the end of one. Use every_n_epochs, which counts "
                "rounds."
            )


def _buffers(module: Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if buffer.layout is torch.strided}


@torch.no_grad()
def _give(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        value = values.get(name)
        if value is not None and value.shape == buffer.shape:
            buffer.copy_(value if buffer.is_floating_point() or not value.is_floating_point() else value.round())
