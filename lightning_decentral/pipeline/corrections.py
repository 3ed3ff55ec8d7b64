"""Corrections for delays: weights predicted for the update that a batch will make, and lower rates at first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class Steps:
    """What updates change weights by, smoothed, and the weights that follow from it some updates ahead.

    The rule is ``d <- decay d + (1 - decay) (w_new - w_old)`` after each update, from zero, and ``w + s d`` for the
    weights after ``s`` more. Whatever optimizer made the update, and whatever a callback changed after it, is in it.

    Args:
        decay: 0: the last update alone.

    Cost:
        One copy of the weights that are trained, and one more from an update to the next forward pass.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._steps: dict[Parameter, Tensor] = {}
        self._before: dict[Parameter, Tensor] = {}

    def begin_update(self, parameters: Sequence[Parameter]) -> None:
        """Keep the weights that an update is about to change."""
        self.end_update()
        if not parameters:
            return
        with torch.no_grad():
            self._before = dict(zip(parameters, torch._foreach_mul(list(parameters), 1.0), strict=True))

    def end_update(self) -> None:
        """Take note of what the last update has made of them."""
        if not self._before:
            return
        parameters: list[Tensor] = [*self._before]
        before = list(self._before.values())
        with torch.no_grad():
            changes = torch._foreach_sub(parameters, before)
            if self._decay:
                torch._foreach_lerp_(changes, self._known(list(self._before)), self._decay)
        self._steps |= dict(zip(self._before, changes, strict=True))
        self._before = {}

    def predict(self, parameters: Mapping[str, Parameter], updates: int) -> dict[str, Tensor]:
        """Compute weights so many updates ahead, by their names; nothing where these are the weights of now."""
        if not updates or not self._steps or not parameters:
            return {}
        values: list[Tensor] = [*parameters.values()]
        with torch.no_grad():
            ahead = torch._foreach_add(values, self._known(list(parameters.values())), alpha=updates)
        return dict(zip(parameters, ahead, strict=True))

    def remembered(self) -> dict[Parameter, Tensor]:
        """Return the smoothed steps, to be saved."""
        self.end_update()
        return dict(self._steps)

    def remember(self, steps: Mapping[Parameter, Tensor]) -> None:
        """Go on with steps that were saved; what was known is forgotten."""
        self._steps, self._before = dict(steps), {}

    def _known(self, parameters: Sequence[Parameter]) -> list[Tensor]:
        for parameter in parameters:
            if parameter not in self._steps:  # has not been trained before
                self._steps[parameter] = torch.zeros_like(parameter)
        return [self._steps[parameter] for parameter in parameters]


@contextmanager
def slower(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Let an optimizer make its updates with so many times its learning rates."""
    if factor == 1.0:
        yield
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
