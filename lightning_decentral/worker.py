"""What an algorithm sees of the worker it runs on."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_decentral.errors import ProtocolError
from lightning_decentral.flat import AbstractVector


def _no_gradient() -> AbstractVector:
    raise RuntimeError("This worker belongs to no interpreter, which would know its gradient.")


class AbstractMemory(ABC):
    """What the optimizer of a worker's own steps remembers of them: momenta, second moments, counts."""

    @abstractmethod
    def forget(self) -> None:
        """Remember nothing, as before the first step."""

    @abstractmethod
    def values(self) -> AbstractVector | None:
        """Copy its tensors of floating-point numbers, one after the other, but for counts; ``None``: it has none."""

    @abstractmethod
    def replace(self, values: AbstractVector) -> None:
        """Remember these in the place of what `values` has copied."""


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
        memory: of the optimizer that makes its own steps; ``None`` if there is no optimizer, as in the planner.
        gradient_is_there: whether this step's `Gradient` is answered.
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
    memory: AbstractMemory | None = None
    gradient_is_there: bool = field(default=False, init=False)
    _gradient: AbstractVector | None = field(default=None, init=False)

    @property
    def gradient(self) -> AbstractVector:
        """The gradient of this step, flat, one object in the whole step; changing it changes what `LocalStep` applies.

        Costs a copy of the model when it is read first; in later steps gradients are put there as they are computed,
        but for asynchronous methods.

        Raises:
            ProtocolError: before the step's `Gradient` is answered.
        """
        if not self.gradient_is_there:
            raise ProtocolError(
                f"`worker.gradient` was read in step {self.step} of worker {self.rank}, before `Gradient`; it needs "
                "this step's gradient, and that of the last step is gone. Write `await Gradient()` before it."
            )
        if self._gradient is None:
            self._gradient = self.read_gradient()
        return self._gradient

    def forget_gradient(self) -> None:
        """Forget the gradient: a step begins, whose own is not there yet."""
        self.gradient_is_there, self._gradient = False, None

    def seed(self, seed: int) -> None:
        """Seed `rng` from a seed that all workers share and this worker's rank."""
        self.rng.seed((seed << 20) + self.rank)
