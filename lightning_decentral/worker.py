"""What an algorithm sees of the worker it runs on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_decentral.flat import AbstractVector


def _no_gradient() -> AbstractVector:
    raise RuntimeError("There is no gradient yet: `await Gradient()` comes first in every step.")


@dataclass(slots=True, eq=False)
class Worker:
    """One worker: its place among the others, its parameters, and what its algorithm remembers.

    Attributes:
        rank: its number, ``0 <= rank < world_size``.
        world_size: how many workers train together.
        x: its parameters, flat. The algorithm and `LocalStep` change them.
        snapshot: the parameters at which the gradient is taken. The same object as ``x`` for synchronous algorithms,
            unless their ``init`` puts another one there; a copy made at the beginning of the step where calls may
            change ``x`` meanwhile.
        state: what the algorithm remembers between steps; checkpointed per worker.
        rng: this worker's own random numbers (seeded with its rank; checkpointed).
        step: steps made so far, one local gradient each.
        version: how often ``x`` was changed, by a step of its own or by a call of another worker.
        staleness: versions that ``x`` advanced between the last step's snapshot and its update.
        snapshot_version: the version of which ``snapshot`` is a copy.
    """

    rank: int
    world_size: int
    x: AbstractVector
    snapshot: AbstractVector
    state: dict[str, Any] = field(default_factory=dict)
    rng: random.Random = field(default_factory=random.Random)
    step: int = 0
    version: int = 0
    staleness: int = 0
    snapshot_version: int = 0
    read_gradient: Callable[[], AbstractVector] = _no_gradient

    @property
    def gradient(self) -> AbstractVector:
        """This step's gradient, flat; changing it changes what `LocalStep` applies. Costs a copy of the model."""
        return self.read_gradient()

    def seed(self, seed: int) -> None:
        """Seed `rng` from a seed that all workers share and this worker's rank."""
        self.rng.seed((seed << 20) + self.rank)
