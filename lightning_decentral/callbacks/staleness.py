"""How old a gradient is when it is applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_decentral.callbacks.arrivals import histogram
from lightning_decentral.strategies import AsyncStrategy, SimulatedStrategy


class Staleness(Callback):
    """Logs the staleness of an asynchronous algorithm's gradients.

    Staleness is the number of versions by which a worker's parameters advanced, through calls of other workers, between
    the snapshot at which a gradient was taken and its update. ``staleness`` is that of worker 0's last step;
    ``staleness/mean`` and ``staleness/max``, at the end of an epoch, are over the epoch's steps of worker 0. Once, at
    the end of the run, comes the histogram of each worker, as ``staleness/RANK/FROM-TO`` in versions: how many of its
    updates were so stale. It is printed, too. Where workers come and go, those tell that are there at the end, of
    their last lives.

    Example:
        >>> callback = Staleness()
    """

    def __init__(self) -> None:
        self._sum, self._count, self._max = 0, 0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, (AsyncStrategy, SimulatedStrategy)):
            staleness = strategy.staleness
            self._sum, self._count, self._max = self._sum + staleness, self._count + 1, max(self._max, staleness)
            self.log("staleness", float(staleness), prog_bar=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._count:
            self.log("staleness/mean", self._sum / self._count, rank_zero_only=True)
            self.log("staleness/max", float(self._max), rank_zero_only=True)
        self._sum, self._count, self._max = 0, 0, 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, (AsyncStrategy, SimulatedStrategy)):
            return
        stale = strategy.stalenesses()
        if not any(stale.values()):
            return
        rank_zero_info(summary(stale))
        bars = histograms(stale)
        told = {f"staleness/{rank}/{bar}": float(count) for rank, of in bars.items() for bar, count in of.items()}
        for logger in trainer.loggers:
            logger.log_metrics(told, step=trainer.global_step)


def histograms(stale: Mapping[int, Mapping[int, int]]) -> dict[int, dict[str, int]]:
    """Count how many updates of which worker were how stale, in bars as wide for each worker.

    Args:
        stale: by rank, how many were of each staleness.

    Example:
        >>> histograms({0: {0: 5}, 1: {0: 1, 11: 2}})
        {0: {'0-1': 5}, 1: {'0-1': 1, '10-11': 2}}
    """
    largest = max((max(counts, default=0) for counts in stale.values()), default=0)
    return {rank: histogram(counts, largest) for rank, counts in stale.items()}


def summary(stale: Mapping[int, Mapping[int, int]]) -> str:
    """Put the histograms of all workers into a table.

    Args:
        stale: by rank, how many updates were of each staleness.

    Example:
        >>> print(summary({0: {0: 5}, 1: {0: 1, 11: 2}}))
        Updates by their staleness, in versions of a worker's model:
                        0-1   10-11
          worker 0        5       0
          worker 1        1       2
    """
    bars = histograms(stale)
    names = sorted({name for of in bars.values() for name in of}, key=lambda name: int(name.partition("-")[0]))
    lines = ["Updates by their staleness, in versions of a worker's model:"]
    lines.append(" " * 11 + "".join(f"{name:>8}" for name in names))
    for rank, of in bars.items():
        lines.append(f"  {f'worker {rank}':<9}" + "".join(f"{of.get(name, 0):>8}" for name in names))
    return "\n".join(lines)
