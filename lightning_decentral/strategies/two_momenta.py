"""Refusing an optimizer with momentum under a method that has its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm


def refuse_two_momenta(algorithm: AbstractAlgorithm, optimizers: Sequence[Optimizer]) -> None:
    """Refuse a momentum of a momentum: the fixed point that the method is made for would be another one.

    Raises:
        ConfigurationError: if the method has one, and an optimizer as well.
    """
    if not algorithm.brings_momentum:
        return
    for optimizer in optimizers:
        found = [group["momentum"] for group in optimizer.param_groups if group.get("momentum")]
        if found:
            raise ConfigurationError(
                f"{type(algorithm).__name__} got {type(optimizer).__name__} with momentum={found[0]}, needs one "
                "without: it has a momentum of its own. Write torch.optim.SGD(parameters, lr=...), and give the method "
                f"the momentum: {type(algorithm).__name__}(momentum={found[0]})."
            )
