"""Every private name of Lightning, and of torch's tensors and modules, that strategies and callbacks read or replace.

There is one function for each name, so that a release of Lightning that drops or renames one is noticed here and
nowhere else: the function then says which name it is, and which releases are known to have it. `replace` is for methods
of Lightning's loops: they have public names, but the loops' classes are private, and nobody has promised that the
methods stay.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import lightning
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies.log import log

LOWEST, NEWEST = "2.6.6", "2.6.6"
"""The releases of Lightning between which every name here is known to be there."""

Undo = Callable[[], None]
"""Puts back what was there before."""


def _gone(name: str, owner: str) -> str:
    known = LOWEST if LOWEST == NEWEST else f"{LOWEST} to {NEWEST}"
    return (
        f"lightning_decentral got Lightning {lightning.__version__}, in which {owner} has no {name!r}, and needs a "
        f"release that has it: {known}. Install it (pip install lightning=={NEWEST}), or a newer lightning_decentral."
    )


try:
    from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
except ImportError as error:
    raise ConfigurationError(_gone(str(error).split("'")[1], "lightning.pytorch.loops.fetchers")) from error

PrefetchDataFetcher = _PrefetchDataFetcher
"""What asks for a batch before the last one is used."""


def _get(owner: Any, name: str) -> Any:
    """Return what an object has under a name.

    Raises:
        ConfigurationError: if it has nothing there.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise ConfigurationError(_gone(name, type(owner).__name__)) from error


def replace(owner: Any, name: str, function: Callable[..., Any]) -> Undo:
    """Put a function in the place of a method of one object.

    Args:
        owner: a loop, a connector or a callback.
        name: of the method.
        function: is called instead, without the object.

    Returns:
        What undoes it; calling that again does no harm.

    Raises:
        ConfigurationError: if there is no such method.
    """
    _get(owner, name)
    own = vars(owner)
    before = {name: own[name]} if name in own else {}
    setattr(owner, name, function)

    def undo() -> None:
        own.pop(name, None)
        own.update(before)
        before.clear()

    return undo


# -- a module and its strategy ----------------------------------------------------------------------------------------


def trainer_of(module: LightningModule | None) -> Trainer | None:
    """Return the trainer that a module is attached to, if any: `trainer` of the module raises an error without one."""
    found: Trainer | None = None if module is None else _get(module, "_trainer")
    return found


def logs_hyperparameters(source: Any) -> bool:
    """Tell whether a module or data module lets its hyper-parameters be logged."""
    return bool(_get(source, "_log_hyperparams"))


def timeout_of(strategy: DDPStrategy) -> timedelta | None:
    """Return how long what all workers do together may take."""
    found: timedelta | None = _get(strategy, "_timeout")
    return found


def backend_of(strategy: DDPStrategy) -> str:
    """Return the name of the process group's backend, also before there is a group."""
    return str(_get(strategy, "_get_process_group_backend")())


def synchronizes_batch_norm(strategy: DDPStrategy) -> bool:
    """Tell whether the Trainer was given ``sync_batchnorm=True``."""
    return _get(strategy, "_layer_sync") is not None


# -- the loop of the epochs -------------------------------------------------------------------------------------------


def combined_loader(trainer: Trainer) -> Any:
    """Return the loaders for training, as one; ``None`` before they are made."""
    return _get(trainer.fit_loop, "_combined_loader")


def deal_validation(trainer: Trainer, place: int, parts: int) -> None:
    """Let the loaders of the validations in ``fit``, if they are made, give one of so many parts of their samples.

    Those that Lightning has not given a sampler of its own stay as they are.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    combined = _get(loop, "_combined_loader")
    if combined is None:
        return
    limits = _get(loop, "_max_batches")
    for index, loader in enumerate(combined.flattened):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        if not isinstance(sampler, DistributedSampler) or (sampler.rank, sampler.num_replicas) == (place, parts):
            continue
        epoch = sampler.epoch
        DistributedSampler.__init__(
            *(sampler, sampler.dataset, parts, place, sampler.shuffle, sampler.seed, sampler.drop_last)
        )
        sampler.set_epoch(epoch)
        limits[index] = _get(data_connector, "_parse_num_batches")(
            RunningStage.VALIDATING, len(loader), trainer.limit_val_batches
        )


def reloads_loader(trainer: Trainer) -> bool:
    """Tell whether the loaders for training are made anew for the next epoch."""
    return bool(_get(trainer.fit_loop, "_should_reload_train_dl"))


def data_fetcher(trainer: Trainer) -> Any:
    """Return what takes batches from the loaders; ``None`` before they are made."""
    return _get(trainer.fit_loop, "_data_fetcher")


def set_data_fetcher(trainer: Trainer, fetcher: Any) -> None:
    """Let something else take batches from the loaders."""
    data_fetcher(trainer)
    trainer.fit_loop._data_fetcher = fetcher


def takes_iterator(fetcher: Any) -> bool:
    """Tell whether ``training_step`` takes the loader's iterator, and loads its batches itself."""
    return isinstance(fetcher, _DataLoaderIterDataFetcher)


def can_stop_early(trainer: Trainer) -> bool:
    """Tell whether as many epochs and steps are made as must be made at least."""
    return bool(_get(trainer.fit_loop, "_can_stop_early"))


def only_forward(trainer: Trainer) -> bool:
    """Tell whether batches are for batch normalization alone, as after stochastic weight averaging."""
    return bool(_get(trainer.fit_loop, "_skip_backward"))


# -- the loop of an epoch's batches -----------------------------------------------------------------------------------


def accumulates(trainer: Trainer) -> bool:
    """Tell whether this batch's gradient is added to the next one's, without an update."""
    return bool(_get(trainer.fit_loop.epoch_loop, "_should_accumulate")())


def replace_is_accumulated(trainer: Trainer, function: Callable[[], bool]) -> Undo:
    """Let a function say whether a gradient has all its micro-batches with this one, if it is not the epoch's last."""
    return replace(trainer.fit_loop.epoch_loop, "_accumulated_batches_reached", function)


def is_last_ready(trainer: Trainer) -> bool:
    """Tell whether this batch is the last one of its epoch, as far as is known."""
    return bool(_get(trainer.fit_loop.epoch_loop, "_num_ready_batches_reached")())


def replace_is_last_ready(trainer: Trainer, function: Callable[[], bool]) -> Undo:
    """Let a function say whether a batch is the last one of its epoch."""
    return replace(trainer.fit_loop.epoch_loop, "_num_ready_batches_reached", function)


def validates_in_epoch(trainer: Trainer) -> bool:
    """Tell whether this epoch is one of those with a validation."""
    return bool(_get(trainer.fit_loop.epoch_loop, "_should_check_val_epoch")())


def validates_now(trainer: Trainer, fetcher: Any) -> bool:
    """Tell whether a validation follows this batch."""
    return bool(_get(trainer.fit_loop.epoch_loop, "_should_check_val_fx")(fetcher))


def validates_by_the_clock(trainer: Trainer) -> bool:
    """Tell whether ``val_check_interval`` is a time."""
    return _get(trainer, "_val_check_time_interval") is not None


def replace_sigterm_broadcast(trainer: Trainer, function: Callable[[], None]) -> Undo:
    """Let a function be called before each batch is loaded, instead of the broadcast of worker 0's SIGTERM.

    Lightning makes it with several workers only. It would be a barrier in each step.
    """
    return replace(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", function)


def count_logged_steps(trainer: Trainer, number: int) -> None:
    """Count steps of optimizers for loggers, which name what they write by them."""
    loop = trainer.fit_loop.epoch_loop
    _get(loop, "_batches_that_stepped")
    loop._batches_that_stepped += number


def loops_state(trainer: Trainer) -> dict[str, Any]:
    """Tell where the loops of training are, as a checkpoint has it."""
    state: dict[str, Any] = trainer.fit_loop.state_dict()
    return state


def restore_loops(trainer: Trainer, state: dict[str, Any]) -> None:
    """Let the loops of training be where `loops_state` was taken, before the first batch of an epoch, as if no other
    process had been there."""
    loop = trainer.fit_loop
    loop.load_state_dict(state)
    loop.restarting = False
    for name in ("_loaded_from_state_dict", "_resuming_from_checkpoint"):
        _get(loop, name)
        setattr(loop, name, False)


def callbacks_state(trainer: Trainer) -> dict[str, Any]:
    """Tell what the callbacks keep, as a checkpoint has it."""
    state: dict[str, Any] = _get(call, "_call_callbacks_state_dict")(trainer)
    return state


def restore_callbacks(trainer: Trainer, state: dict[str, Any]) -> None:
    """Give the callbacks what they kept."""
    _get(call, "_call_callbacks_load_state_dict")(trainer, {"callbacks": state})


# -- what was logged --------------------------------------------------------------------------------------------------


def results_of(trainer: Trainer) -> dict[str, Any] | None:
    """Return what was logged in the loop that runs, by name; ``None`` if none does."""
    found: dict[str, Any] | None = _get(trainer, "_results")
    return found


def replace_epoch_end(trainer: Trainer, around: Callable[[Callable[[], None]], None]) -> Undo:
    """Let a function be called when an epoch's batches are over, before any hook of its end.

    Args:
        trainer: whose epochs.
        around: gets what Lightning does there, and has to call it.
    """
    connector = _get(trainer, "_logger_connector")
    return replace(connector, "epoch_end_reached", partial(around, _get(connector, "epoch_end_reached")))


def replace_hooks_of_update(trainer: Trainer, around: Callable[..., None]) -> Undo:
    """Let a function be called between a gradient and its update, where hooks look at it and clipping changes it.

    Args:
        trainer: whose updates.
        around: gets what Lightning does there, and its arguments.
    """
    plugin = trainer.precision_plugin
    return replace(plugin, "_after_closure", partial(around, _get(plugin, "_after_closure")))


def replace_evaluation_metrics(trainer: Trainer, around: Callable[[Callable[[], dict[str, Any]]], Any]) -> Undo:
    """Let a function give what an evaluation has logged, for each of its loaders and at its end.

    Args:
        trainer: whose evaluations.
        around: gets what Lightning does there, which gives the values by name.
    """
    connector, name = _get(trainer, "_logger_connector"), "update_eval_epoch_metrics"
    return replace(connector, name, partial(around, _get(connector, name)))


def replace_ends_of_validation(
    trainer: Trainer, begins: Callable[[], None], ends: Callable[[], None]
) -> tuple[Undo, Undo]:
    """Let functions be called before all hooks of a validation's beginning, and before those of its end."""
    loop = trainer.fit_loop.epoch_loop.val_loop

    def before(name: str, function: Callable[[], None]) -> Undo:
        hooks = _get(loop, name)

        def both(*args: Any, **kwargs: Any) -> None:
            function()
            hooks(*args, **kwargs)

        return replace(loop, name, both)

    return before("_on_evaluation_start", begins), before("_on_evaluation_end", ends)


def is_first_iteration(trainer: Trainer) -> Any:
    """Return what the logging of this loop keeps of whether it is in its first batch."""
    return _get(_get(trainer, "_logger_connector"), "_first_loop_iter")


def set_first_iteration(trainer: Trainer, value: Any) -> None:
    """Put back what `is_first_iteration` gave, after another loop has run in this one."""
    is_first_iteration(trainer)
    trainer._logger_connector._first_loop_iter = value


# -- hooks and callbacks ----------------------------------------------------------------------------------------------


def call_callbacks(trainer: Trainer, hook: str, *arguments: Any) -> None:
    """Call a hook of all callbacks, as the loop does."""
    _get(call, "_call_callback_hooks")(trainer, hook, *arguments)


def call_module(trainer: Trainer, hook: str, *arguments: Any) -> Any:
    """Call a hook of the module, as the loop does."""
    return _get(call, "_call_lightning_module_hook")(trainer, hook, *arguments)


def saves_every_steps(callback: ModelCheckpoint) -> int:
    """Return after how many steps a callback saves a checkpoint; 0: it does not count them."""
    return int(_get(callback, "_every_n_train_steps"))


def saves_by_the_clock(callback: ModelCheckpoint) -> bool:
    """Tell whether a callback saves a checkpoint after a time."""
    return _get(callback, "_train_time_interval") is not None


def saves_after_epochs(callback: ModelCheckpoint, trainer: Trainer) -> bool:
    """Tell whether a callback saves an epoch's checkpoint at the end of the epoch, and not with a validation."""
    return bool(_get(callback, "_should_save_on_train_epoch_end")(trainer))


def seconds_until_saved(callback: ModelCheckpoint) -> float:
    """Return after how many seconds a callback that saves after a time is to save; below 0: it should have."""
    before = _get(callback, "_last_time_checked")
    interval: float = _get(callback, "_train_time_interval").total_seconds()
    return interval if before is None else interval - (time.monotonic() - before)


def looks_after_batches(timer: Timer) -> bool:
    """Tell whether a timer looks at its clock after each batch, and not only after each epoch."""
    return bool(_get(timer, "_interval") == "step")


def look_of(timer: Timer) -> Callable[[Trainer], None]:
    """Return what a timer does when it looks at its clock."""
    look: Callable[[Trainer], None] = _get(timer, "_check_time_remaining")
    return look


def replace_look(timer: Timer, function: Callable[[Trainer], None]) -> Undo:
    """Let a function do what a timer does when it looks at its clock: ask worker 0 whether to stop."""
    return replace(timer, "_check_time_remaining", function)


# -- signals ----------------------------------------------------------------------------------------------------------


def take_over_sigterm(trainer: Trainer) -> None:
    """Put `note_sigterm` in the place of Lightning's handler, which broadcasts, and blocks where nobody listens.

    To be called before Lightning registers its own, as it does in each run before all hooks that train or validate.
    """
    replace(_get(trainer, "_signal_connector"), "_sigterm_notifier_fn", partial(note_sigterm, trainer))


def note_sigterm(trainer: Trainer, signum: int, frame: Any) -> None:
    """Take note of a SIGTERM and hand it on to the processes that this one started; the loop stops after its batch."""
    if not trainer.received_sigterm and trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signum)
    if not trainer.received_sigterm:
        log.info("worker %d got SIGTERM: it stops after its batch", trainer.global_rank)
    _get(trainer, "_signal_connector").received_sigterm = True


@contextmanager
def unnoticed_sigterm(trainer: Trainer) -> Iterator[None]:
    """Let the loop go on for now, though a SIGTERM has come; it would end after this batch."""
    connector = _get(trainer, "_signal_connector")
    connector.received_sigterm = False
    try:
        yield
    finally:
        connector.received_sigterm = True


def take_over_requeue(trainer: Trainer, note: Callable[[int, Any], None]) -> Callable[[int, Any], None] | None:
    """Put a function in the place of Lightning's handler of SLURM's notice that a job's time is over.

    That one saves a checkpoint and queues the job again, at once: in the middle of a step of this worker.

    Returns:
        It; ``None`` if there is none, or it was replaced before.
    """
    environment = _get(_get(trainer, "_accelerator_connector"), "cluster_environment")
    if not isinstance(environment, SLURMEnvironment) or environment.requeue_signal is None:
        return None
    handler: Callable[[int, Any], None] = _get(_get(trainer, "_signal_connector"), "_slurm_sigusr_handler_fn")
    handlers = getattr(signal.getsignal(environment.requeue_signal), "signal_handlers", [])
    if handler not in handlers:
        return None
    handlers[handlers.index(handler)] = note
    return handler


def replace_requeue_path(trainer: Trainer, choose: Callable[[str], str]) -> Undo:
    """Let a function choose where a checkpoint for a job that is queued again is saved, from what Lightning takes."""
    connector = _get(trainer, "_checkpoint_connector")
    path_of = _get(connector, "hpc_save_path")
    return replace(connector, "hpc_save_path", lambda folder: choose(path_of(folder)))


# -- torch ------------------------------------------------------------------------------------------------------------


def count_as_updated(optimizer: Optimizer) -> None:
    """Keep torch's schedulers from warning that the optimizer has not been called before them."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def version_of(tensor: Tensor) -> int:
    """Count how often a tensor was changed in place, as autograd counts it."""
    return tensor._version


def buffers_of(module: Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers, as it keeps them: what is put in here is the module's."""
    return module._buffers


def unsaved_buffers_of(module: Module) -> set[str]:
    """Return the names of a module's own buffers that are not part of its ``state_dict``."""
    return module._non_persistent_buffers_set


def parameters_of(module: Module) -> dict[str, Parameter | None]:
    """Return a module's own parameters, as it keeps them."""
    return module._parameters
