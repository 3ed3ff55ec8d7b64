"""Who looks at the models that workers receive, and what the parameters in them are called."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import Module

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.strategies.buffers import INDEX_OF_BUFFERS
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.poison import Inspector, Poisoned

__all__ = ["Poisoned", "check_poisoned", "inspect_messages"]


def check_poisoned(strategy: str, poisoned: str) -> None:
    """Refuse a wrong option."""
    if poisoned not in ("warn", "refuse", "raise"):
        raise ConfigurationError(f"{strategy}(poisoned={poisoned!r}): needs 'warn', 'refuse' or 'raise'.")


def inspect_messages(
    poisoned: Poisoned, module: Module, communicator: Communicator, steppers: Sequence[Stepper]
) -> None:
    """Let every model that this worker receives be looked at.

    Args:
        poisoned: what happens to one that is not finite.
        module: has the parameters' names.
        communicator: receives.
        steppers: of the models, by number; may change.
    """

    def describe(index: int, message: Vector) -> str:
        if index == INDEX_OF_BUFFERS:
            return "among the buffers that buffers='gossip' averages"
        stepper = steppers[index]
        step = f"in step {stepper.worker.step}"
        if [buffer.numel() for buffer in message.buffers] != stepper.flat.layout.sizes:
            return step
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        bad = [
            names.get(id(parameter), "a parameter that the module does not have")
            for parameter, values in zip(stepper.flat.parameters, stepper.flat.layout.views(message), strict=True)
            if not bool(values.isfinite().all())
        ]
        more = f" and {len(bad) - 1} other parameters" if len(bad) > 1 else ""
        return f"{step}, in {bad[0]!r}{more}" if bad else step

    communicator.inspector = Inspector(poisoned, communicator.rank, describe)
