"""What a worker remembers, for its checkpoint: its algorithm's state for each optimizer, and its random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy
import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_decentral.conduct import require_no_ticket
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import pack, unpack
from lightning_decentral.protocol import AbstractErrorFeedbackAlgorithm


def stepper_states(steppers: Iterable[Stepper], module: Module) -> list[dict[str, Any]]:
    """Tell what the algorithm remembers, for each optimizer of this worker.

    Raises:
        ProtocolError: if it keeps a ticket in ``worker.state``.
    """
    steppers = list(steppers)
    for stepper in steppers:
        require_no_ticket(stepper.algorithm, stepper.worker)
    return [
        {
            "algorithm": repr(stepper.algorithm),
            "names": parameter_names(stepper, module),
            "step": stepper.worker.step,
            "version": stepper.worker.version,
            "state": pack(stepper.worker.state),
            "rng": stepper.worker.rng.getstate(),
        }
        for stepper in steppers
    ]


def parameter_names(stepper: Stepper, module: Module) -> list[str]:
    """Return the names of a stepper's parameters, in order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names.get(id(parameter), "") for parameter in stepper.flat.parameters]


def owned_places(stepper: Stepper, optimizer: Optimizer) -> list[int]:
    """Tell where an optimizer's ``state_dict`` has the parameters that this worker keeps, of a model in shards."""
    algorithm, worker, flat = stepper.algorithm, stepper.worker, stepper.flat
    keepers = algorithm.keepers(worker.world_size)
    if algorithm.shards == 1 or worker.rank not in keepers:
        return []
    positions = flat.layout.positions_in((keepers.index(worker.rank), algorithm.shards))
    owned = {id(flat.parameters[position]) for position in positions}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [place for place, parameter in enumerate(parameters) if id(parameter) in owned]


def saved_names(state: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the parameters that one of `stepper_states` is about, in order; ``None`` in files without
    them."""
    return state.get("names")


def restore_stepper(stepper: Stepper, saved: dict[str, Any], device: torch.device) -> None:
    """Give a stepper what its worker file has."""
    _require_same_algorithm(stepper, saved)
    worker = stepper.worker
    worker.step, worker.version = saved["step"], saved["version"]
    state = unpack(saved["state"], device)
    assert isinstance(state, dict)
    worker.state.update(state)
    version, internal, gauss = saved["rng"]
    worker.rng.setstate((version, tuple(internal), gauss))


def regroup_stepper(stepper: Stepper, saved: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Give a stepper its part of what the worker files of another number of workers have."""
    algorithm, worker = stepper.algorithm, stepper.worker
    assert isinstance(algorithm, AbstractErrorFeedbackAlgorithm)
    for one in saved:
        _require_same_algorithm(stepper, one)
    states = [unpack(one["state"], device) for one in saved]
    assert all(isinstance(state, dict) for state in states)
    worker.state.update(algorithm.regrouped(states))  # type: ignore[arg-type]
    worker.step = saved[0]["step"]  # what is drawn alike on all workers goes on


def require_same_names(saved: list[str] | None, now: list[str]) -> None:
    """Refuse a state that is about other parameters."""
    for before, after in zip_longest(saved or (), now if saved else (), fillvalue="nothing"):
        if before != after:
            raise ConfigurationError(
                f"The checkpoint's optimizer had {before} where this run's has {after}, and what a method remembers is "
                "of one and not of the other. Resume with the same configure_optimizers, or pass resume='consensus' to "
                "the strategy to start from the averaged model."
            )


def _require_same_algorithm(stepper: Stepper, saved: dict[str, Any]) -> None:
    if saved["algorithm"] != repr(stepper.algorithm):
        raise ConfigurationError(
            f"The checkpoint is of {saved['algorithm']}, but this run uses {stepper.algorithm!r}: what one method "
            "remembers means nothing to another. Resume with the same algorithm, or pass resume='consensus' to the "
            "strategy to start from the averaged model."
        )


def random_state() -> dict[str, Any]:
    """Return the state of every global random number generator, as tensors and plain values."""
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(name), torch.tensor(keys, dtype=torch.int64), int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every global random number generator to what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
