"""Workers that are slower than others, for experiments."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral.errors import ConfigurationError


class Stragglers(Callback):
    """Makes chosen workers ``k`` times slower, by sleeping after each backward pass.

    A sleep leaves the processor to the others, as a slower machine would.

    Args:
        slowdown: rank -> factor ``k >= 1``; other workers run at full speed.
        compute_seconds: let a batch of a normal worker take at least so long, also by sleeping: a stand-in for an
            accelerator where the processor is not what is measured. ``None``: as long as it takes.

    Example:
        >>> callback = Stragglers({3: 4.0})
    """

    def __init__(self, slowdown: Mapping[int, float], compute_seconds: float | None = None) -> None:
        for rank, factor in slowdown.items():
            if rank < 0 or not factor >= 1:
                raise ConfigurationError(f"Stragglers({{{rank}: {factor}}}): needs a rank >= 0 and a factor >= 1.")
        self.slowdown = dict(slowdown)
        self.compute_seconds = compute_seconds
        self._began = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for rank in self.slowdown:
            if rank >= trainer.world_size:
                raise ConfigurationError(
                    f"Stragglers names worker {rank}, but there are {trainer.world_size}: use ranks 0 to "
                    f"{trainer.world_size - 1}."
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        elapsed = time.perf_counter() - self._began
        wanted = max(elapsed, self.compute_seconds or 0.0) * self.slowdown.get(trainer.global_rank, 1.0)
        if wanted > elapsed:
            time.sleep(wanted - elapsed)
        self._began = time.perf_counter()  # a second backward pass in the same batch counts anew
