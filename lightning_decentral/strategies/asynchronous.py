"""The strategy for asynchronous algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.engine.rest import come_to_rest
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.alike import refuse_layers_that_wait, require_equal
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy
from lightning_decentral.strategies.buffers import tell_of_statistics
from lightning_decentral.strategies.clocks import ask_where_all_meet
from lightning_decentral.strategies.epoch_metrics import EpochMetrics, agree_on_names
from lightning_decentral.strategies.gradient_scalers import refuse_gradient_scaler
from lightning_decentral.strategies.joint_stop import JointStop
from lightning_decentral.strategies.poisoned import inspect_messages
from lightning_decentral.strategies.serving import (
    NoBatches,
    ServedEpochs,
    refuse_what_needs_batches,
    shared_names,
    trainers_of,
)
from lightning_decentral.strategies.shared_epoch import SharedEpochs, why_not_shared
from lightning_decentral.strategies.updates_beside import (
    UpdatesBeside,
    refuse_other_parameters,
    refuse_what_no_server_applies,
)
from lightning_decentral.transport.communicator import Communicator

_ALL_BATCHES = 1 << 40  # more than any epoch has


class AsyncStrategy(AbstractDecentralizedStrategy, asynchronous=True):
    """Trains with an asynchronous algorithm: inside an epoch, nobody waits for a slower worker.

    It is what `Strategy` becomes with an asynchronous algorithm, and has its options but for ``uneven``; `ADPSGD` is
    the default. Workers of unequal speed share one epoch of data: whoever is free takes the next batch. They meet at
    the end of each epoch, for validation and checkpoints. Needs a map-style data set; where the shared epoch is not
    possible (see ``share_epoch``), every worker takes an equal shard and the fast ones wait at the end of the epoch.

    Raises:
        ConfigurationError: if the algorithm is synchronous, or the ``Trainer`` has a setting that makes all workers
            wait for each other in every step (``sync_batchnorm``, ``SpikeDetection``); in training, if user code
            does (``self.all_gather`` in ``training_step``); otherwise as `Strategy`.

    Example:
        >>> from lightning_decentral.algorithms import ADPSGD
        >>> strategy = AsyncStrategy(ADPSGD())
    """

    default = ADPSGD
    begins_before_batch = False  # its gradient would be of an older model

    @property
    def loads_first(self) -> bool:
        return False

    def _clear(self) -> None:
        super()._clear()
        self._deciding = False
        self._epochs: SharedEpochs | None = None
        self._served: ServedEpochs | None = None
        self._joint_stop: JointStop | None = None
        self._metrics: EpochMetrics | None = None
        self._warned = False
        self._runs = 0
        self._told: set[str] = set()

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if private.synchronizes_batch_norm(self):
            raise ConfigurationError(
                "AsyncStrategy got Trainer(sync_batchnorm=True), which makes all workers wait for each other in every "
                "forward pass. Leave it out: buffers are averaged for evaluation. GroupNorm does without batches."
            )

    def check_trainer(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, SpikeDetection):
                raise ConfigurationError(
                    "AsyncStrategy got SpikeDetection, which lets all workers decide together after every step whether "
                    "to go on, so that all would wait for the slowest. Use a synchronous strategy, or raise an "
                    "exception in training_step when this worker's own loss is out of bounds: it stops all workers."
                )
        refuse_layers_that_wait("AsyncStrategy", trainer.lightning_module)
        refuse_gradient_scaler(self.algorithm, self.precision_plugin)

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._replaced += ask_where_all_meet(trainer)

    def connect_workers(self, communicator: Communicator, steppers: list[Stepper]) -> None:
        assert isinstance(self.algorithm, AbstractAsynchronousAlgorithm)
        assert self.lightning_module is not None
        if self.algorithm.updates_in_answers:
            refuse_what_no_server_applies(self.algorithm, self.lightning_module.trainer)
        if len(self._trainers) < self.world_size:
            refuse_what_needs_batches(self.algorithm, self.lightning_module)
        if self.world_size > 1:
            tell_of_statistics(self.algorithm, self.buffers, self.lightning_module, self.world_size)
            inspect_messages(self.poisoned, self.lightning_module, communicator, steppers)
        for index, stepper in enumerate(steppers):
            self._prepare(index, stepper)
        communicator.open_edges(self.algorithm, [stepper.callee for stepper in self._averaging])

    def _prepare(self, index: int, stepper: Stepper) -> None:
        """Let a stepper's model be shared, or updated in answers, if the algorithm wants that. All workers together."""
        assert self.lightning_module is not None
        if self.algorithm.shares_model:
            stepper.share()
            if stepper.communicator.watch is not None:
                stepper.communicator.watch.watch_processes()  # nobody waits for anybody, before an epoch ends
        if isinstance(self.algorithm, AbstractAsynchronousAlgorithm) and self.algorithm.updates_in_answers:
            trainer = self.lightning_module.trainer
            stepper.callee.update_beside = UpdatesBeside(trainer, lambda: self.optimizers[index], stepper.flat)

    def quiesce(self, what: str = "a meeting of all workers") -> None:
        """Wait for everybody to be between steps: then no call is under way, and the mean is the mean."""
        assert self._communicator is not None
        self._refuse_while_sharing(what)
        come_to_rest(self._communicator, self._averaging, what)
        for stepper in self._steppers:
            stepper.settle()  # user code sees what late calls have changed
        if self._buffers is not None:
            self._buffers.settle()

    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        """Begin anew with other parameters, as all workers do together at the beginning of this epoch.

        Nobody calls meanwhile, and what they answer from then on is the new model.
        """
        assert self._communicator is not None
        assert self.lightning_module is not None
        refuse_other_parameters(self.algorithm, optimizer)
        if self.lightning_module.trainer.fit_loop.epoch_loop.batch_progress.current.ready > 1:
            raise ConfigurationError(
                f"{type(optimizer).__name__} got other trainable parameters in the middle of an epoch, where "
                "asynchronous workers are at different steps. Freeze and unfreeze at the beginning of an epoch (in "
                "on_train_epoch_start, or with a BaseFinetuning callback), or use GossipStrategy."
            )
        self._communicator.drain()
        self._communicator.barrier("a change of the trainable parameters")
        stepper.flat.release()
        successor = self._make_stepper(index, optimizer)
        require_equal([successor.flat.layout.fingerprint()], "trainable parameters")
        successor.guarded |= stepper.guarded
        successor.worker.step, successor.worker.version = stepper.worker.step, stepper.worker.version
        successor.stale = stepper.stale
        successor.worker.rng.setstate(stepper.worker.rng.getstate())
        self._steppers[index] = successor
        self._prepare(index, successor)
        self._communicator.lend(successor.callee)
        self._communicator.barrier("a change of the trainable parameters")

    def change_optimizers(self) -> None:
        raise ConfigurationError(
            f"There are {len(self.optimizers)} optimizers now, {len(self._steppers)} at the start, but asynchronous "
            "workers would change them at different times. Use as many all the time, or GossipStrategy."
        )

    def _begin_epoch(self) -> None:
        """Nobody calls before the hooks of all have put back what they had put in the place of weights meanwhile."""
        assert self.lightning_module is not None
        begins = self.lightning_module.trainer.current_epoch != self._epoch
        super()._begin_epoch()
        shared = self._epochs is not None or self._served is not None
        if begins and self._communicator is not None and shared:
            self._communicator.barrier("the beginning of an epoch")

    # -- data ---------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self._communicator is not None
        assert self.lightning_module is not None
        self._communicator.barrier("the start of training")  # a callback may have set weights: nobody calls before
        trainer = self.lightning_module.trainer
        combined = private.combined_loader(trainer)
        if self._communicator.watch is None or combined is None:
            return
        self._leave_loop()  # a search ran in it before
        self._runs += 1
        serves = len(self._trainers) < self.world_size
        assert self._batches is not None
        end_early = self._batches.end_early
        self._joint_stop = JointStop(trainer, self._communicator.watch, self._runs, end_early, whole_epochs=serves)
        self._metrics = EpochMetrics(self.lightning_module, lambda: not self.in_a_batch, self.gather_rows)
        if not self.share_epoch and not serves:
            return
        reason = why_not_shared(trainer) if self.share_epoch else "share_epoch=False"
        epochs = None
        if self._trains:
            place = self._trainers.index(self.global_rank)
            epochs = SharedEpochs(trainer, place, len(self._trainers), self._claim_batches)
            reason = reason or epochs.share(combined.flattened[0])
        if reason is not None and serves:
            raise ConfigurationError(
                f"{type(self.algorithm).__name__} got workers that only serve, in a run in which the others cannot "
                f"share epochs: {reason}. It needs shared epochs: who serves knows their end, and counts no batches. "
                "Leave out what counts batches, or server='dedicated'."
            )
        if reason is not None:
            rank_zero_info(f"The workers do not share epochs: {reason}. Every worker takes an equal shard.")
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        goes_on = trainer.fit_loop.restarting and not progress.is_last_batch and self._trains
        used = self._communicator.agree(progress.current.processed if goes_on else 0, "sum")
        if epochs is None:
            self._served = self._serve_epochs(trainer)
            return
        self._epochs = epochs
        self._checkpoints.repeat_random_state()
        epochs.start(int(used))

    @property
    def _trainers(self) -> list[int]:
        """The workers that train, by rank."""
        return trainers_of(self.algorithm, self.world_size)

    @property
    def _trains(self) -> bool:
        return self.algorithm.trains(self.global_rank)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Who only serves has no share of the data for training, but one for evaluation."""
        options = super().distributed_sampler_kwargs
        module, trainers = self.lightning_module, self._trainers
        if module is None or len(trainers) == self.world_size or module.trainer.state.stage != RunningStage.TRAINING:
            return options
        return {"num_replicas": len(trainers), "rank": trainers.index(self.global_rank) if self._trains else 0}

    def _serve_epochs(self, trainer: Trainer) -> ServedEpochs:
        batches, communicator = self._batches, self._communicator
        assert batches is not None
        assert communicator is not None

        def begin() -> None:
            self._checkpoints.restore_random_state(in_epoch=True)
            self._begin_epoch()

        return ServedEpochs(
            trainer,
            len(self._trainers),
            begin,
            lambda: communicator.traffic.calls_answered - sum(map(self._questions, self._steppers)),
            batches.serve,
            batches.end_before_a_meeting,
        )

    def _questions(self, stepper: Stepper) -> int:
        return self.algorithm.questions(stepper.worker)

    def process_dataloader(self, dataloader: Any) -> Any:
        dataloader = super().process_dataloader(dataloader)
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.stage != RunningStage.TRAINING:
            return dataloader
        if not self._trains:
            return NoBatches(dataloader)
        if self._epochs is not None:
            self._epochs.share(dataloader)  # reloaded in the middle of training
        return dataloader

    def begin_validation(self) -> None:
        """Wait for late calls first: what hooks put into weights now, they take out of the same ones at its end."""
        self.quiesce("a validation")
        super().begin_validation()

    def on_validation_start(self) -> None:
        if self._joint_stop is not None:
            self._joint_stop.request()
        super().on_validation_start()
        if self._joint_stop is not None:
            self._joint_stop.follow(ask=True)

    def teardown(self) -> None:
        self._leave_loop()
        super().teardown()

    def _leave_loop(self) -> None:
        """Let Lightning's loop, callbacks and metrics be what they were."""
        if self._epochs is not None:
            self._epochs.stop()
        if self._served is not None:
            self._served.close()
        if self._joint_stop is not None:
            self._joint_stop.close()
        if self._metrics is not None:
            self._metrics.close()
        self._epochs, self._served, self._joint_stop, self._metrics = None, None, None, None

    def _claim_batches(self, epoch: int, count: int, held: Sequence[int]) -> list[int]:
        assert self._communicator is not None
        with self._named_failures():
            end = int(self._communicator.store.add(self._claims_of(epoch), count))
        return list(range(end - count, end))

    def _claims_of(self, epoch: int) -> str:
        return f"epoch/{self._runs}/{epoch}"

    # -- what workers tell each other inside an epoch ------------------------------------------------------------------

    def post(self, name: str, value: bytes) -> None:
        """Leave a value for others to read inside an epoch, who do not wait for it; see `Board`.

        Args:
            name: of what it is.
            value: this worker's, in the place of its last one.
        """
        if self._communicator is not None:
            self._communicator.board.post(name, value)

    def posted(self, name: str, rank: int) -> bytes | None:
        """Return what a worker has posted last; ``None``: nothing yet.

        Args:
            name: of what it is.
            rank: whose.
        """
        return None if self._communicator is None else self._communicator.board.read(name, rank)

    def current_models(self) -> list[Vector]:
        """Return copies of this worker's models as they are now, one for each optimizer; others may call meanwhile."""
        copies = []
        for stepper in self._steppers:
            with stepper.monitor:
                copies.append(stepper.x.clone())
        return copies

    def end_epoch(self) -> None:
        """Let nobody take another batch of this epoch: all come to its end as soon as they can.

        Any worker may call it inside an epoch that the workers share; otherwise each goes on to the end of its own.
        """
        if self._epochs is not None and self._communicator is not None:
            assert self.lightning_module is not None
            with self._named_failures():
                self._communicator.store.add(self._claims_of(self.lightning_module.current_epoch), _ALL_BATCHES)

    # -- no barrier inside an epoch -----------------------------------------------------------------------------------

    def check_collective(self, name: str) -> None:
        """Refuse a meeting of all workers inside an epoch of which each makes another number of steps.

        Raises:
            ConfigurationError: inside a step; of ``all_gather`` always, whose result a loss is made of.
        """
        if self.world_size == 1 or not self.in_a_batch:
            return
        if name == "all_gather":
            raise ConfigurationError(
                "AsyncStrategy got all_gather inside a step, which would make all workers wait for each other in every "
                "step. Gather at the end of the epoch, in on_train_epoch_end. A loss of the batches of all workers (a "
                "contrastive one) needs a synchronous strategy, such as strategy='sync_sgd'; share_epoch=False does "
                "not help."
            )
        self._refuse_while_sharing(name)

    def _refuse_while_sharing(self, what: str) -> None:
        if self._epochs is not None and self.in_a_batch:
            raise ConfigurationError(
                f"AsyncStrategy got {what} inside a step, where each worker makes another number of steps and nobody "
                "waits for the others. Do it at the end of the epoch, in on_train_epoch_end, or pass share_epoch=False "
                "to the strategy: all workers make equally many steps then, and wait for each other there."
            )

    def before_reductions(self, trainer: Trainer) -> None:
        results = private.results_of(trainer)
        if results is None or self._communicator is None:
            return
        if len(self._trainers) < self.world_size:
            module = self.lightning_module
            assert module is not None
            with self._named_failures(), shared_names(results, module, self._trains, self._communicator.gather):
                trainer.callback_metrics  # noqa: B018  # reduces them
            return
        with self._named_failures():
            alone = agree_on_names(results, self._communicator.gather)
        if alone and not self._told.issuperset(alone):
            self._told.update(alone)
            rank_zero_warn(
                f"log(..., sync_dist=True) of {', '.join(alone)} was called by some workers only, which have made more "
                "steps than others: what each has logged is its own. Log it in every step, or in on_train_epoch_end."
            )

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self.in_a_batch and not self._deciding:
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    "log(..., on_step=True, sync_dist=True) in training would make all workers wait for each other in "
                    "every step: with an asynchronous strategy each worker logs its own value."
                )
            return tensor
        return super().reduce(tensor, group, reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self._deciding = True  # a checkpoint by steps, which all workers make together
        try:
            return super().reduce_boolean_decision(decision, all)
        finally:
            self._deciding = False
