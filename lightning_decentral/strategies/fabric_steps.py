"""The steps of one optimizer in a loop around Fabric: they begin with a forward pass, and end with its update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies.updates import Update, prepare_hooks


class Model(Module):
    """A module whose forward passes with gradients begin steps.

    Args:
        module: the user's.
        begin: begins a step.
    """

    def __init__(self, module: Module, begin: Callable[[Model], None]) -> None:
        super().__init__()
        self.module = module
        self._begin = begin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's forward pass."""
        if torch.is_grad_enabled():
            self._begin(self)
        return self.module(*args, **kwargs)


def unwrapped(module: Module) -> Module:
    """Return the user's module."""
    return module.module if isinstance(module, Model) else module


def trainable(optimizer: Optimizer) -> Iterator[torch.nn.Parameter]:
    """Tell what an optimizer trains now."""
    return (p for p in chain.from_iterable(group["params"] for group in optimizer.param_groups) if p.requires_grad)


@dataclass(eq=False)
class Trained:
    """An optimizer and the stepper of its parameters.

    Attributes:
        optimizer: the user's.
        stepper: drives the algorithm.
        models: that have some of the parameters.
    """

    optimizer: Optimizer
    stepper: Stepper
    models: list[Model]

    def __post_init__(self) -> None:
        self._update: Update | None = None
        self._updated = False
        prepare_hooks(self.optimizer)
        self._hook = self.optimizer.register_step_post_hook(self._note_update)

    def _note_update(self, *_: Any) -> None:
        self._updated = True

    def begin(self) -> None:
        """Begin a step.

        Raises:
            ConfigurationError: of parameters that were frozen, or not there, when the first step was made.
        """
        known = {id(parameter) for parameter in self.stepper.flat.parameters}
        others = [p for p in trainable(self.optimizer) if id(p) not in known]
        if others:
            raise ConfigurationError(
                f"{type(self.optimizer).__name__} got {len(others)} trainable parameters that it did not have before "
                "the first step, and in Fabric the workers exchange the same ones all the time. Let them be trainable "
                "before the first step (with a learning rate of 0), or use the Trainer, whose strategies follow."
            )
        self.stepper.begin()

    def enter(self) -> None:
        """Make the exchange, unless it is made: the gradient is there."""
        if self._update is None:
            self._update = Update(self.stepper, self.optimizer, self._exchange)
            self._update.enter()

    def _exchange(self) -> None:
        stepper = self.stepper
        if not stepper.active:
            if stepper.snapshot is not stepper.x:
                raise ConfigurationError(
                    f"{type(self.optimizer).__name__}.step was called without a forward pass, with gradients, of a "
                    f"module that fabric.setup returned, but {type(stepper.algorithm).__name__} takes gradients at a "
                    "vector of its own, which that pass shows. Compute the loss by calling that module."
                )
            stepper.begin(gradient_is_there=True)
        if stepper.awaits_gradient:
            stepper.after_gradient()

    def step(self, apply: Callable[..., Any], closure: Callable[[], Any] | None, **options: Any) -> Any:
        """Return the optimizer's update, with the exchange of this step.

        Args:
            apply: lets the optimizer make it.
            closure: computes the gradient; none: it is there.
            options: for the optimizer.
        """
        stepper, self._updated = self.stepper, False
        if stepper.guarded and not stepper.reads_gradients:
            # What its many points are made of is a copy, and what has become of it counts as one update.
            output = apply(**options) if closure is None else apply(closure=closure, **options)
            if stepper.active:
                self._exchange()
                stepper.finish(stepper.updated)
            return output
        update = self._update or Update(stepper, self.optimizer, self._exchange)
        self._update = None
        try:
            if closure is None:
                if not update.entered:
                    update.enter()
                output = apply(**options)
            else:
                output = apply(closure=partial(update.after, closure), **options)
        finally:
            update.close()
        if update.entered:
            stepper.updated |= update.wanted and self._updated
            stepper.finish(stepper.updated)
        return output

    def close(self) -> None:
        """Let go of the optimizer and its parameters."""
        if self._update is not None:
            self._update.close()
        self._hook.remove()
        self.stepper.flat.release()
