"""Whose parameters are in whose memory: a worker keeps those of its own stages, and of the others only the shapes.

A parameter that is elsewhere is the same object with another class, as torch's lazy parameters are: optimizers and
modules that hold it need not be told. Its memory is that of one number. Whoever reads it gets an error with the name of
the worker that has it; whoever writes all of it, as `load_state_dict` does, has it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_decentral.errors import ConfigurationError

_BY_VALUE = {"data", "T", "mT", "H", "mH", "real", "imag"}  # the properties that are values, or a view of them
_WITHOUT_VALUES = {
    getattr(Tensor, name)
    for name in (
        *("__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous"),
        *("is_floating_point", "ndimension", "nelement", "numel", "register_hook", "requires_grad_", "size", "stride"),
        *("register_post_accumulate_grad_hook",),
    )
}
_WITHOUT_VALUES.add(torch._has_compatible_shallow_copy_type)  # `Module.to` asks it
_MOVES = {getattr(Tensor, name) for name in ("bfloat16", "cpu", "cuda", "double", "float", "half", "to")}


class _Elsewhere:
    """What a parameter's class has in front of it while its values are on another worker."""

    _place: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_property = type(func).__name__ == "method-wrapper"
        if is_property and (func.__name__ != "__get__" or func.__self__.__name__ not in _BY_VALUE):
            pass
        elif func in _MOVES:  # of the whole module: the one number goes along
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0].detach().as_strided((), ()), *args[1:], **(kwargs or {})).expand(args[0].shape)
        elif func is Tensor.copy_ and not is_here(args[0]):
            come_back([args[0]])
        elif func not in _WITHOUT_VALUES:
            away = next(value for value in (*args, *(kwargs or {}).values()) if _contains(value))
            while isinstance(away, list | tuple):
                away = next(value for value in away if _contains(value))
            raise ConfigurationError(away._place)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _contains(value: object) -> bool:
    return isinstance(value, _Elsewhere) or (isinstance(value, list | tuple) and any(map(_contains, value)))


_CLASSES: dict[type, type] = {}


def is_here(parameter: Tensor) -> bool:
    """Tell whether this worker has the values of a parameter.

    While a pipeline trains, code that goes over all parameters, such as one that clamps them, leaves out those for
    which this is false: their own worker goes over them.
    """
    return not isinstance(parameter, _Elsewhere)


def send_away(parameter: Parameter, name: str, worker: int, device: torch.device | None = None) -> None:
    """Give up the memory of a parameter; its shape and type stay.

    Args:
        parameter: with values or without.
        name: of it in the model.
        worker: who has it.
        device: on which its values are if they come back; by default where they were.
    """
    if not is_here(parameter):
        return
    own = type(parameter)
    if own not in _CLASSES:
        metaclass: Any = type(own)
        _CLASSES[own] = metaclass(f"Elsewhere{own.__name__}", (_Elsewhere, own), {"_own_class": own})
    place = parameter.device if device is None else device
    parameter.data = parameter.data.new_full((), float("nan"), device=place).expand(parameter.shape)
    parameter.grad = None
    parameter.__class__ = _CLASSES[own]
    parameter._place = (  # type: ignore[attr-defined]
        f"The parameter {name!r} was used on a worker that does not have it: its stage of the pipeline is on worker "
        f"{worker}, and here is only its shape. Use it there: leave out parameters for which "
        "lightning_decentral.pipeline.residence.is_here is false; or in a validation, in on_train_end, or from a "
        "checkpoint, where the model is whole."
    )


def come_back(parameters: Iterable[Parameter]) -> None:
    """Make room for the values of parameters, which are not a number until they are written."""
    for parameter in parameters:
        if is_here(parameter):
            continue
        del parameter._place  # type: ignore[attr-defined]
        parameter.__class__ = parameter._own_class  # type: ignore[attr-defined]
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device).fill_(
            float("nan")
        )


class Residence:
    """The parameters of a model that are on other workers while this one trains.

    Args:
        workers: of each parameter that is not of this worker's stages.
        names: of the parameters in the model.
        device: on which their values are when they come back; by default where they were.
    """

    def __init__(
        self, workers: Mapping[Parameter, int], names: Mapping[Parameter, str], device: torch.device | None = None
    ) -> None:
        self._workers = dict(workers)
        self._names = names
        self._device = device
        self._away = False

    @property
    def is_away(self) -> bool:
        """Whether what is of other workers was given up."""
        return self._away

    def leave(self, optimizers: Sequence[Optimizer]) -> None:
        """Give up what is of other workers: values, gradients, and what optimizers remember. Free if it is done."""
        if self._away:
            return
        self._away = True
        for parameter, worker in self._workers.items():
            send_away(parameter, self._names[parameter], worker, self._device)
        for optimizer in optimizers:
            for parameter in self._workers:
                optimizer.state.pop(parameter, None)

    @contextmanager
    def left_out(self) -> Iterator[set[str]]:
        """Give the names of what is away, which can be read in the meantime, and is not a number."""
        away = [parameter for parameter in self._workers if not is_here(parameter)]
        come_back(away)
        yield {self._names[parameter] for parameter in away}
        self._away = False
        self.leave(())

    def come_back(self) -> None:
        """Make room for the whole model, until `leave`."""
        self._away = False
        come_back(self._workers)

    def note_written(self) -> None:
        """Note that somebody may have written the whole model."""
        self._away = False
