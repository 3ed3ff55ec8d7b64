"""Workers that are slower than others, for experiments."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.simulation.cluster_file import SLOWDOWN_VARIABLE


class Stragglers(Callback):
    """Makes chosen workers ``k`` times slower, by sleeping after each backward pass.

    A sleep leaves the processor to the others, as a slower machine would.

    Args:
        slowdown: rank -> factor ``k >= 1``; other workers run at full speed. ``None``: this worker's factor is in the
            environment variable `LIGHTNING_DECENTRAL_SLOWDOWN`, where ``lightning-decentral emulate`` puts what a
            cluster file says of its host; full speed without it.
        compute_seconds: let a batch of a normal worker take at least so long, also by sleeping: a stand-in for an
            accelerator where the processor is not what is measured. ``None``: as long as it takes.

    Example:
        >>> callback = Stragglers({3: 4.0})
    """

    def __init__(self, slowdown: Mapping[int, float] | None = None, compute_seconds: float | None = None) -> None:
        for rank, factor in (slowdown or {}).items():
            if rank < 0 or not factor >= 1:
                raise ConfigurationError(f"Stragglers({{{rank}: {factor}}}): needs a rank >= 0 and a factor >= 1.")
        self.slowdown = None if slowdown is None else dict(slowdown)
        self.own_factor = _from_environment() if slowdown is None else 1.0
        self.compute_seconds = compute_seconds
        self._began = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for rank in self.slowdown or {}:
            if rank >= trainer.world_size:
                raise ConfigurationError(
                    f"Stragglers names worker {rank}, but there are {trainer.world_size}: use ranks 0 to "
                    f"{trainer.world_size - 1}."
                )
        if self.slowdown is not None:
            self.own_factor = self.slowdown.get(trainer.global_rank, 1.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        elapsed = time.perf_counter() - self._began
        wanted = max(elapsed, self.compute_seconds or 0.0) * self.own_factor
        if wanted > elapsed:
            time.sleep(wanted - elapsed)
        self._began = time.perf_counter()  # a second backward pass in the same batch counts anew


def _from_environment() -> float:
    text = os.environ.get(SLOWDOWN_VARIABLE, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not factor > 0:
        raise ConfigurationError(f"{SLOWDOWN_VARIABLE} is {text!r}, needs a positive number. Correct or unset it.")
    return factor
