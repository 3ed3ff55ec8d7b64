"""What the gossip and the asynchronous strategy share: an algorithm inside Lightning's training loop.

The file is long because it has a method for each hook by which Lightning asks a strategy.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch.nn import Module
from torch.optim import Optimizer

from lightning_decentral.engine.memory import OptimizerMemory
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.engine.update_lengths import UpdateLengths
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated.algorithm import AbstractFederatedAlgorithm
from lightning_decentral.flat import layers_of
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.alike import (
    described_steppers,
    described_tensors,
    refuse_shared_parameters,
    require_equal,
)
from lightning_decentral.strategies.batches import Batches
from lightning_decentral.strategies.buffers import BufferGossip, check_buffers, gossip_of_buffers
from lightning_decentral.strategies.checkpoints import WorkerCheckpoints
from lightning_decentral.strategies.clients import Rounds, resume_worker
from lightning_decentral.strategies.consensus import Consensus
from lightning_decentral.strategies.loops import may_change_weights_before_batch
from lightning_decentral.strategies.meetings import publish_exception
from lightning_decentral.strategies.records import described, log_run
from lightning_decentral.strategies.requeue import Requeue
from lightning_decentral.strategies.strategy import Strategy, refuse_servers
from lightning_decentral.strategies.two_momenta import refuse_two_momenta
from lightning_decentral.strategies.weights import own_copy
from lightning_decentral.tensors import check_parameters, has_values
from lightning_decentral.transport.collectives import broadcast_from_zero
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.copies import from_text, to_text
from lightning_decentral.transport.rejoining import leave_process_group


class AbstractDecentralizedStrategy(Strategy):
    """Runs an algorithm in which every worker has a model of its own; its options are those of `Strategy`.

    Lightning's loop computes gradients and calls the optimizer; around them the algorithm's coroutine makes its
    exchanges. Evaluation and checkpoints use the *consensus*, the mean of all workers' models.
    """

    is_distributed = True  # Lightning's property warns whenever it is read
    ends_batches_together = True
    """Whether nobody trains on while a worker is at the end of its batches."""
    begins_before_batch: ClassVar[bool]
    """Whether a step's exchange goes on while its batch is loaded, unless hooks might change weights until then."""

    @property
    @abstractmethod
    def loads_first(self) -> bool:
        """Whether the next step does not begin before its batch is there: who has one has to be known first."""

    def _clear(self) -> None:
        super()._clear()
        self._configured = self.algorithm
        self._steppers: list[Stepper] = []
        self._batches: Batches | None = None
        self._consensus: Consensus | None = None
        self._epoch = -1
        self._checkpoints = WorkerCheckpoints(self)
        self._dumped: dict[str, Any] | None = None
        self._replaced: list[private.Undo] = []  # in Lightning's loops
        self._reduces_first = False
        self._begins_before_batch = False
        self._rounds: Rounds | None = None
        self._requeue: Requeue | None = None
        self._reports: list[Mapping[str, Any]] = []  # of all workers, once training is over
        self._buffers: BufferGossip | None = None

    # -- what callbacks read ------------------------------------------------------------------------------------------

    @property
    def last_consensus_distance(self) -> float | None:
        """The value of ``(1/n) sum_i ||x_i - mean||^2`` when the models were last averaged to evaluate or save."""
        return None if self._consensus is None else self._consensus.distance

    @property
    def staleness(self) -> int:
        """How many versions of the parameters lay between the last gradient's snapshot and its update."""
        return max((stepper.worker.staleness for stepper in self._steppers), default=0)

    def stalenesses(self) -> dict[int, Counter[int]]:
        """Return how many updates of which worker were how stale, by rank, since training or this life of it began.

        All workers must call it together, when training has ended; it costs a message of some numbers.
        """
        own = sum((stepper.stale for stepper in self._steppers), Counter[int]())
        numbers = [self.global_rank, *(number for pair in sorted(own.items()) for number in pair)]
        rows = self.gather_rows(torch.tensor(numbers, dtype=torch.int64, device=self.root_device))
        told = sorted(row.tolist() for row in rows)
        return {rank: Counter(dict(zip(pairs[::2], pairs[1::2], strict=True))) for rank, *pairs in told}

    @property
    def steps(self) -> int:
        """The steps that this worker has made."""
        return sum(stepper.worker.step for stepper in self._steppers)

    @property
    def rounds(self) -> Rounds | None:
        """The rounds of a run with clients."""
        return self._rounds

    @property
    def report(self) -> Mapping[str, Any]:
        """What the algorithm tells of the run so far, on this worker: see `AbstractAlgorithm.report`."""
        reports: Mapping[str, Any] = {}
        for stepper in self._steppers:
            with stepper.monitor:
                reports = copy.deepcopy(self.algorithm.report(stepper.worker)) or reports
        return reports

    @property
    def reports(self) -> list[Mapping[str, Any]]:
        """What the servers of one model tell, by rank: of all shards when training is over, before of this worker's."""
        return [report for report in self._reports or [self.report] if report]

    def consensus_distance(self) -> float:
        """Compute ``(1/n) sum_i ||x_i - mean||^2`` now. All workers must call it together; it costs one all-reduce."""
        assert self._consensus is not None
        return self._consensus.measure()

    def estimate_consensus_distance(self, sample: int) -> tuple[float, float]:
        """Estimate that from some coordinates, with its standard error. All workers must call it together.

        Args:
            sample: how many coordinates; each worker sends 8 bytes for each.
        """
        assert self._consensus is not None
        return self._consensus.estimate(sample, self.steps)

    def watch_updates(self) -> None:
        """Measure the length of each update from now on, of a few coordinates; nothing is exchanged for it."""
        for index, stepper in enumerate(self._steppers):
            if stepper.lengths is None:
                stepper.lengths = UpdateLengths(stepper.x, index)

    def longest_update(self) -> float:
        """Return the squared length of this worker's longest update since this was last asked; 0 if not watched."""
        return sum(stepper.lengths.take() for stepper in self._steppers if stepper.lengths is not None)

    # -- setting up ---------------------------------------------------------------------------------------------------

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if self.parallel_devices:  # Lightning calls this in Trainer(): a wrong topology is refused before any process
            size = self.num_nodes * self.num_processes
            self.algorithm = self._configured.on_hosts(self.num_processes).resolved(size)
            check_buffers(type(self).__name__, self.algorithm, self.buffers)
            if not isinstance(self.algorithm, AbstractAsynchronousAlgorithm):
                refuse_servers(self.algorithm, size)

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            if private.validates_by_the_clock(trainer):
                raise ConfigurationError(
                    f"{type(self).__name__} got a val_check_interval in time, but each worker has its own clock, and "
                    "all must validate together. Use a number of batches, or check_val_every_n_epoch."
                )
            self.check_trainer(trainer)
        with self._named_failures():
            super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            with self._named_failures():
                self._start(trainer)
            log_run(trainer, described(self.algorithm, self.world_size))

    @abstractmethod
    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse settings of the Trainer that cannot work with this strategy."""

    def configure_ddp(self) -> None:
        """Give all workers the same start, in place of a wrapper that reduces gradients."""
        assert self.model is not None
        check_parameters(self.model)
        named = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        named = {name: tensor for name, tensor in named.items() if has_values(tensor)}
        require_equal(described_tensors(named.items()), "parameters or buffers")
        broadcast_from_zero([tensor for name, tensor in named.items() if self._checkpoints.leaves(name, tensor)])

    def _make_communicator(self) -> Communicator:
        """Connect with the other workers. All of them together."""
        return Communicator(self._connection_settings(self.shared_memory))

    def _start(self, trainer: Trainer) -> None:
        self._communicator = self._make_communicator()
        self._checkpoints.restore_module()
        assert self.model is not None
        self._batches = Batches(self, trainer, self.model, self._steppers, self._communicator)
        # Lightning broadcasts rank 0's SIGTERM before every batch: a barrier in each step. Here a worker that receives
        # SIGTERM stops after its batch, and the others raise its `SIGTERMException`.
        self._replaced.append(private.replace_sigterm_broadcast(trainer, self._batches.before_batch))
        self._batches.begin_with(self._checkpoints.parameters(self.model))
        refuse_two_momenta(self.algorithm, self.optimizers)
        if self.algorithm.exchanges_gradients:
            refuse_shared_parameters(self.algorithm, self.optimizers)
        for index, optimizer in enumerate(self.optimizers):
            self._steppers.append(self._make_stepper(index, optimizer))
        require_equal(described_steppers(self._steppers, self.model), "trainable parameters")
        self._rounds = self._make_rounds(trainer)
        self._checkpoints.restore_steppers(self._steppers)
        if self.buffers == "gossip" and self.world_size > 1:
            self._buffers = gossip_of_buffers(self.model, self.algorithm, self._communicator, self.seed)
            self._batches.buffers = self._buffers
        self._consensus = Consensus(
            self.model,
            self._steppers,
            self._communicator,
            trainer.callbacks,  # type: ignore[attr-defined]
            local_buffers=self.buffers == "local",
        )
        self._replaced += private.replace_ends_of_validation(trainer, self.begin_validation, self._end_merged)
        self._checkpoints.attach(self._steppers, self._consensus, self._communicator)
        self.connect_workers(self._communicator, self._steppers)

    @property
    def _averaging(self) -> list[Stepper]:
        """All that averages something: the optimizers' steppers, and that of the buffers."""
        stepper = None if self._buffers is None else self._buffers.stepper
        return [*self._steppers, *([] if stepper is None else [stepper])]

    def _make_rounds(self, trainer: Trainer) -> Rounds | None:
        algorithm = self.algorithm
        if not isinstance(algorithm, AbstractFederatedAlgorithm) or algorithm.population is None:
            return None
        rounds = Rounds(trainer, algorithm, self.global_rank, self.world_size)
        saved = self._checkpoints.saved_rounds
        if saved is not None:
            rounds.load_state_dict(saved)
        return rounds

    @abstractmethod
    def connect_workers(self, communicator: Communicator, steppers: list[Stepper]) -> None:
        """Open whatever connections the algorithm needs beyond the process groups. All workers together."""

    def _make_stepper(self, index: int, optimizer: Optimizer) -> Stepper:
        assert self._communicator is not None
        assert self._batches is not None
        parameters, guarded = self._batches.parameters(index), self._batches.expects_changes(index)
        assert self.model is not None
        layers = layers_of(self.model, parameters)
        stepper = Stepper(self.algorithm, parameters, self._communicator, index, self.seed, guarded, layers)
        stepper.worker.memory = OptimizerMemory(lambda: self.optimizers[index].state, parameters)
        return stepper

    # -- training -----------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: Any) -> Any:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.stage == RunningStage.TRAINING:
            # Before the loader's iterator is made: that draws a random number, as it did in the run that goes on.
            self._checkpoints.restore_random_state(in_epoch=False)
            if self._rounds is not None:
                return self._follow_rounds(self._rounds, dataloader)
        return super().process_dataloader(dataloader)

    def _follow_rounds(self, rounds: Rounds, dataloader: Any) -> Any:
        """Go on with the loader of a run with clients, whose data is known now."""
        loader = rounds.follow(dataloader)
        self.algorithm = rounds.algorithm
        for index, (before, optimizer) in enumerate(zip(list(self._steppers), self.optimizers, strict=True)):
            before.flat.release()
            stepper = self._make_stepper(index, optimizer)
            resume_worker(stepper.worker, rounds, before.worker)
            self._steppers[index] = stepper
        return loader

    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self._requeue = self._requeue or Requeue(trainer)
        if not self._reduces_first:  # and not after a search, which ran in the same loop
            self._reduces_first = True
            self._replaced.append(private.replace_epoch_end(trainer, partial(self._reduce_first, trainer)))
        self._checkpoints.restore_random_state(in_epoch=False)
        if self._rounds is not None:
            self._rounds.begin()
        guarded = any(stepper.guarded for stepper in self._steppers)
        self._begins_before_batch = (
            self.begins_before_batch and not guarded and not may_change_weights_before_batch(trainer)
        )

    def prepare_step(self) -> bool:
        """Prepare a step: all hooks of the last one have been called, and the next batch is not loaded yet.

        Returns:
            Whether the step begins now, and not when the batch is there.
        """
        self._begin_epoch()
        self._checkpoints.restore_random_state(in_epoch=True)
        if self._begins_before_batch:
            self._check_failure()
        return self._begins_before_batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._checkpoints.restore_random_state(in_epoch=True)  # a single worker has nothing before a batch
        self._begin_epoch()
        if self._rounds is not None:
            assert self.lightning_module is not None
            self._rounds.before_batch(batch_idx, self.lightning_module, self.optimizers)
        self._begin_step()

    def end_round(self) -> None:
        """Do what belongs to the end of a round of clients, if one is over. All workers together."""
        if self._rounds is not None and self.lightning_module is not None:
            workers = [stepper.worker for stepper in self._steppers]
            self._rounds.end_round(self.lightning_module, workers, partial(self.reduce, reduce_op="sum"))

    def _begin_epoch(self) -> None:
        """Prepare the first step of an epoch: callbacks prune at the end of one, each worker by its own weights."""
        assert self.lightning_module is not None
        epoch = self.lightning_module.trainer.current_epoch
        if self._consensus is not None and epoch != self._epoch:
            self._epoch = epoch
            self._consensus.share_masks()

    def _reduce_first(self, trainer: Trainer, epoch_end_reached: Callable[[], None]) -> None:
        """Let all workers reduce an epoch's metrics at its end, before anything else that they do together.

        A progress bar reads them on worker 0 alone, in a callback: earlier than what a module gathers in the same hook.
        """
        epoch_end_reached()
        if trainer.training and not self._interrupted:
            self.end_round()
            self.before_reductions(trainer)
            trainer.callback_metrics  # noqa: B018

    def before_reductions(self, trainer: Trainer) -> None:
        """Prepare for all workers' reducing what they have logged in an epoch."""

    def _begin_step(self) -> None:
        assert self._batches is not None
        self._check_failure()
        self._batches.begin()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        assert self._batches is not None
        self._check_failure()
        return self._batches.step(optimizer, closure, model=model, **kwargs)

    def apply_update(self, optimizer: Optimizer, closure: Callable[[], Any], **options: Any) -> Any:
        """Let Lightning call the optimizer: gradient scaler, clipping and hooks included."""
        return super().optimizer_step(optimizer, closure, **options)

    @abstractmethod
    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        """Follow an optimizer that has other parameters than before."""

    @abstractmethod
    def change_optimizers(self) -> None:
        """There is another number of optimizers than before."""

    def on_train_end(self) -> None:
        self.quiesce("the end of training")
        if self._rounds is not None and self._rounds.under_way:
            for stepper in self._steppers:
                self._rounds.algorithm.abandon_round(stepper.worker)  # a part of a round is no round
        if self._requeue is not None:
            self._requeue.finish(partial(self.reduce_boolean_decision, all=False), self.broadcast)
        if self._consensus is not None and self.average_at_end and self.world_size > 1:
            self._consensus.enter()
            self._consensus.stay()
        self._checkpoints.finish()
        if self._communicator is not None and self.algorithm.shards > 1:
            told = self._communicator.gather(to_text(self.report).encode())
            self._reports = [from_text(each) for each in told]
        if self._communicator is not None:
            self._communicator.barrier()  # whoever is done early must not take its connections down

    # -- evaluation on the consensus ----------------------------------------------------------------------------------

    @abstractmethod
    def quiesce(self, what: str = "a meeting of all workers") -> None:
        """Wait until no exchange of any worker is under way. All workers together, for the same thing.

        Args:
            what: they do then, as it is named in messages.
        """

    def begin_validation(self) -> None:
        """Prepare for hooks of user code at the beginning of a validation. All workers together."""
        if self._consensus is not None and self._steppers:
            self._consensus.watch()

    def on_validation_start(self) -> None:
        if self._consensus is not None and self._steppers:
            self.end_round()
            self.quiesce("a validation")
            self._consensus.enter()

    def _end_merged(self) -> None:
        """Let hooks of a validation's end take out of this worker's own model what those of its beginning put in."""
        if self._consensus is not None and self._consensus.entered and self._consensus.merged:
            self._consensus.leave()

    def on_validation_end(self) -> None:
        if self._consensus is not None and self._consensus.entered:
            self._consensus.leave()

    def gather(self, value: bytes) -> list[bytes]:
        """Return what all workers pass, by rank. All of them together, inside a batch too; after a failure its own.

        Args:
            value: this worker's.
        """
        if self._communicator is None or self._interrupted:
            return [value]
        with self._named_failures():
            return self._communicator.gather(value)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the consensus. All workers must call it together, as they do in ``trainer.save_checkpoint``."""
        assert self.lightning_module is not None
        consensus = self._consensus
        if consensus is None or not self._steppers or self._interrupted or consensus.entered:
            self._dumped = self.lightning_module.state_dict()
            return self._dumped
        self.quiesce("a checkpoint")
        consensus.enter()
        try:
            self._dumped = {key: own_copy(value) for key, value in self.lightning_module.state_dict().items()}
            return self._dumped
        finally:
            consensus.leave()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self._interrupted:  # the others have stopped: save what there is, a plain checkpoint of this worker
            self._checkpoints.save_alone(checkpoint, filepath, storage_options)
            return
        dumped, self._dumped = self._dumped or {}, None
        self._checkpoints.save(checkpoint, filepath, storage_options, dumped)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self._checkpoints.load(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not self._steppers:
            super().load_model_state_dict(checkpoint, strict)
            return
        # In the middle of a run, as at the end of a search for a learning rate: nobody may be in the middle of a step.
        assert self._communicator is not None
        with self._named_failures():
            self._communicator.drain()
            self.quiesce()
            for stepper in self._steppers:
                stepper.abandon()
            super().load_model_state_dict(checkpoint, strict)
            self._checkpoints.restore_module()
            if self._rounds is not None:
                self._rounds.go_back(self._checkpoints.saved_rounds)
            for stepper in self._steppers:
                stepper.begin_anew()
            if self._buffers is not None:
                self._buffers.begin_anew()
            self._checkpoints.restore_steppers(self._steppers)
            self.quiesce()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        self._checkpoints.load_optimizers(checkpoint, super().load_optimizer_state_dict)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        self._checkpoints.remove(filepath)

    # -- the end, good or bad -----------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            publish_exception(watch, exception, self.global_rank)
        if self._communicator is not None or watch is not None:
            self._checkpoints.abandon()
            if self._communicator is not None:
                self._communicator.close(failed=True)
                self._communicator = None
            elif watch is not None:
                watch.close()
            if self.root_device.type == "cpu":  # a CUDA group would wait for its peers
                leave_process_group()

    def teardown(self) -> None:
        if self._interrupted:
            self._checkpoints.abandon()
        else:
            self._checkpoints.finish()
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        for undo in self._replaced:
            undo()
        self._replaced, self._reduces_first = [], False
        for stepper in self._steppers:
            stepper.flat.release()
        self._steppers = []
        if self._buffers is not None:
            self._buffers.release()
            self._buffers = None
        if self._consensus is not None:
            self._consensus.close()
        self._checkpoints.detach()
        if self._communicator is not None:
            self._communicator.close(failed=self._interrupted)
            self._communicator = None
        elif self._watch is not None:
            self._watch.close()
        self._watch = None
        super().teardown()
