"""Steps that are made beside those of a method, on a vector of its own: the averages of buffers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import coroutine
from typing import Any

from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep, Steps
from lightning_decentral.worker import Worker

_Forwarding = Generator[Any, Any, Any]


class Beside:
    """A second algorithm, which averages and does nothing else, and a second vector of each worker.

    Of each step what comes before its gradient is begun before the method's own, and the rest is made after that.

    Args:
        algorithm: what `AbstractAlgorithm.for_buffers` returns; synchronous.
        vectors: by rank.
        changed: called with a rank once the gradient is there: what it changes in the vector counts in this step.
        done: called with a rank at the end of each step: it may read and change the vector.

    Attributes:
        workers: that have these vectors.
    """

    def __init__(
        self,
        algorithm: AbstractAlgorithm,
        vectors: Sequence[AbstractVector],
        changed: Callable[[int], None] = lambda rank: None,
        done: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self._algorithm = algorithm.resolved(len(vectors))
        self._changed, self._done = changed, done
        self.workers = [Worker(rank, len(vectors), vector, vector) for rank, vector in enumerate(vectors)]
        for worker in self.workers:
            self._algorithm.init(worker)

    @coroutine
    def step(self, worker: Worker, own: Steps[None]) -> _Forwarding:
        """Make a step of a worker, with what belongs to it here.

        Args:
            worker: of the method.
            own: its step.
        """
        mine = self.workers[worker.rank]
        mine.step = worker.step
        steps = self._algorithm.step(mine)
        try:
            yield from _forwarded(steps, Gradient)
            gradient = yield from _forwarded(own, Gradient)
            yield gradient
            yield from _forwarded(own)
            update = yield from _forwarded(steps, LocalStep)
            self._changed(worker.rank)
            if update is not None:
                yield from _forwarded(steps)
            self._done(worker.rank)
        finally:
            own.close()
            steps.close()


def _forwarded(steps: Steps[None], *until: type) -> _Forwarding:
    """Let a coroutine ask, until it asks for one of some words: returns that request; or until its end."""
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration:
            return None
        if isinstance(request, until):
            return request
        answer = yield request
