"""Another normalization in the place of BatchNorm, without a change to the model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization import (
    AbstractNormalization,
    FullNormalization,
    SyncNormalization,
    average_statistics,
    full_norm_layers,
    keep_statistics_local,
    set_loss_scale,
)
from lightning_decentral.strategies import AbstractDecentralizedStrategy, AsyncStrategy, SimulatedStrategy


class NormalizationSwap(Callback):
    """Replaces every BatchNorm of the model, before optimizers are made and before a checkpoint is loaded.

    Weights, and running moments where the new layer has some, are taken over; a checkpoint of the model with BatchNorm
    loads into FullNorm and BatchRenorm. For FullNorm it also does what the layer cannot know:

    * the loss scale of a GradScaler and of accumulated batches is told to the layers before each batch (on a GPU, with
      a GradScaler, reading it waits for the device);
    * under Lightning's ``ddp``, each worker keeps its own estimates, where DDP would overwrite them by rank 0's; they
      are averaged over the workers before each validation and at the end of each epoch;
    * under a strategy of this package they are buffers like all others: each worker has its own, and evaluation and
      checkpoints use their mean.

    Args:
        to: what takes BatchNorm's place.
        sync_every_n_steps: with FullNorm, average the four estimates over all workers every so many batches, by one
            all-reduce of 4 numbers per channel; 1 for workers whose data differ much. ``None``: only as said above.

    Raises:
        ConfigurationError: the model has no BatchNorm when training, validation or test begin (one that is made in
            ``configure_model`` or in the module's own ``setup`` is not there yet); a number of steps with another layer
            than FullNorm, or with a strategy whose workers must not wait for each other; SyncBatchNorm without CUDA.

    Example:
        >>> callback = NormalizationSwap(FullNormalization(forward_momentum=0.05, backward_momentum=0.05))
    """

    def __init__(self, to: AbstractNormalization | None = None, sync_every_n_steps: int | None = None) -> None:
        to = FullNormalization() if to is None else to
        if sync_every_n_steps is not None and (sync_every_n_steps < 1 or not isinstance(to, FullNormalization)):
            raise ConfigurationError(
                f"NormalizationSwap(to={to}, sync_every_n_steps={sync_every_n_steps}): needs at least 1, and "
                "FullNormalization, whose estimates can be averaged. Leave it out otherwise."
            )
        self.to = to
        self.sync_every_n_steps = sync_every_n_steps
        self._swapped: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if isinstance(self.to, SyncNormalization) and strategy.root_device.type != "cuda":
            raise ConfigurationError(
                f"NormalizationSwap(to={self.to}): needs CUDA devices, got {strategy.root_device}. torch has no "
                "SyncBatchNorm for them; FullNormalization with sync_every_n_steps=1 runs everywhere."
            )
        if self.sync_every_n_steps is not None and isinstance(strategy, AsyncStrategy | SimulatedStrategy):
            raise ConfigurationError(
                f"NormalizationSwap(sync_every_n_steps={self.sync_every_n_steps}) makes all workers meet, which cannot "
                f"be under {type(strategy).__name__}. Leave it out: the estimates are averaged for evaluation."
            )
        if self._swapped is not pl_module:
            self.to.convert(pl_module)
            self._swapped = pl_module
        if isinstance(strategy, DDPStrategy) and full_norm_layers(pl_module):
            keep_statistics_local(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        scale = 1.0 if trainer.scaler is None else float(trainer.scaler.get_scale())
        set_loss_scale(pl_module, scale / trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.sync_every_n_steps is not None and (batch_idx + 1) % self.sync_every_n_steps == 0:
            self._average(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not isinstance(trainer.strategy, AbstractDecentralizedStrategy):
            self._average(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.strategy, AbstractDecentralizedStrategy):
            self._average(trainer, pl_module)  # before ModelCheckpoint, which Lightning puts last, saves rank 0's

    def _average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 and isinstance(self.to, FullNormalization):
            average_statistics(pl_module, trainer.strategy.reduce)
