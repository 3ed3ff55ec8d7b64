"""The strategy for asynchronous algorithms."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy, StartMethod
from lightning_decentral.strategies.shared_epoch import share_epoch
from lightning_decentral.transport.process_group import Communicator, Stepper


class AsyncStrategy(AbstractDecentralizedStrategy):
    """Trains with an asynchronous algorithm: inside an epoch, nobody waits for a slower worker.

    Workers of unequal speed share one epoch of data: whoever is free takes the next batch. They meet at the end of each
    epoch, for validation and checkpoints. Needs a map-style data set; where the shared epoch is not possible (see
    ``share_epoch``), every worker takes an equal shard and the fast ones wait at the end of the epoch.

    Args:
        algorithm: the method; `ADPSGD` by default.
        share_epoch: whether workers share one epoch of data. Falls back to equal shards, and says so, with
            ``max_steps``, ``limit_train_batches``, a ``val_check_interval`` or checkpoints by steps, `OneCycleLR`,
            several training loaders, or an own sampler: these count each worker's steps, which must then be equal.
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

    Raises:
        ConfigurationError: if the algorithm is synchronous, its topology does not fit, or the ``Trainer`` has a setting
            that makes all workers wait for each other in every step (``sync_batchnorm``, ``max_time``).
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
            shared_memory=False,  # calls have connections of their own
        )
        self.share_epoch = share_epoch
        self._deciding = False
        self._shares = False
        self._warned = False

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if self._layer_sync is not None:
            raise ConfigurationError(
                "AsyncStrategy got Trainer(sync_batchnorm=True), which makes all workers wait for each other in every "
                "forward pass. Leave it out: buffers are averaged for evaluation. GroupNorm does without batches."
            )

    def check_trainer(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Timer):
                raise ConfigurationError(
                    "AsyncStrategy got the Timer callback (or Trainer(max_time=...)), which makes all workers wait for "
                    "each other in every step. Use max_epochs."
                )
            if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
                raise ConfigurationError(
                    "AsyncStrategy got ModelCheckpoint(train_time_interval=...), which makes all workers wait for each "
                    "other in every step. Use every_n_epochs."
                )

    def connect_workers(self, communicator: Communicator, steppers: list[Stepper]) -> None:
        assert isinstance(self.algorithm, AbstractAsynchronousAlgorithm)
        communicator.open_edges(self.algorithm, steppers)

    def quiesce(self) -> None:
        """Wait for everybody to be between steps: then no call is under way, and the mean is the mean."""
        assert self._communicator is not None
        self._communicator.drain()
        self._communicator.barrier()

    def replace_stepper(self, index: int, optimizer: Optimizer, stepper: Stepper) -> None:
        raise ConfigurationError(
            f"{type(optimizer).__name__} now has {len(optimizer.param_groups)} groups with other trainable parameters "
            "than at the start, but asynchronous workers would unfreeze them at different times. Unfreeze before "
            "fit, or use GossipStrategy."
        )

    def change_optimizers(self) -> None:
        raise ConfigurationError(
            f"There are {len(self.optimizers)} optimizers now, {len(self._steppers)} at the start, but asynchronous "
            "workers would change them at different times. Use as many all the time, or GossipStrategy."
        )

    # -- data ---------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self._communicator is not None
        assert self.lightning_module is not None
        self._communicator.barrier()  # a callback may have set weights until here: nobody calls before all are ready
        trainer = self.lightning_module.trainer
        combined = trainer.fit_loop._combined_loader
        if self.world_size == 1 or not self.share_epoch or combined is None:
            return
        reason = _why_not_shared(trainer, len(combined.flattened))
        if reason is None and not self._share(combined.flattened[0]):
            reason = "it needs a map-style data set and Lightning's own distributed sampler"
        if reason is not None:
            rank_zero_info(f"The workers do not share epochs: {reason}. Every worker takes an equal shard.")
            return
        # Only now, and not when the loader is made: until here it has a length, from which learning-rate schedules are
        # computed. From here on, how many batches a worker takes is known at the end of the epoch.
        self._shares = True
        combined.limits = [float("inf")]
        trainer.fit_loop.max_batches = trainer.val_check_batch = float("inf")
        combined.flattened[0].batch_sampler.sampler.set_epoch(trainer.current_epoch)
        assert trainer.fit_loop._data_fetcher is not None
        iter(trainer.fit_loop._data_fetcher)

    def process_dataloader(self, dataloader: Any) -> Any:
        dataloader = super().process_dataloader(dataloader)
        assert self.lightning_module is not None
        if self._shares and self.lightning_module.trainer.state.stage == RunningStage.TRAINING:
            self._share(dataloader)  # reloaded in the middle of training
        return dataloader

    def _share(self, dataloader: Any) -> bool:
        return isinstance(dataloader, DataLoader) and share_epoch(
            dataloader, self.global_rank, self.world_size, self._claim_batch
        )

    def teardown(self) -> None:
        self._shares = False
        super().teardown()

    def _claim_batch(self, epoch: int) -> int:
        assert self._communicator is not None
        with self._named_failures():
            return int(self._communicator.store.add(f"epoch/{epoch}", 1)) - 1

    # -- no barrier inside an epoch -----------------------------------------------------------------------------------

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self._in_a_batch() and not self._deciding:
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

    def _in_a_batch(self) -> bool:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        return trainer.state.stage == RunningStage.TRAINING and progress.started > progress.completed


def _why_not_shared(trainer: Trainer, loaders: int) -> str | None:
    if trainer.max_steps != -1:
        return "max_steps counts each worker's own steps"
    if trainer.limit_train_batches != 1.0 or trainer.overfit_batches:
        return "limit_train_batches and overfit_batches count each worker's own batches"
    if trainer.val_check_interval not in (1.0, None) or trainer.check_val_every_n_epoch is None:
        return "val_check_interval counts each worker's own batches"
    if any(isinstance(config.scheduler, OneCycleLR) for config in trainer.lr_scheduler_configs):
        return "OneCycleLR allows each worker an exact number of steps"
    if loaders != 1:
        return "there are several training loaders"
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps:
            return "ModelCheckpoint(every_n_train_steps=...) counts each worker's own steps"
    return None
