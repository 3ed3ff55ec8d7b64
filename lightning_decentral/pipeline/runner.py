"""Runs the stages of one worker: what is due in each tick, as soon as what it needs has come.

The same code runs a whole pipeline in one process, where nothing is sent, and one stage of it, where the rest is on
other workers. What the two compute is the same, bit for bit: the order of a stage's work is that of the schedule, and
random numbers belong to batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.corrections import Steps
from lightning_decentral.pipeline.random_numbers import own_random_numbers, seed_random_numbers
from lightning_decentral.pipeline.schedules import Schedule, Work
from lightning_decentral.pipeline.splitting import part_of, rows_of
from lightning_decentral.pipeline.stage import (
    Stage,
    Value,
    check_value,
    differentiate,
    saved,
    tensors_of,
)

TrainingStep = Callable[[Any], Tensor]
"""Gives the loss of a batch; somewhere in it the module is called that is cut."""

_STEP, _LOSS = -1, -2  # in the place of a stage: random numbers that the training step draws before and behind it


class AbstractPipes(ABC):
    """What brings values from stage to stage, in the order of sending: activations one up, errors one down."""

    @abstractmethod
    def send(self, source: int, target: int, value: Value) -> None:
        """Send a value of one stage to another one; returns at once."""

    @abstractmethod
    def has(self, source: int, target: int) -> bool:
        """Tell whether `receive` would not wait."""

    @abstractmethod
    def receive(self, source: int, target: int) -> Value:
        """Take the next value of one stage for another one."""

    @abstractmethod
    def waiting(self, source: int, target: int, count: int) -> list[Value]:
        """Return the next values of one stage for another one, once so many have come; they stay where they are."""

    @abstractmethod
    def put(self, source: int, target: int, values: Sequence[Value]) -> None:
        """Let values be received before all that are sent in this run."""

    @abstractmethod
    def wait_for_any(self, ends: Sequence[tuple[int, int]]) -> None:
        """Wait until something has come from a source to a target, of any of these."""


class LocalPipes(AbstractPipes):
    """Pipes between stages of one process: queues."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], deque[Value]] = {}

    def send(self, source: int, target: int, value: Value) -> None:
        self._queues.setdefault((source, target), deque()).append(value)

    def has(self, source: int, target: int) -> bool:
        return bool(self._queues.get((source, target)))

    def receive(self, source: int, target: int) -> Value:
        return self._queues[source, target].popleft()

    def waiting(self, source: int, target: int, count: int) -> list[Value]:
        return list(self._queues.get((source, target), ()))[:count]

    def put(self, source: int, target: int, values: Sequence[Value]) -> None:
        self._queues.setdefault((source, target), deque()).extendleft(reversed(values))

    def wait_for_any(self, ends: Sequence[tuple[int, int]]) -> None:
        raise AssertionError(f"Stages of one process wait for each other: {ends}.")


@dataclass(frozen=True)
class Update:
    """An update that is due.

    Attributes:
        stage: whose blocks it changes.
        batch: whose gradient it is.
        gradients: of the parameters that the stage owns.
        rate: how many times the optimizer's rate it is made with.
    """

    stage: int
    batch: int
    gradients: Mapping[Parameter, Tensor]
    rate: float = 1.0


class Reached(BaseException):
    """The call that is cut was reached; the rest of the user's step is another worker's."""


class Runner:
    """Runs the stages of one worker.

    Args:
        stages: of this worker.
        schedule: of the pipeline.
        cut: the module whose call in the training step is cut into stages.
        step: the training step; called by the first and the last stage only.
        pipes: to the other stages.
        seed: of the run, for random numbers.
        together: whether backward passes that can be made at the same time are one call of autograd: faster with small
            stages, and all their graphs are there at once.

    Attributes:
        batches: forwarded since training began, by the first of this worker's stages.
        loss: of the last batch, if this worker has the last stage.
        step: the training step.
        steps: what updates change weights by, where the schedule predicts weights.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Schedule,
        cut: Module,
        step: TrainingStep,
        pipes: AbstractPipes,
        seed: int,
        together: bool = False,
    ) -> None:
        self.stages = {stage.index: stage for stage in stages}
        self.batches = 0
        self.loss: Tensor | None = None
        self.steps = None if schedule.prediction is None else Steps(schedule.prediction)
        self._schedule = schedule
        self._cut = cut
        self.step = step
        self._pipes = pipes
        self._seed = seed
        self._together = together
        self._tick = 0
        self._last = schedule.stages - 1
        self._batch: Any = None
        self._rows = 0
        self._shares: list[float] = []
        devices = [stage.device for stage in stages]
        self._device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        self._owner: dict[Parameter, int] = {}
        for stage in stages:  # of what several stages have in common, the last one makes the update
            self._owner |= dict.fromkeys(stage.module.parameters(), stage.index)

    @property
    def under_way(self) -> int:
        """The number of micro-batches that have been forwarded and not backwarded."""
        return sum(stage.under_way for stage in self.stages.values())

    def tick(self, batch: Any) -> list[Update]:
        """Forward a new batch, and backward what is due.

        Returns:
            The updates that are due now, in the order of stages, before anything else is forwarded.

        Raises:
            ConfigurationError: if the batch cannot be divided, a stage gives no tensors, or the training step does not
                call what is cut.
        """
        self._batch = batch
        if self._schedule.parts > 1 and {0, self._last} & self.stages.keys():
            self._rows = rows_of(batch, self._schedule.parts)
        self._losses: list[Tensor] = []
        updates = self._run(self._programs())
        self._batch = None
        if self._losses:
            shares = [self._share(part) for part in range(len(self._losses))]
            self.loss = sum(
                (loss * share for loss, share in zip(self._losses[1:], shares[1:], strict=True)),
                self._losses[0] * shares[0] if len(shares) > 1 else self._losses[0],
            )
        self._tick += 1
        self.batches += 1
        return updates

    def due_next(self) -> list[int]:
        """List this worker's stages of which the next tick brings an update."""
        return list(self._complete(self._programs()))

    def drain(self) -> Iterator[list[Update]]:
        """Backward everything that is under way, tick by tick; the next batch is the first one again."""
        batches, before = self._tick, self.batches - self._tick
        for tick in range(batches, batches + self._schedule.drain_ticks if batches else 0):
            programs = {index: list(self._schedule.program(index, tick, batches, before)) for index in self.stages}
            yield self._run(programs)
        self._tick = 0
        for stage in self.stages.values():
            stage.begin_anew()

    def in_flight(self, under_way: Mapping[int, int]) -> dict[int, dict[str, Any]]:
        """Return what is under way in each stage between two ticks, to be saved; nothing is disturbed.

        Args:
            under_way: micro-batches in each stage of the pipeline, on whichever worker.
        """
        states: dict[int, dict[str, Any]] = {}
        for index, stage in self.stages.items():
            # What the next stage has backwarded and this one has not: both have forwarded the same.
            ready = stage.under_way - under_way.get(index + 1, stage.under_way)
            errors = self._pipes.waiting(index + 1, index, ready)
            states[index] = {**stage.in_flight(), "tick": self._tick, "errors": saved(errors)}
        return states

    def put_in_flight(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on with what was under way when it was saved, before the first tick.

        Args:
            states: of this worker's stages, as `in_flight` gave them; tensors are on the device.
        """
        with own_random_numbers(self._device):
            for index, stage in self.stages.items():
                state = states[index]
                self._tick = state["tick"]
                stage.put_in_flight(state, self.batches - self._tick)
                self._pipes.put(index + 1, index, state["errors"])

    def abandon(self) -> None:
        """Forget everything that is under way."""
        self._tick = 0
        if self.steps is not None:
            self.steps.remember({})
        for stage in self.stages.values():
            stage.abandon()

    # -- one tick -----------------------------------------------------------------------------------------------------

    def _run(self, programs: Mapping[int, Sequence[Work]]) -> list[Update]:
        """Do all that is in the stages' programs: of several stages, whichever can go on."""
        if self.steps is not None:
            self.steps.end_update()
        with own_random_numbers(self._device):
            self._work(programs)
        return self._due(programs)

    def _work(self, programs: Mapping[int, Sequence[Work]]) -> None:
        queues = {index: deque(works) for index, works in programs.items()}
        while any(queues.values()):
            went_on = False
            for index, queue in queues.items():
                while queue and not (self._together and queue[0].backward) and self._is_ready(index, queue[0]):
                    work = queue.popleft()
                    if work.backward:
                        self._backward([(index, work)])
                    else:
                        self._forward(self.stages[index], work)
                    went_on = True
            if self._together:
                ready = [index for index, queue in queues.items() if queue and self._is_ready(index, queue[0])]
                self._backward([(index, queues[index].popleft()) for index in ready])
                went_on |= bool(ready)
            if not went_on:
                self._pipes.wait_for_any([self._needs(index, queue[0]) for index, queue in queues.items() if queue])

    def _programs(self) -> dict[int, list[Work]]:
        before = self.batches - self._tick
        return {index: list(self._schedule.program(index, self._tick, before=before)) for index in self.stages}

    def _complete(self, programs: Mapping[int, Sequence[Work]]) -> dict[int, int]:
        """Find the stages of which a program brings an update, and of which batch."""
        return {
            index: work.batch
            for index, works in programs.items()
            for work in works
            if work.backward and work.part == self._schedule.parts - 1
        }

    def _due(self, programs: Mapping[int, Sequence[Work]]) -> list[Update]:
        complete = self._complete(programs)
        gradients: dict[Parameter, Tensor] = {}
        users: dict[Parameter, int] = {}
        for index, batch in sorted(complete.items()):
            for parameter, gradient in self.stages[index].take_gradients(batch).items():
                before = gradients.get(parameter)
                gradients[parameter] = gradient if before is None else before + gradient
                users[parameter] = index
        if self.steps is not None:
            self.steps.begin_update(list(gradients))
        before_these = self.batches - self._tick
        shares: dict[int, dict[Parameter, Tensor]] = {index: {} for index in complete}
        for parameter, gradient in gradients.items():
            # Its owner updates it; while that has nothing to do, the last of those that use it: whoever else happens to
            # be in this process would clip it with gradients of its own.
            owner = self._owner[parameter]
            shares[owner if owner in complete else users[parameter]][parameter] = gradient
        return [
            Update(index, batch, shares[index], self._schedule.rate(index, before_these + batch))
            for index, batch in complete.items()
        ]

    def _needs(self, index: int, work: Work) -> tuple[int, int]:
        return (index + 1 if work.backward else index - 1), index

    def _is_ready(self, index: int, work: Work) -> bool:
        source, target = self._needs(index, work)
        return not 0 <= source <= self._last or self._pipes.has(source, target)

    def _count(self, work: Work) -> int:
        """Count batches since training began, up to that of a work."""
        return self.batches - self._tick + work.batch

    def _backward(self, works: Sequence[tuple[int, Work]]) -> None:
        passes = []
        for index, work in works:
            errors = tensors_of(self._pipes.receive(index + 1, index)) if index < self._last else None
            passes.append(self.stages[index].begin_backward(work, errors, self._count(work)))
        for each, found in zip(passes, differentiate(passes), strict=True):
            backward = each.stage.end_backward(each, found)
            if each.stage.index > 0:
                self._pipes.send(each.stage.index, each.stage.index - 1, tuple(backward))

    def _forward(self, stage: Stage, work: Work) -> None:
        index, first, last = stage.index, stage.index == 0, stage.index == self._last
        count = self._count(work)
        received = None if first else self._pipes.receive(index - 1, index)
        output: object = None
        if not first and not last:
            output = stage.forward(work, received, count, first, self._predicted(stage, work))
        else:
            output = self._forward_in_step(stage, work, count, received)
        if not last:
            value = check_value(output, index)
            self._pipes.send(
                index, index + 1, value.detach() if isinstance(value, Tensor) else tuple(v.detach() for v in value)
            )

    def _forward_in_step(self, stage: Stage, work: Work, count: int, received: Value | None) -> object:
        """Let the training step call the stage, in the place of the whole."""
        first, last = stage.index == 0, stage.index == self._last
        reached: list[object] = []

        def forward(inputs: object) -> object:
            if reached:
                raise ConfigurationError(
                    f"training_step called {type(self._cut).__name__} twice, and a pipeline needs one call for each "
                    "batch. Let it be called once, with the inputs of both calls in one batch."
                )
            given = inputs if first else received
            reached.append(stage.forward(work, given, count, first, self._predicted(stage, work)))
            if not last:
                raise Reached
            seed_random_numbers(stage.device, self._seed, count, work.part, _LOSS)
            return reached[0]

        batch = self._batch
        if self._schedule.parts > 1:
            batch = part_of(batch, self._rows, self._schedule.parts, work.part)
        seed_random_numbers(stage.device, self._seed, count, work.part, _STEP)
        with torch.enable_grad(), calling(self._cut, forward):
            try:
                loss = self.step(batch)
            except Reached:
                return reached[0]
        if not reached:
            raise ConfigurationError(
                f"training_step did not call {type(self._cut).__name__}, which is cut into stages, in this batch. It "
                "needs one call of it for each batch: let configure_stages() return the module that training_step "
                "calls."
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ConfigurationError(
                f"training_step gave {type(loss).__name__} in a pipeline, and needs to give a loss: one number as a "
                "tensor, or a dict with it under 'loss'."
            )
        self._losses.append(loss.detach())
        stage.end_in(work, loss, self._share(work.part))
        return None

    def _predicted(self, stage: Stage, work: Work) -> dict[str, Tensor]:
        """Compute the weights that a batch is forwarded with, if they are not those of now."""
        return {} if self.steps is None else self.steps.predict(stage.trainable(), work.batch - stage.updates)

    def _share(self, part: int) -> float:
        parts = self._schedule.parts
        return 1.0 if parts == 1 else (self._rows // parts + (part < self._rows % parts)) / self._rows


@contextmanager
def calling(module: Module, forward: Callable[[object], object]) -> Iterator[None]:
    """Let a call of a module be one of a function."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
