"""What `CLARS` needs to know of the micro-batches."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import CLARS
from lightning_decentral.strategies import AbstractDecentralizedStrategy


class MicroBatchNorms(Callback):
    """Lets `CLARS` see the gradient of every micro-batch: the parts of an accumulation, the workers of DDP, or both.

    Norms are taken in the backward pass, of each worker's own gradient before DDP averages it and before it is added
    to those of earlier micro-batches. With several workers, one all-reduce in a step, of one number for each layer.
    Loss scaling (``precision="16-mixed"``) is taken out.

    The more micro-batches, the better the estimate; with a single one CLARS is LARS with an upper bound.

    Raises:
        ConfigurationError: No optimizer is a `CLARS`; or a strategy other than one device and DDP, where a worker's
            gradient is not its part of the mean.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[MicroBatchNorms()], accumulate_grad_batches=8, accelerator="cpu", devices=1,
        ...                   logger=False, enable_checkpointing=False, enable_progress_bar=False)
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew in every epoch, because callbacks that unfreeze layers do so between epochs."""
        strategy = trainer.strategy
        if isinstance(strategy, AbstractDecentralizedStrategy) or not isinstance(
            strategy, (SingleDeviceStrategy, DDPStrategy)
        ):
            raise ConfigurationError(
                f"MicroBatchNorms got {type(strategy).__name__}; it needs gradients that are the mean of those of the "
                'workers. Use strategy="ddp" or one device.'
            )
        optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, CLARS)]
        if not optimizers:
            names = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise ConfigurationError(
                f"MicroBatchNorms needs an optimizer of the type CLARS, got {names}. Return one from "
                "configure_optimizers, or remove the callback."
            )

        def mean_over_workers(sums: Tensor) -> Tensor:
            mean = strategy.reduce(sums, reduce_op="mean")
            assert isinstance(mean, Tensor)
            precision = trainer.precision_plugin
            if isinstance(precision, MixedPrecision) and precision.scaler is not None:
                mean = mean / precision.scaler.get_scale()  # the loss was multiplied by it
            return mean

        for optimizer in optimizers:
            optimizer.observe(mean_over_workers)
