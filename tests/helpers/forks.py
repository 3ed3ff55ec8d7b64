"""A `Trainer` that forks its workers gets those that are kept: for less than half of what forking them costs.

They begin as spawned ones do: all is sent as a pickle, with the environment, the folder, and the generators of random
numbers. What cannot be sent (a function within a test, an event that workers share) is forked as always. Whatever else
a test changes in its own process, workers do not see: one that patches the package must not ask for this.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot, _MultiProcessingLauncher
from torch.multiprocessing import ProcessRaisedException

from helpers.workers import kept_workers

_fork = _MultiProcessingLauncher.launch


def launch_kept(
    launcher: _MultiProcessingLauncher, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
) -> Any:
    """Stands in for `_MultiProcessingLauncher.launch`."""
    if launcher._start_method != "fork" or launcher._already_fit:
        return _fork(launcher, function, *args, trainer=trainer, **kwargs)
    strategy = launcher._strategy
    assert strategy.cluster_environment is not None
    os.environ["MASTER_PORT"] = str(strategy.cluster_environment.main_port)
    job = (launcher, trainer, function, args, kwargs, _GlobalStateSnapshot.capture(), dict(os.environ), os.getcwd())
    try:
        message = pickle.dumps(job)
    except (AttributeError, RuntimeError, TypeError, pickle.PicklingError):
        return _fork(launcher, function, *args, trainer=trainer, **kwargs)
    try:
        # A launcher ends the others as soon as one has failed.
        output, *_ = kept_workers(strategy.num_processes).run(_work, message, grace=1.0)
    except AssertionError as error:
        raise ProcessRaisedException(str(error), 0, 0) from None
    if trainer is None:
        return output
    launcher._already_fit |= trainer.state.fn == "fit"
    launcher._recover_results_in_main_process(output, trainer)
    return output.trainer_results


class _Queue(list[Any]):
    put = list.append


def _work(rank: int, message: bytes) -> Any:
    launcher, trainer, function, args, kwargs, states, environment, folder = pickle.loads(message)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = _Queue([None])
    launcher._wrapping_function(rank, trainer, function, args, kwargs, output, states)
    if trainer is not None:
        trainer.strategy.checkpoint_io.teardown()  # what is written beside training is written when a process ends
    return output[-1]
