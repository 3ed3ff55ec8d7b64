"""The mean of all workers' models, in the module's place for an evaluation, a checkpoint, or the end of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Module

from lightning_decentral.flat import Vector
from lightning_decentral.transport.process_group import Communicator, Stepper, average_floating


class Consensus:
    """Lets a module be the mean of all workers' models for a while; this worker's own stays where it is.

    Args:
        module: the user's model.
        steppers: one for each optimizer; the list may change.
        communicator: reaches the other workers.

    Attributes:
        distance: ``(1/n) sum_i ||x_i - mean||^2`` when the module last became the mean; ``None`` before.
    """

    def __init__(self, module: Module, steppers: list[Stepper], communicator: Communicator) -> None:
        self.distance: float | None = None
        self._module = module
        self._steppers = steppers
        self._communicator = communicator
        self._live_buffers: list[Tensor] | None = None

    @property
    def entered(self) -> bool:
        """Whether the module is the mean now."""
        return self._live_buffers is not None

    def enter(self) -> None:
        """Let the module be the mean. All workers together, with no exchange under way."""
        means = [stepper.mean() for stepper in self._steppers]
        self.distance = self._distance(means)
        for stepper, mean in zip(self._steppers, means, strict=True):
            stepper.flat.bind(mean)
        buffers = list(self._module.buffers())
        self._live_buffers = [buffer.detach().clone() for buffer in buffers]
        average_floating(buffers, self._communicator)

    def leave(self) -> None:
        """Let the module be this worker's own model again."""
        assert self._live_buffers is not None
        for stepper in self._steppers:
            stepper.bind_live()
            stepper.flat.forget_others(stepper.snapshot)
        for buffer, live in zip(self._module.buffers(), self._live_buffers, strict=True):
            buffer.detach().copy_(live)
        self._live_buffers = None

    def stay(self) -> None:
        """Let the mean, which the module is now, be this worker's own model from here on."""
        self._live_buffers = None
        for stepper in self._steppers:
            stepper.flat.adopt()

    @contextmanager
    def live(self) -> Iterator[None]:
        """The module with this worker's own model, even in the middle of a step or of an evaluation."""
        bound = [stepper.flat.bound for stepper in self._steppers]
        buffers = [buffer.detach().clone() for buffer in self._module.buffers()]
        for stepper in self._steppers:
            stepper.flat.bind(stepper.x)
        live_buffers = self._live_buffers or []
        for buffer, live in zip(self._module.buffers(), live_buffers, strict=self._live_buffers is not None):
            buffer.detach().copy_(live)
        try:
            yield
        finally:
            for stepper, vector in zip(self._steppers, bound, strict=True):
                stepper.flat.bind(vector)
            for buffer, value in zip(self._module.buffers(), buffers, strict=True):
                buffer.detach().copy_(value)

    def measure(self) -> float:
        """``(1/n) sum_i ||x_i - mean||^2`` now. All workers together."""
        return self._distance([stepper.mean() for stepper in self._steppers])

    def close(self) -> None:
        """Let go of the steppers; `distance` stays."""
        self._live_buffers = None
        self._steppers = []

    def _distance(self, means: list[Vector]) -> float:
        local = sum(s.x.squared_distance(mean) for s, mean in zip(self._steppers, means, strict=True))
        return self._communicator.agree(local)
