"""How far the workers' models are from each other."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies import AbstractDecentralizedStrategy, AsyncStrategy, SimulatedStrategy


class ConsensusDistance(Callback):
    """Logs ``consensus_distance``: ``(1/n) sum_i ||x_i - mean||^2`` over all parameters.

    At every validation it costs nothing: the strategy averages the models there anyway.

    Args:
        every_n_steps: measure it every so many steps as well. Costs an all-reduce each, for which all workers meet;
            refused with an asynchronous strategy.
        sample: estimate it there from so many coordinates, which each time are drawn anew; at least 2. A worker then
            sends 8 bytes for each coordinate, so that it may be logged in every step, and the standard error is logged,
            too: ``consensus_distance_error``. 1,000 coordinates that differ alike give an error of 4 %.

    Example:
        >>> callback = ConsensusDistance()
        >>> in_every_step = ConsensusDistance(every_n_steps=1, sample=1000)
    """

    def __init__(self, every_n_steps: int | None = None, sample: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigurationError(f"ConsensusDistance(every_n_steps={every_n_steps}): needs at least 1, or None.")
        if sample is not None and (every_n_steps is None or sample < 2):
            raise ConfigurationError(
                f"ConsensusDistance(every_n_steps={every_n_steps}, sample={sample}): needs at least 2 coordinates, and "
                "steps in which to take them. Write ConsensusDistance(every_n_steps=1, sample=1000)."
            )
        self.every_n_steps = every_n_steps
        self.sample = sample

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is not None and isinstance(trainer.strategy, AsyncStrategy):
            raise ConfigurationError(
                "ConsensusDistance(every_n_steps=...) makes all workers meet, which an asynchronous strategy is "
                "there to avoid. Leave every_n_steps out: the distance is logged at every validation."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if self.every_n_steps is None or trainer.global_step % self.every_n_steps:
            return
        if not isinstance(strategy, (AbstractDecentralizedStrategy, SimulatedStrategy)):
            return
        if self.sample is None:
            self.log("consensus_distance", strategy.consensus_distance(), prog_bar=True)
        else:
            distance, error = strategy.estimate_consensus_distance(self.sample)
            self.log("consensus_distance", distance, prog_bar=True)
            self.log("consensus_distance_error", error)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, (AbstractDecentralizedStrategy, SimulatedStrategy)):
            distance = strategy.last_consensus_distance
            if distance is not None and not trainer.sanity_checking:
                self.log("consensus_distance", distance, prog_bar=True, sync_dist=True)
