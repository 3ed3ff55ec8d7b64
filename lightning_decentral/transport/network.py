"""A model of a cluster: how long computing and sending take. The simulator and the planner share it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_decentral.errors import ConfigurationError


@dataclass(frozen=True)
class Cluster:
    """How fast the workers compute and their links send.

    A message of ``b`` bytes from i to j occupies i's uplink for ``b / bandwidth`` seconds, first come first served. Its
    first byte reaches j's downlink at once, which it occupies as long, first come first served too; it arrives one
    ``latency`` after that. A busy downlink does not hold up what i sends to others.

    Args:
        compute_seconds: seconds of one gradient (forward, backward and update) on a normal worker.
        slowdown: rank -> factor for workers that compute slower, as ``{3: 10.0}``.
        jitter: how one gradient's time varies: ``"none"``; ``"lognormal"`` with `jitter_scale` the standard deviation
            of the logarithm; ``"pareto"``, heavy-tailed with shape `jitter_scale` (2 and below: infinite variance). The
            fastest gradient of ``"pareto"`` takes `compute_seconds`; the median one of ``"lognormal"`` does.
        jitter_scale: see ``jitter``; positive.
        bandwidth_bytes_per_second: of every uplink and downlink. 1 Gbit/s is ``125e6``.
        latency_seconds: of every message.
        slow_links: rank -> factor for workers whose link is slower.
        failures: rank -> virtual second at which the worker dies (simulator only).

    Example:
        >>> cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=125e6, slowdown={3: 10.0})
        >>> cluster.transfer_seconds(125_000_000, 0, 1)
        1.0
    """

    compute_seconds: float = 0.1
    slowdown: Mapping[int, float] = field(default_factory=dict)
    jitter: Literal["none", "lognormal", "pareto"] = "none"
    jitter_scale: float = 0.5
    bandwidth_bytes_per_second: float = math.inf
    latency_seconds: float = 0.0
    slow_links: Mapping[int, float] = field(default_factory=dict)
    failures: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, minimum in (("compute_seconds", 0.0), ("latency_seconds", 0.0)):
            value = getattr(self, name)
            if not value >= minimum:
                raise ConfigurationError(f"Cluster({name}={value}): needs a number of seconds >= 0.")
        for name in ("bandwidth_bytes_per_second", "jitter_scale"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigurationError(f"Cluster({name}={value}): needs a positive number.")
        if self.jitter not in ("none", "lognormal", "pareto"):
            raise ConfigurationError(f"Cluster(jitter={self.jitter!r}): needs one of 'none', 'lognormal', 'pareto'.")
        for name in ("slowdown", "slow_links"):
            for rank, factor in getattr(self, name).items():
                if not factor > 0:
                    raise ConfigurationError(f"Cluster({name}={{{rank}: {factor}}}): needs a positive factor.")

    def check_ranks(self, workers: int) -> None:
        """Refuse settings for workers that do not exist."""
        for name in ("slowdown", "slow_links", "failures"):
            for rank in getattr(self, name):
                if not 0 <= rank < workers:
                    raise ConfigurationError(
                        f"Cluster({name}=...) names worker {rank}, but there are {workers}. "
                        f"Use ranks 0 to {workers - 1}."
                    )

    def gradient_seconds(self, rank: int, rng: random.Random) -> float:
        """Seconds of one gradient of a worker; draws from ``rng`` unless there is no jitter."""
        seconds = self.compute_seconds * self.slowdown.get(rank, 1.0)
        if self.jitter == "lognormal":
            seconds *= rng.lognormvariate(0.0, self.jitter_scale)
        elif self.jitter == "pareto":
            seconds *= rng.paretovariate(self.jitter_scale)
        return seconds

    def transfer_seconds(self, num_bytes: int, source: int, target: int) -> float:
        """Seconds that a message occupies the links between two workers, without latency."""
        factor = max(self.slow_links.get(source, 1.0), self.slow_links.get(target, 1.0))
        return num_bytes * factor / self.bandwidth_bytes_per_second

    def all_reduce_seconds(self, num_bytes: int, workers: int) -> float:
        """Seconds of a ring all-reduce once everybody is there."""
        if workers == 1:
            return 0.0
        factor = max([1.0, *self.slow_links.values()])
        sent = all_reduce_bytes(num_bytes, workers)
        return sent * factor / self.bandwidth_bytes_per_second + 2 * (workers - 1) * self.latency_seconds


def all_reduce_bytes(num_bytes: int, workers: int) -> int:
    """Bytes that each worker sends in a bandwidth-optimal all-reduce of ``num_bytes``."""
    return 2 * (workers - 1) * num_bytes // workers


@dataclass(slots=True)
class Traffic:
    """What one worker sent, and how long it waited for it.

    Attributes:
        bytes_sent: payload bytes sent to others (headers not counted).
        messages: messages sent (an all-reduce is one).
        exchanges: exchanges finished: neighbour exchanges, all-reduces, and calls made.
        calls_answered: calls of others that this worker answered.
        exposed_seconds: seconds in which the worker could do nothing but wait for an exchange.
    """

    bytes_sent: int = 0
    messages: int = 0
    exchanges: int = 0
    calls_answered: int = 0
    exposed_seconds: float = 0.0
