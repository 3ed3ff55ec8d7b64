"""Refusing workers whose models differ: broadcasting and averaging those would hang, or mix up parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from torch import Tensor
from torch.nn import Module, SyncBatchNorm
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.strategies.remembered import parameter_names
from lightning_decentral.transport.gathering import gather_objects


def require_equal(layout: list[str], what: str) -> None:
    """Refuse models that differ between workers: broadcasting and averaging them would hang, or mix up parameters."""
    layouts = gather_objects(layout)
    different = [rank for rank, other in enumerate(layouts) if other != layouts[0]]
    if different:
        pairs = zip_longest(layouts[different[0]], layouts[0], fillvalue="nothing")
        theirs, first = next((theirs, first) for theirs, first in pairs if theirs != first)
        raise ConfigurationError(
            f"Workers {different} have other {what} than worker 0: worker {different[0]} has {theirs} where worker 0 "
            f"has {first}. All workers must build the same model and optimizers, in the same order: make sure that "
            "neither depends on the rank."
        )


def described_tensors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Tell what tensors are, in words, to compare workers with."""
    return [
        f"{name} of shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in named
    ]


def described_steppers(steppers: Iterable[Stepper], module: Module) -> list[str]:
    """Tell what the models that are exchanged are made of, to compare workers with."""
    layout = []
    for index, stepper in enumerate(steppers):
        names = parameter_names(stepper, module)
        parts = described_tensors(zip(names, stepper.flat.parameters, strict=True))
        parts.append(f"the memory format {stepper.flat.layout.fingerprint()}")
        layout += [f"{part} (optimizer {index})" for part in parts]
    return layout


def refuse_shared_parameters(algorithm: AbstractAlgorithm, optimizers: Sequence[Optimizer]) -> None:
    """Refuse parameters that have several optimizers, each of which would exchange the same gradient.

    Raises:
        ConfigurationError: if there are any.
    """
    owners: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if owners.setdefault(id(parameter), index) != index:
                raise ConfigurationError(
                    f"Optimizers {owners[id(parameter)]} and {index} have a parameter in common, of shape "
                    f"{tuple(parameter.shape)}, but {type(algorithm).__name__} exchanges the gradient of each once. "
                    "Give every parameter to one optimizer, or use a method that exchanges parameters, such as DPSGD."
                )


def refuse_layers_that_wait(strategy: str, module: Module) -> None:
    """Refuse layers for which asynchronous workers would all wait for each other in every step.

    Args:
        strategy: its name.
        module: the user's.

    Raises:
        ConfigurationError: if there are any.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, SyncBatchNorm):
            raise ConfigurationError(
                f"{strategy} got {name or 'a module'}, a SyncBatchNorm, which makes all workers wait for each other in "
                "every forward pass. Use BatchNorm: buffers are averaged for evaluation. GroupNorm does without "
                "batches."
            )
        if isinstance(layer, Metric) and layer.dist_sync_on_step:
            raise ConfigurationError(
                f"{strategy} got {name or 'a module'}, a {type(layer).__name__}(dist_sync_on_step=True), which makes "
                "all workers wait for each other in every step. Leave it out: the metric of an epoch is that of all "
                "workers."
            )
