"""How far the workers' models are from each other, and whether the graph and their updates explain it."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_decentral.algorithms.base import AbstractGossip
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.strategies import (
    AbstractDecentralizedStrategy,
    AsyncStrategy,
    GossipStrategy,
    SimulatedStrategy,
)
from lightning_decentral.topology import AbstractTopology

_UNEXPLAINED = 9.0  # times the squared distance that updates explain: three times the distance
_APART = 0.25  # of the squared norm of the mean: half of its norm
_IN_A_ROW = 2  # validations


class ConsensusDistance(Callback):
    """Logs ``consensus_distance``: ``(1/n) sum_i ||x_i - mean||^2`` over all parameters.

    At every validation it costs nothing: the strategy averages the models there anyway.

    With a method that gossips on a graph it logs, too:

    * ``spectral_gap``, with the steps: what the rounds really had. Of rounds that repeat it is the graph's; of random
      ones that of the latest that were drawn, as many as leave 0.1 % of a disagreement; of calls between pairs it
      counts how often this worker has made or answered them since the last log. Nothing is sent for it.
    * ``update_distance``, at a validation, of methods whose workers wait for each other: the mean over the workers of
      the squared length of the longest update since the validation before the last one, from a few coordinates.

    What an update adds to the disagreement shrinks by ``1 - gap`` with each round of averages, so that updates explain
    ``consensus_distance <= update_distance / gap^2`` at most; where p rounds repeat, whose product shrinks it by q,
    ``p^2 (1 + 1 / (1 - q))^2 * update_distance``. It warns once where the workers are more than three times as far from
    each other as that, on a doubly stochastic graph; and once where, at two validations one after the other, they are
    further from their mean than half of its norm.

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
        self._schedule: _Schedule | None = None
        self._longest = 0.0  # update before the last validation
        self._apart = 0  # validations in a row
        self._told: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is not None and isinstance(trainer.strategy, AsyncStrategy):
            raise ConfigurationError(
                "ConsensusDistance(every_n_steps=...) makes all workers meet, which an asynchronous strategy is "
                "there to avoid. Leave every_n_steps out: the distance is logged at every validation."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._schedule, self._longest, self._apart, self._told = None, 0.0, 0, set()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy  # may have chosen another method, or taken other optimizers
        if self._schedule is None or self._schedule.algorithm is not getattr(strategy, "algorithm", None):
            self._schedule = _Schedule.of(strategy)
        if self._schedule is not None and isinstance(strategy, GossipStrategy):
            strategy.watch_updates()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, (AbstractDecentralizedStrategy, SimulatedStrategy)):
            return
        gap = None if self._schedule is None else self._schedule.gap(trainer.log_every_n_steps)
        if gap is not None:
            self.log("spectral_gap", gap)
        if self.every_n_steps is None or trainer.global_step % self.every_n_steps:
            return
        if self.sample is None:
            self.log("consensus_distance", strategy.consensus_distance(), prog_bar=True)
        else:
            distance, error = strategy.estimate_consensus_distance(self.sample)
            self.log("consensus_distance", distance, prog_bar=True)
            self.log("consensus_distance_error", error)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if trainer.sanity_checking or not isinstance(strategy, (AbstractDecentralizedStrategy, SimulatedStrategy)):
            return
        distance = strategy.last_consensus_distance
        if distance is None:
            return
        self.log("consensus_distance", distance, prog_bar=True, sync_dist=True)
        if self._schedule is None:
            return
        self._judge_norm(distance, pl_module)
        if isinstance(strategy, GossipStrategy):
            longest, before = strategy.longest_update(), self._longest
            self._longest = longest
            self.log("update_distance", max(longest, before), sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._schedule is None or trainer.sanity_checking or not isinstance(trainer.strategy, GossipStrategy):
            return
        metrics = trainer.callback_metrics
        if not {"consensus_distance", "update_distance"} <= metrics.keys():
            return
        distance, update = float(metrics["consensus_distance"]), float(metrics["update_distance"])
        explained = self._schedule.updates_kept**2 * update
        if distance > _UNEXPLAINED * explained > 0.0:
            self._tell(
                "unexplained",
                "The workers are further from each other than the graph and their updates explain: consensus_distance "
                f"is {distance:.3g}, but with updates of at most {update:.3g} (update_distance) on "
                f"{self._schedule.name}, whose spectral gap is {self._schedule.planned:.3g}, it is at most "
                f"{explained:.3g}. Something else moves them apart, or their messages do not bring them together: look "
                "for user code that changes weights, compression that is too coarse, a consensus step (CHOCO) that is "
                "too large, or a bound (Moniqua) that is too small.",
            )

    def _judge_norm(self, distance: float, module: LightningModule) -> None:
        """Warn where the mean, which the module is now, is hardly larger than what the workers differ by."""
        assert self._schedule is not None
        with torch.no_grad():
            norms = [parameter.double().square().sum() for parameter in module.parameters() if parameter.requires_grad]
            norm = float(sum(each.to("cpu") for each in norms))
        self._apart = self._apart + 1 if distance > _APART * norm else 0
        if self._apart >= _IN_A_ROW:
            self._tell(
                "apart",
                "The workers' models are as far from each other as they are long: consensus_distance is "
                f"{distance:.3g}, and the square of the norm of their mean {norm:.3g}. The mean, which is evaluated "
                f"and saved, may be a bad model. {self._schedule.name} has a spectral gap of "
                f"{self._schedule.planned:.3g}: use a smaller learning rate, a graph with a larger gap, less local "
                "momentum, or, where the workers' data differ, D2 or gradient tracking.",
            )

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            rank_zero_warn(text)


class _Schedule:
    """The rounds of a run.

    Args:
        strategy: of the run.
        algorithm: its method.
        graph: on which it gossips.
        workers: how many.

    Attributes:
        algorithm: as given.
        planned: the spectral gap by the method's own account.
        updates_kept: of how many of a worker's updates, laid end to end, averages leave something at most: a bound.
        name: of the graph.
    """

    def __init__(
        self,
        strategy: AbstractDecentralizedStrategy | SimulatedStrategy,
        algorithm: AbstractGossip,
        graph: AbstractTopology,
        workers: int,
    ) -> None:
        self.algorithm = algorithm
        mixing = algorithm.mixing(workers)
        self.planned, self.name = mixing.spectral_gap, repr(graph)
        self.updates_kept = math.inf
        if graph.stochastic == "doubly" and self.planned > 0.0 and self.planned in (graph.spectral_gap, 1.0):
            self.updates_kept = _updates_kept(self.planned, algorithm.period(workers))
        self._strategy, self._workers, self._graph = strategy, workers, graph
        self._calls = isinstance(algorithm, AbstractAsynchronousAlgorithm)
        # A method that averages in another way than the graph in each step, as one with exact means, says so.
        self._random = not self._calls and graph.period == 0 and mixing.spectral_gap == graph.spectral_gap
        self._steps, self._exchanges = self._now()
        self._began = self._steps

    @classmethod
    def of(cls, strategy: object) -> _Schedule | None:
        """Return that of a strategy; none if its method is on no graph, or one worker is alone."""
        if not isinstance(strategy, (AbstractDecentralizedStrategy, SimulatedStrategy)):
            return None
        algorithm = strategy.algorithm
        workers = strategy.workers if isinstance(strategy, SimulatedStrategy) else strategy.world_size
        if workers == 1 or not isinstance(algorithm, AbstractGossip):
            return None
        if not isinstance(algorithm.topology, AbstractTopology):  # of workers that come and go
            return None
        return cls(strategy, algorithm, algorithm.topology, workers)

    def gap(self, every: int) -> float | None:
        """Return what the rounds since it was last told had; none where these are not yet so many."""
        (steps, exchanges), (before, exchanged) = self._now(), (self._steps, self._exchanges)
        if steps < before + max(1, every):
            return None
        self._steps, self._exchanges = steps, exchanges
        if self._random:
            return self._graph.gap_over(self._began, steps)
        if self._calls:
            return float(1.0 - (1.0 - self.planned) ** min(1.0, (exchanges - exchanged) / (steps - before)))
        return self.planned

    def _now(self) -> tuple[int, float]:
        """Return the steps and the calls that this worker has made; of virtual workers the mean."""
        traffic = self._strategy.traffic
        if isinstance(self._strategy, SimulatedStrategy):
            callers = sum(self._graph.initiates(rank) for rank in range(self._workers))
            return self._strategy.steps // self._workers, traffic.exchanges / callers
        calls = self._graph.initiates(self._strategy.global_rank)
        return self._strategy.steps, traffic.exchanges if calls else traffic.calls_answered


def _updates_kept(gap: float, period: int) -> float:
    """Return the sum of what is left of one update in each of the steps after it, at most.

    No round makes a disagreement larger, and each whole period shrinks it by ``(1 - gap)^period``; the steps from an
    update to now contain all periods in between but for the first one, which is cut.
    """
    left = (1.0 - gap) ** period
    return 1.0 / gap if period == 1 else period * (1.0 + 1.0 / (1.0 - left))
