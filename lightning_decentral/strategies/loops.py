"""What the ends of epochs and runs have to know of Lightning's private loops: all of it is here, by name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.trainer import call

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.transport.connections import gather_objects

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
    """Whether Lightning begins no further epoch; its own `done` says so in a message as well."""
    fit: Any = trainer.fit_loop
    epochs = fit.max_epochs is not None and 0 <= fit.max_epochs <= fit.epoch_progress.current.processed
    return epochs or has_made_its_steps(fit.epoch_loop) or bool(trainer.should_stop and fit._can_stop_early)


def has_made_its_steps(loop: Any) -> bool:
    """Whether ``max_steps`` is reached."""
    return bool(0 <= loop.max_steps <= loop.global_step)


def only_resumes_validation(loop: Any, fetcher: Any) -> bool:
    """Whether a resumed run goes on with a validation now, and not with a batch."""
    return bool(
        loop.restarting
        and loop._should_check_val_fx(fetcher)
        and (loop.val_loop.restarted_mid_evaluation or loop.restarted_on_last)
    )


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
    """Whether it is the end of an epoch, and not a number of batches, that is followed by a validation."""
    unknown = trainer.val_check_batch == float("inf")
    return unknown or isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)


def validate(trainer: Trainer) -> None:
    """Validate in the middle of training, as the epoch's loop does."""
    connector = trainer._logger_connector
    trainer.validating = True
    first_iteration = connector._first_loop_iter
    call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration


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


def makes_meetings(callback: Any) -> bool:
    """Whether a callback may do something together with other workers after a batch."""
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
        if not fit._can_stop_early:
            fit.max_epochs = fit.epoch_progress.current.processed
