"""Settings and callbacks of Lightning in a pipeline: which are refused before training, and what they look at."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import LBFGS, Optimizer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies import lightning_private as private

_PARTS = (
    "To divide a batch that does not fit, load larger ones and use a schedule with micro-batches: pipe_2bw, gpipe or "
    "one_f_one_b, with parts=."
)


def check_settings(trainer: Trainer, module: LightningModule, strategy: DDPStrategy, through_stages: bool) -> None:
    """Refuse what would need a lock in each step, or the gradient or the weights of a whole batch on one worker.

    Args:
        trainer: with its callbacks.
        module: that is trained.
        strategy: of the pipeline.
        through_stages: whether evaluations go through the stages, so that no worker has all weights between epochs.

    Raises:
        ConfigurationError: with the setting, and what to write instead.
    """
    for words in _refusals(trainer, module, strategy):
        raise ConfigurationError(f"PipelineStrategy got {words}")
    if strategy.world_size > 1:
        for callback in _callbacks(trainer):
            _check_callback(callback, through_stages)


def _refusals(trainer: Trainer, module: LightningModule, strategy: DDPStrategy) -> Iterator[str]:
    name = type(module).__name__
    if not module.automatic_optimization:
        yield (
            f"{name} with manual optimization, and needs automatic optimization: which batch's gradient is there when "
            "is the schedule's. Leave automatic_optimization as it is, with one optimizer."
        )
    if trainer.accumulate_grad_batches != 1:
        yield f"accumulate_grad_batches={trainer.accumulate_grad_batches}, and needs 1. {_PARTS}"
    for callback in _callbacks(trainer):
        if isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches():
            yield f"a GradientAccumulationScheduler with {callback.scheduling}, and needs 1 in each epoch. {_PARTS}"
    if getattr(strategy.precision_plugin, "scaler", None) is not None:
        yield (
            "a precision whose gradients are scaled, by another factor on each worker, and needs one without: "
            'precision="bf16-mixed" or "32-true".'
        )
    if private.synchronizes_batch_norm(strategy):
        yield (
            "sync_batchnorm=True, with which all workers would meet in each layer, though each has other layers. Leave "
            "it out."
        )
    if private.validates_by_the_clock(trainer):
        yield (
            "a val_check_interval in time, but each worker has its own clock, and all must validate together. Use a "
            "number of batches, or check_val_every_n_epoch."
        )
    if type(module).backward is not LightningModule.backward:
        yield (
            f"{name} with a `backward` of its own, and makes the backward pass itself, stage by stage. Remove it, or "
            "use hooks of tensors."
        )


def _check_callback(callback: Callback, through_stages: bool) -> None:
    if through_stages and isinstance(callback, StochasticWeightAveraging):
        raise ConfigurationError(
            'PipelineStrategy(evaluate="stages") got the callback StochasticWeightAveraging, which reads all weights '
            'at the ends of epochs, and no worker has all of them then. Use evaluate="whole", or leave it out.'
        )
    if isinstance(callback, WeightAveraging):
        raise ConfigurationError(
            f"PipelineStrategy got the callback {type(callback).__name__}, which reads all weights after each batch, "
            "and no worker has all of them then. Average at the ends of epochs, with StochasticWeightAveraging; or use "
            "one process, with devices=1 and stages=."
        )
    if isinstance(callback, SpikeDetection):
        raise ConfigurationError(
            f"PipelineStrategy got the callback {type(callback).__name__}, for which all workers meet after each batch "
            "and compare its loss, and only the last stage's worker has that. Look at the loss that is logged: "
            "EarlyStopping(monitor=..., check_finite=True, check_on_train_epoch_end=True)."
        )
    if isinstance(callback, ModelCheckpoint) and callback.monitor and private.saves_by_the_clock(callback):
        raise ConfigurationError(
            f"PipelineStrategy got a ModelCheckpoint that looks at {callback.monitor!r} after a time, when other "
            "workers than the last stage's do not know it. Use every_n_train_steps, or leave monitor out."
        )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def check_optimizers(optimizers: list[Optimizer]) -> None:
    """Refuse an optimizer that asks for several gradients of one batch.

    Raises:
        ConfigurationError: if there is one.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ConfigurationError(
                "PipelineStrategy got LBFGS, which asks for the gradient of a batch several times, and needs an "
                "optimizer that asks once. Use another one."
            )


def check_last_batch(trainer: Trainer, parts: int, alike: bool) -> None:
    """Refuse an epoch whose last batch has fewer rows than micro-batches, before its first batch.

    Args:
        trainer: with its loaders.
        parts: micro-batches of a batch.
        alike: whether all batches need as many rows as the first.

    Raises:
        ConfigurationError: if there is one, as far as loaders tell.
    """
    loaders = private.combined_loader(trainer).flattened if parts > 1 or alike else []
    for loader in loaders:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            continue
        batches = loader.batch_sampler
        if type(batches) is not BatchSampler or batches.drop_last or trainer.num_training_batches < len(batches):
            continue
        rows = len(batches.sampler) % batches.batch_size  # type: ignore[arg-type]
        if rows and alike:
            raise ConfigurationError(
                f"PipelineStrategy(traced=True) got {len(batches.sampler)} samples in batches of "  # type: ignore[arg-type]
                f"{batches.batch_size}, the last of which has {rows} rows, and needs all to be alike. Use "
                "drop_last=True, or name the blocks with configure_stages()."
            )
        if 0 < rows < parts:
            raise ConfigurationError(
                f"PipelineStrategy got {len(batches.sampler)} samples in batches of "  # type: ignore[arg-type]
                f"{batches.batch_size}, the last of which has {rows} rows, and needs {parts} in each: one for each "
                "micro-batch. Use drop_last=True, another batch_size, or fewer micro-batches (parts=)."
            )


def is_looked_at(trainer: Trainer) -> bool:
    """Tell whether a callback or a scheduler looks at metrics after this batch, on every worker."""
    step, batch = trainer.global_step + 1, trainer.fit_loop.batch_idx + 1
    saves = any(
        isinstance(callback, ModelCheckpoint)
        and callback.monitor is not None
        and (every := private.saves_every_steps(callback))
        and step % every == 0
        for callback in _callbacks(trainer)
    )
    return saves or any(
        config.reduce_on_plateau and config.interval == "step" and batch % config.frequency == 0
        for config in trainer.lr_scheduler_configs
    )
