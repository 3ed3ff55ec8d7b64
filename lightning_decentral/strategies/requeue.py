"""SLURM's notice that a job's time is over: all workers stop together, save, and the job is queued again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lightning_decentral.strategies import lightning_private as private


class Requeue:
    """Does at the end of training what Lightning does when the notice comes, in the middle of a step.

    Whoever gets the notice stops after its batch, and with it all do.

    Args:
        trainer: in training.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._asked = False
        self._handle = private.take_over_requeue(trainer, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        self._asked = self._trainer.should_stop = True

    def finish(self, any_of: Callable[[bool], bool], broadcast: Callable[[str], str]) -> None:
        """Save a checkpoint and queue the job again, if one of the workers was asked to. All of them together.

        Args:
            any_of: tells whether it is so on one of the workers.
            broadcast: returns what worker 0 has passed.
        """
        if self._handle is None or not any_of(self._asked):
            return
        self._asked = False
        undo = private.replace_requeue_path(self._trainer, broadcast)  # files appear while others look for a free name
        try:
            self._handle(signal.SIGUSR1, None)
        finally:
            undo()
