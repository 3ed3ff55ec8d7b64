"""What the exchanges cost."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_decentral.callbacks.gradient_compression import GradientCompression
from lightning_decentral.strategies import AbstractDecentralizedStrategy, SimulatedStrategy
from lightning_decentral.strategies.meetings import AbstractMeetingStrategy
from lightning_decentral.traffic import Traffic, all_reduce_bytes


class Communication(Callback):
    """Logs what this worker sent and how long it waited for it.

    With every step, for worker 0 (whom loggers and the progress bar show; all virtual workers together in a
    simulation):

    * ``communication/megabytes``: sent since training began, in 10^6 bytes of payload;
    * ``communication/exposed_wait``: the part of the time, since the last log, in which it could do nothing but wait;
    * ``communication/exchanges_per_second``: since the last log.

    At the end of each epoch ``communication/total_megabytes``, of all workers together.

    Under Lightning's own ``strategy="ddp"`` only bytes are logged, by arithmetic: the gradients once around a ring per
    step; with `GradientCompression` what it sent.

    Args:
        every_n_steps: how often.

    Example:
        >>> callback = Communication()
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = max(1, every_n_steps)
        self._before = Traffic()
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = Traffic()
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        traffic = _traffic(trainer, pl_module)
        if traffic is None:
            return
        self.log("communication/megabytes", traffic.bytes_sent / 1e6, prog_bar=True)
        now = time.perf_counter()
        seconds = now - self._since
        if isinstance(trainer.strategy, AbstractDecentralizedStrategy) and seconds > 0:
            waited = traffic.exposed_seconds - self._before.exposed_seconds
            exchanges = traffic.exchanges - self._before.exchanges
            self.log("communication/exposed_wait", waited / seconds, prog_bar=True)
            self.log("communication/exchanges_per_second", exchanges / seconds, prog_bar=True)
        self._before, self._since = dataclasses.replace(traffic), now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        traffic = _traffic(trainer, pl_module)
        if traffic is None:
            return
        total = torch.tensor(traffic.bytes_sent / 1e6, dtype=torch.float64, device=pl_module.device)
        strategy = trainer.strategy
        if isinstance(strategy, AbstractMeetingStrategy):
            total = strategy.total(total)
        else:
            total = strategy.reduce(total, reduce_op="sum")
        self.log("communication/total_megabytes", total, sync_dist=True)


def bytes_sent(trainer: Trainer, module: LightningModule) -> int:
    """Return bytes that this worker sent since training began; 0 under a strategy that is not ours nor DDP."""
    traffic = _traffic(trainer, module)
    return 0 if traffic is None else traffic.bytes_sent


def _traffic(trainer: Trainer, module: LightningModule) -> Traffic | None:
    strategy = trainer.strategy
    if isinstance(strategy, (AbstractMeetingStrategy, SimulatedStrategy)):
        return strategy.traffic
    if isinstance(strategy, DDPStrategy):
        for callback in trainer.callbacks:
            if isinstance(callback, GradientCompression):
                return callback.traffic
        model_bytes = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        steps = trainer.global_step
        return Traffic(steps * all_reduce_bytes(model_bytes, trainer.world_size), steps, steps)
    return None
