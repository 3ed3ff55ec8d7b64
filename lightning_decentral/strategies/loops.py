"""What the ends of epochs and runs have to know of how Lightning's loops go; their private names are elsewhere."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder, ProgressBar, Timer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.transport.gathering import gather_objects

_KNOWN = ("lightning", "pytorch_lightning", "lightning_decentral")  # whose hooks before a batch leave weights alone
_SAME_EVERYWHERE = (
    "limit_train_batches",
    "limit_val_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "reload_dataloaders_every_n_epochs",
    "accumulate_grad_batches",
)  # settings of the Trainer that decide when workers meet


def is_over(trainer: Trainer) -> bool:
    """Tell whether Lightning begins no further epoch; its own `done` says so in a message as well."""
    fit: Any = trainer.fit_loop
    epochs = fit.max_epochs is not None and 0 <= fit.max_epochs <= fit.epoch_progress.current.processed
    return epochs or has_made_its_steps(fit.epoch_loop) or bool(trainer.should_stop and private.can_stop_early(trainer))


def epochs_made(trainer: Trainer) -> int:
    """Tell how many epochs' batches are over, as Lightning tells samplers; those before a checkpoint too."""
    fit: Any = trainer.fit_loop
    return int(fit.epoch_progress.current.processed)


def has_made_its_steps(loop: Any) -> bool:
    """Tell whether ``max_steps`` is reached."""
    return bool(0 <= loop.max_steps <= loop.global_step)


def only_resumes_validation(trainer: Trainer, fetcher: Any) -> bool:
    """Tell whether a resumed run goes on with a validation now, and not with a batch."""
    loop = trainer.fit_loop.epoch_loop
    return bool(
        loop.restarting
        and private.validates_now(trainer, fetcher)
        and (loop.val_loop.restarted_mid_evaluation or loop.restarted_on_last)
    )


def searches_for_rate(trainer: Trainer) -> bool:
    """Tell whether a search for a learning rate comes before training, by a callback or a tuner."""
    return any(isinstance(each, LearningRateFinder) for each in trainer.callbacks)  # type: ignore[attr-defined]


def set_length(trainer: Trainer, length: float) -> None:
    """Let an epoch have so many batches, and validations at the places that follow from it."""
    trainer.fit_loop.max_batches = length
    if not isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = trainer.val_check_interval  # Lightning has not set it if there is no batch
    elif length < float("inf"):
        trainer.val_check_batch = max(1, int(length * trainer.val_check_interval))
    else:
        trainer.val_check_batch = float("inf")


def validates_at_end(trainer: Trainer) -> bool:
    """Tell whether it is the end of an epoch, and not a number of batches, that is followed by a validation."""
    unknown = trainer.val_check_batch == float("inf")
    return unknown or private.takes_iterator(private.data_fetcher(trainer))


def validate(trainer: Trainer) -> None:
    """Validate in the middle of training, as the epoch's loop does."""
    trainer.validating = True
    first_iteration = private.is_first_iteration(trainer)
    private.call_module(trainer, "on_validation_model_zero_grad")
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    private.set_first_iteration(trainer, first_iteration)


def count_batches(loop: Any, batches: int) -> None:
    """Set the counts of batches of this epoch to those of the other workers."""
    current, total = loop.batch_progress.current, loop.batch_progress.total
    for name in ("ready", "started", "processed", "completed"):
        setattr(total, name, getattr(total, name) + batches - getattr(current, name))
        setattr(current, name, batches)


def count_updates(trainer: Trainer, number: int) -> None:
    """Count updates of optimizers, as ``trainer.global_step`` does."""
    loop = trainer.fit_loop.epoch_loop
    if number <= 0:
        return
    if trainer.lightning_module.automatic_optimization:
        loop.automatic_optimization.optim_progress.optimizer.step.increment_by(number)
    else:
        loop.manual_optimization.optim_step_progress.increment_by(number)


def step_schedules(trainer: Trainer, before: int, now: int) -> None:
    """Make the steps of schedules that belong to some batches.

    Args:
        trainer: whose schedules.
        before: batches of this epoch that were made before.
        now: batches that are made by now.
    """
    loop, share = trainer.fit_loop.epoch_loop, int(trainer.num_training_batches)
    for batch in range(before, now):
        if (batch + 1) % trainer.accumulate_grad_batches and batch + 1 != share:
            continue
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau and (batch + 1) % config.frequency == 0:
                loop.scheduler_progress.increment_ready()
                private.call_module(trainer, "lr_scheduler_step", config.scheduler, None)
                loop.scheduler_progress.increment_completed()


def makes_meetings(callback: Any) -> bool:
    """Tell whether a callback may do something together with other workers after a batch."""
    ours = type(callback).__module__.partition(".")[0] == __name__.partition(".")[0]
    return ours or isinstance(callback, (Checkpoint, Timer, ProgressBar))


def require_same_settings(trainer: Trainer) -> None:
    """Refuse workers that would meet at different times."""
    settings = {name: getattr(trainer, name, None) for name in _SAME_EVERYWHERE}
    for rank, others in enumerate(gather_objects(settings)):
        for name, value in others.items():
            if value != settings[name]:
                raise ConfigurationError(
                    f"Trainer({name}={settings[name]!r}) on worker {trainer.global_rank} is {value!r} on worker "
                    f"{rank}, but all workers validate and step together. Give all workers the same."
                )


def end_run(trainer: Trainer) -> None:
    """Let Lightning begin no further epoch."""
    fit: Any = trainer.fit_loop
    if not is_over(trainer):
        trainer.should_stop = True
        if not private.can_stop_early(trainer):
            fit.max_epochs = fit.epoch_progress.current.processed


def may_change_weights_before_batch(trainer: Trainer) -> bool:
    """Tell whether code that is neither Lightning's nor ours runs between loading a batch and the step, or may end it.

    A module that takes the loader's iterator loads its batches itself, and nobody knows which one is the last.
    """
    if private.takes_iterator(private.data_fetcher(trainer)):
        return True
    hooks = [each.on_train_batch_start for each in (*trainer.callbacks, trainer.lightning_module)]  # type: ignore[attr-defined]
    return any(hook.__module__.partition(".")[0] not in _KNOWN for hook in hooks)
