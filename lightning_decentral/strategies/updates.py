"""One call of an optimizer, with an exchange between its gradient and its update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.optim import Optimizer

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError


class Update:
    """One call of an optimizer: the exchange comes between its gradient and its update.

    Args:
        stepper: of the optimizer's parameters.
        optimizer: which; for messages.
        exchange: what is to be done once the gradient is there.

    Attributes:
        entered: whether the gradient was there.
        wanted: whether the algorithm's step has an update.
        evaluations: how often the loss was evaluated.
    """

    def __init__(self, stepper: Stepper, optimizer: Optimizer, exchange: Callable[[], None]) -> None:
        self._stepper, self._optimizer, self._exchange = stepper, optimizer, exchange
        self._updating: AbstractContextManager[bool] | None = None
        self.entered = self.wanted = False
        self.evaluations = 0

    def after(self, closure: Callable[[], Any]) -> Any:
        """Compute the gradient, then make the exchange; a further gradient is the worker's own."""
        self.evaluations += 1
        if self.entered and self._stepper.reads_gradients:
            raise ConfigurationError(
                f"{type(self._optimizer).__name__} evaluates the loss more than once in a step, but "
                f"{type(self._stepper.algorithm).__name__} exchanges exactly one gradient in each. Use an optimizer "
                "that evaluates it once, such as SGD or Adam, or a method that exchanges parameters, such as DPSGD."
            )
        result = closure()
        if not self.entered:
            self.enter()
        return result

    def enter(self) -> None:
        """Learn that the gradient is there: from here on the optimizer may change the parameters."""
        self._exchange()
        self.entered = True
        self._updating = self._stepper.updating()
        self.wanted = self._updating.__enter__()
        if not self.wanted:  # the algorithm's step has no update: an optimizer leaves alone what has no gradient
            forget_gradients(self._stepper)

    def close(self) -> None:
        """Learn that the optimizer has changed the parameters."""
        if self._updating is not None:
            self._updating.__exit__(None, None, None)
            self._updating = None


def prepare_hooks(optimizer: Optimizer) -> None:
    """Let an optimizer have hooks around its steps, also one whose class never called torch's constructor.

    A wrapper that is written by hand, such as a Lookahead, often does not, and Lightning trains with it.

    Raises:
        ConfigurationError: of what is no torch optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            f"configure_optimizers returned a {type(optimizer).__name__}, which is no torch.optim.Optimizer: it does "
            "not tell when it makes an update, with which an exchange belongs. Derive its class from "
            "torch.optim.Optimizer."
        )
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        vars(optimizer).setdefault("defaults", {})
        Optimizer.__setstate__(optimizer, {})  # makes what the constructor would have made


def forget_gradients(stepper: Stepper) -> None:
    """Let no parameter have a gradient."""
    for parameter in stepper.flat.parameters:
        parameter.grad = None
