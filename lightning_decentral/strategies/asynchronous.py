"""The strategy for asynchronous algorithms."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy, StartMethod, require_equal
from lightning_decentral.strategies.epoch_metrics import EpochMetrics, agree_on_names
from lightning_decentral.strategies.joint_stop import JointStop
from lightning_decentral.strategies.poisoned import Poisoned, check_poisoned, inspect_messages
from lightning_decentral.strategies.shared_epoch import SharedEpochs, why_not_shared
from lightning_decentral.transport.communicator import Communicator


class AsyncStrategy(AbstractDecentralizedStrategy):
    """Trains with an asynchronous algorithm: inside an epoch, nobody waits for a slower worker.

    Workers of unequal speed share one epoch of data: whoever is free takes the next batch. They meet at the end of each
    epoch, for validation and checkpoints. Needs a map-style data set; where the shared epoch is not possible (see
    ``share_epoch``), every worker takes an equal shard and the fast ones wait at the end of the epoch.

    Args:
        algorithm: the method; `ADPSGD` by default.
        share_epoch: whether workers share one epoch of data. Falls back to equal shards, and says so, with
            ``max_steps``, ``limit_train_batches``, a ``val_check_interval`` or checkpoints by steps, several training
            loaders, or an own sampler: these count each worker's steps, which must then be equal.
        process_group_backend: ``"gloo"`` or ``"nccl"``, for the end of the epoch; the exchanges themselves always use
            gloo connections between pairs.
        timeout: for what all workers do together at the end of an epoch, waiting for the slowest included.
        exchange_timeout_seconds: after which an exchange has failed and the peer is named. A peer answers while it
            computes: this is for the network alone.
        start_method: how worker processes are started.
        resume: ``"exact"``: every worker goes on from its own file, and a missing or damaged one is an error.
            ``"consensus"``: all start from the averaged model of the main file.
        worker_checkpoints: whether each worker writes its own state beside a checkpoint.
        average_at_end: whether the model is the consensus once ``fit`` has returned.
        seed: of the algorithm's random choices; all workers must have the same.
        shared_memory: whether workers of one host call each other in memory that they share (Linux) instead of through
            TCP, if the algorithm's answers depend on the parameters only (``answers_in_parts``). The caller does the
            averaging at both ends; the one that is called is not even woken.
        poisoned: what happens to a received model that is not finite, which a worker whose loss has become NaN sends.
            ``"warn"``: whoever receives it names worker, step and parameter, and goes on; it spreads. ``"refuse"``: the
            same, but what is not finite is left out, of averages with others (part by part, where calls are answered
            so) and of the consensus. ``"raise"``: `PoisonedMessage`, which ends the run. These two read all of
            each received model; to warn, a large one is read in part, all of it within 16 messages.

    Raises:
        ConfigurationError: if the algorithm is synchronous, its topology does not fit, or the ``Trainer`` has a setting
            that makes all workers wait for each other in every step (``sync_batchnorm``, ``train_time_interval``); in
            training, if user code does (``self.all_gather`` in ``training_step``).
        PeerLost: if a worker is killed or cut off.
        WorkerFailed: if another worker raised an exception.

    Example:
        >>> from lightning_decentral.algorithms import ADPSGD
        >>> strategy = AsyncStrategy(ADPSGD())
    """

    begins_before_batch = False  # its gradient would be of an older model

    def __init__(
        self,
        algorithm: AbstractAlgorithm | None = None,
        share_epoch: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        exchange_timeout_seconds: float = 300.0,
        start_method: StartMethod = "popen",
        resume: Literal["exact", "consensus"] = "exact",
        worker_checkpoints: bool = True,
        average_at_end: bool = True,
        seed: int = 0,
        shared_memory: bool = True,
        poisoned: Poisoned = "warn",
    ) -> None:
        algorithm = ADPSGD() if algorithm is None else algorithm
        if not isinstance(algorithm, AbstractAsynchronousAlgorithm):
            raise ConfigurationError(
                f"AsyncStrategy needs an asynchronous algorithm, got {algorithm!r}. Use GossipStrategy for it."
            )
        super().__init__(
            algorithm,
            process_group_backend=process_group_backend,
            timeout=timeout,
            exchange_timeout_seconds=exchange_timeout_seconds,
            start_method=start_method,
            resume=resume,
            worker_checkpoints=worker_checkpoints,
            average_at_end=average_at_end,
            seed=seed,
            shared_memory=shared_memory,
        )
        check_poisoned("AsyncStrategy", poisoned)
        self.poisoned = poisoned
        self.share_epoch = share_epoch
        self._deciding = False
        self._epochs: SharedEpochs | None = None
        self._joint_stop: JointStop | None = None
        self._metrics: EpochMetrics | None = None
        self._warned = False
        self._runs = 0
        self._told: set[str] = set()

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if self._layer_sync is not None:
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
            if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
                raise ConfigurationError(
                    "AsyncStrategy got ModelCheckpoint(train_time_interval=...), which makes all workers wait for each "
                    "other in every step. Use every_n_epochs."
                )
        for name, module in trainer.lightning_module.named_modules():
            if isinstance(module, torch.nn.SyncBatchNorm):
                raise ConfigurationError(
                    f"AsyncStrategy got {name}, a SyncBatchNorm, which makes all workers wait for each other in every "
                    "forward pass. Use BatchNorm: buffers are averaged for evaluation. GroupNorm does without batches."
                )
            if isinstance(module, Metric) and module.dist_sync_on_step:
                raise ConfigurationError(
                    f"AsyncStrategy got {name}, a {type(module).__name__}(dist_sync_on_step=True), which makes all "
                    "workers wait for each other in every step. Leave it out: the metric of an epoch is that of all "
                    "workers."
                )

    def connect_workers(self, communicator: Communicator, steppers: list[Stepper]) -> None:
        assert isinstance(self.algorithm, AbstractAsynchronousAlgorithm)
        assert self.lightning_module is not None
        if self.world_size > 1:
            inspect_messages(self.poisoned, self.lightning_module, communicator, steppers)
        communicator.open_edges(self.algorithm, steppers)

    def quiesce(self, what: str = "a meeting of all workers") -> None:
        """Wait for everybody to be between steps: then no call is under way, and the mean is the mean."""
        assert self._communicator is not None
        self._refuse_while_sharing(what)
        self._communicator.drain()
        self._communicator.barrier(what)
        for stepper in self._steppers:
            stepper.settle()  # user code sees what late calls have changed

    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        """All workers have other parameters from the beginning of this epoch on: they begin anew with these, together.

        Nobody calls meanwhile, and what they answer from then on is the new model.
        """
        assert self._communicator is not None
        assert self.lightning_module is not None
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
        successor.worker.rng.setstate(stepper.worker.rng.getstate())
        self._steppers[index] = successor
        self._communicator.lend(successor)
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
        if begins and self._communicator is not None and self._epochs is not None:
            self._communicator.barrier("the beginning of an epoch")

    # -- data ---------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self._communicator is not None
        assert self.lightning_module is not None
        self._communicator.barrier("the start of training")  # a callback may have set weights: nobody calls before
        trainer = self.lightning_module.trainer
        combined = trainer.fit_loop._combined_loader
        if self._communicator.watch is None or combined is None:
            return
        self._leave_loop()  # a search ran in it before
        self._runs += 1
        self._joint_stop = JointStop(trainer, self._communicator.watch, self._runs)
        self._metrics = EpochMetrics(self.lightning_module, lambda: not self.in_a_batch, self.gather_rows)
        if not self.share_epoch:
            return
        epochs = SharedEpochs(trainer, self.global_rank, self.world_size, self._claim_batch)
        reason = why_not_shared(trainer)
        if reason is None and not epochs.share(combined.flattened[0]):
            reason = "it needs a map-style data set and Lightning's own distributed sampler"
        if reason is not None:
            rank_zero_info(f"The workers do not share epochs: {reason}. Every worker takes an equal shard.")
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        goes_on = trainer.fit_loop.restarting and not progress.is_last_batch
        used = self._communicator.agree(progress.current.processed if goes_on else 0, "sum")
        self._epochs = epochs
        epochs.start(int(used))

    def process_dataloader(self, dataloader: Any) -> Any:
        dataloader = super().process_dataloader(dataloader)
        assert self.lightning_module is not None
        if self._epochs is not None and self.lightning_module.trainer.state.stage == RunningStage.TRAINING:
            self._epochs.share(dataloader)  # reloaded in the middle of training
        return dataloader

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
        if self._joint_stop is not None:
            self._joint_stop.close()
        if self._metrics is not None:
            self._metrics.close()
        self._epochs, self._joint_stop, self._metrics = None, None, None

    def _claim_batch(self, epoch: int) -> int:
        assert self._communicator is not None
        with self._named_failures():
            return int(self._communicator.store.add(f"epoch/{self._runs}/{epoch}", 1)) - 1

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
        results = trainer._results
        if results is None or self._communicator is None:
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
