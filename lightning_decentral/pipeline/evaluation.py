"""Evaluation through the stages: each batch goes forward through all of them, and no worker needs the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Module

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.random_numbers import own_random_numbers, seed_random_numbers
from lightning_decentral.pipeline.runner import AbstractPipes, Reached, calling
from lightning_decentral.pipeline.stage import Value, check_value

_AHEAD = 2  # batches that a stage may have sent and the next one has not begun
_EVALUATION, _STEP, _LOSS = -3, -1, -2  # in the places of a batch and of a stage: what random numbers are for


class Evaluation:
    """Brings batches forward through the stages of one worker.

    The first stage's worker runs the user's step up to the call that is cut, the last one's from there to its end; the
    stages between them run their blocks and no step. A stage goes on with the next batch as soon as it has sent one, as
    far as two batches ahead of the stage behind it.

    Args:
        cut: the module whose call in the step is cut into stages.
        stages: the blocks of each stage of this worker, by its number.
        last: the number of the last stage.
        pipes: to the other stages, which nothing else uses.
        device: of the blocks.
        seed: of the run. What a step draws belongs to its batch: all workers draw the same.
    """

    def __init__(
        self,
        cut: Module,
        stages: Mapping[int, Module],
        last: int,
        pipes: AbstractPipes,
        device: torch.device,
        seed: int,
    ) -> None:
        self._cut = cut
        self._stages = dict(sorted(stages.items()))
        self._last = last
        self._pipes = pipes
        self._device = device
        self._seed = seed
        self._batches = 0
        self._unread = dict.fromkeys(stages, 0)  # what the next stage has not begun, of what was sent

    def begin(self) -> None:
        """Begin an evaluation: its first batch draws what the first one of each draws."""
        self._batches = 0

    def run(self, step: Callable[[], object]) -> object:
        """Bring one batch through the stages of this worker, in the mode in which the modules are.

        Args:
            step: the user's step with its batch; calls what is cut once.

        Returns:
            What the step gives, if this worker has the last stage; otherwise nothing.

        Raises:
            ConfigurationError: if the step does not call what is cut, or twice, or a stage gives no tensors.
        """
        result: object = None
        with own_random_numbers(self._device):
            for index, blocks in self._stages.items():
                received = self._receive(index) if index else None
                if index in (0, self._last):
                    output, result = self._run_in_step(index, received, step)
                else:
                    self._draw(index)
                    output = blocks(received)
                if index < self._last:
                    self._send(index, check_value(output, index))
        self._batches += 1
        return result

    def _run_in_step(self, index: int, received: Value | None, step: Callable[[], object]) -> tuple[object, object]:
        """Let the step call a stage in the place of the whole; return the stage's output, and the step's."""
        name = type(self._cut).__name__
        outputs: list[object] = []

        def forward(inputs: object) -> object:
            if outputs:
                raise ConfigurationError(
                    f"An evaluation through the stages got a step that calls {name} twice, and needs one call for each "
                    'batch. Put the inputs of both calls into one batch, or use evaluate="whole".'
                )
            self._draw(index)
            outputs.append(self._stages[index](inputs if index == 0 else received))
            if index < self._last:
                raise Reached
            self._draw(_LOSS)
            return outputs[0]

        self._draw(_STEP)
        with calling(self._cut, forward):
            try:
                result = step()
            except Reached:
                return outputs[0], None
        if not outputs:
            raise ConfigurationError(
                f"An evaluation through the stages got a step that does not call {name}, which is cut into stages, and "
                'needs one call of it for each batch. Call it, or use evaluate="whole".'
            )
        return outputs[0], result

    def _draw(self, what: int) -> None:
        seed_random_numbers(self._device, self._seed, _EVALUATION, self._batches, what)

    def _receive(self, index: int) -> Value:
        value = self._pipes.receive(index - 1, index)
        if index - 1 not in self._stages:
            self._pipes.send(index, index - 1, torch.empty(0))
        return value

    def _send(self, index: int, value: Value) -> None:
        if index + 1 not in self._stages:
            while self._unread[index] >= _AHEAD:
                self._pipes.receive(index + 1, index)
                self._unread[index] -= 1
            self._unread[index] += 1
        self._pipes.send(
            index, index + 1, value.detach() if isinstance(value, Tensor) else tuple(each.detach() for each in value)
        )
