"""Updates by the user's optimizer that a server makes while its training loop computes a gradient.

The optimizer knows the module's parameters, which show the snapshot at that time. So a *twin* of it makes these
updates: an object of the same class, with parameters of its own that are views of the model, with the hyper-parameters
that the optimizer has at that moment, and with its very state.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn import Module, Parameter
from torch.optim import LBFGS, Optimizer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import FlatParameters, Vector
from lightning_decentral.protocol import AbstractAlgorithm

_READ = ("param_groups", "state")  # what a twin has of its own
_HOOK = "on_before_optimizer_step"
_OWN = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class UpdatesBeside:
    """Makes updates of a model with a gradient, on any thread that holds the model's monitor.

    Args:
        trainer: says how gradients are clipped.
        optimizer: what the user has configured now.
        flat: the parameters.
    """

    def __init__(self, trainer: Trainer, optimizer: Callable[[], Optimizer], flat: FlatParameters) -> None:
        self._trainer, self._optimizer, self._flat = trainer, optimizer, flat
        self._of: Optimizer | None = None
        self._twin: Any = None
        self._shadows: dict[int, Parameter] = {}  # by the identity of the parameter
        self._groups: list[list[int]] = []  # the identities of the parameters that the optimizer had
        module = trainer.lightning_module
        self._clips = trainer.gradient_clip_val is not None or is_overridden("configure_gradient_clipping", module)
        self._looks = is_overridden(_HOOK, module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._lookers = [each for each in callbacks if is_overridden(_HOOK, each)]

    def __call__(self, gradient: Vector, shard: tuple[int, int] | None = None) -> bool:
        """Apply a gradient; tell whether an update was made.

        Args:
            gradient: of the model, or of a shard of it.
            shard: which, and of how many; ``None``: the model.
        """
        optimizer, flat = self._optimizer(), self._flat
        groups = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
        if optimizer is not self._of or groups != self._groups:
            self._of, self._groups = optimizer, groups
            self._make_twin(optimizer)
        twin = self._twin
        given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for group, values in zip(twin.param_groups, given, strict=True):
            parameters = group["params"]
            group.clear()  # a scheduler that is gone, a search's for example, has left values of its own
            group.update(values, params=parameters)
        pairs = zip(flat.parameters, flat.layout.views(flat.x), flat.views_of(gradient, shard), strict=True)
        for position, (parameter, value, direction) in enumerate(pairs):
            shadow = self._shadows[id(parameter)]
            shadow.data = value
            shadow.grad = None if direction is None else direction.to(value.dtype)
            if direction is not None and position in flat.sparse:
                shadow.grad = direction.to_sparse(1)
            if parameter in optimizer.state:
                twin.state[shadow] = optimizer.state[parameter]
            else:
                twin.state.pop(shadow, None)
        self._call_hooks(twin)
        twin.step()
        for parameter, value in zip(flat.parameters, flat.layout.views(flat.x), strict=True):
            shadow = self._shadows[id(parameter)]
            if shadow.data_ptr() != value.data_ptr():  # the optimizer has put new data there
                value.copy_(shadow.detach())
            shadow.grad = None
            if shadow in twin.state:
                optimizer.state[parameter] = twin.state[shadow]
        for group, before, own in zip(twin.param_groups, given, optimizer.param_groups, strict=True):
            changed = {name: value for name, value in group.items() if name not in before or value is not before[name]}
            own.update({name: value for name, value in changed.items() if name != "params"})
        return True

    def _make_twin(self, optimizer: Optimizer) -> None:
        self._shadows = {
            id(parameter): Parameter(view) for parameter, view in zip(self._flat.parameters, self._views(), strict=True)
        }
        twin: Any = object.__new__(type(optimizer))
        attributes = vars(twin)
        attributes |= vars(optimizer)
        attributes.pop("step", None)  # a scheduler has wrapped the optimizer's own
        attributes |= {name: OrderedDict() for name in _OWN}  # hooks are the training loop's
        twin.state = defaultdict(dict)
        twin.param_groups = [
            {**group, "params": [self._shadows[id(p)] for p in group["params"] if id(p) in self._shadows]}
            for group in optimizer.param_groups
        ]
        self._twin = twin

    def _views(self) -> Any:
        return self._flat.layout.views(self._flat.x)

    def _call_hooks(self, twin: Any) -> None:
        """Call what looks at a gradient before its update, or clips it, with a module that has this gradient.

        The module itself has the one that the training loop is about to compute.
        """
        if not (self._clips or self._looks or self._lookers):
            return
        trainer, module = self._trainer, self._trainer.lightning_module
        shown: Any = shadow_of(module, self._shadows)
        vars(shown).update(log=_log_nothing, log_dict=_log_nothing)  # the loop's results are of its own hooks
        before = dict(vars(shown))
        for callback in self._lookers:
            callback.on_before_optimizer_step(trainer, shown, twin)
        if self._looks:
            shown.on_before_optimizer_step(twin)
        if self._clips:
            shown.configure_gradient_clipping(twin, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        for name, value in vars(shown).items():
            if name not in before or before[name] is not value:  # such as a norm that user code keeps
                vars(module)[name] = value


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def shadow_of(module: Module, shadows: Mapping[int, Parameter], made: dict[int, Module] | None = None) -> Module:
    """Make a module like another, whose parameters are others; all else is the same, also parts without any of them.

    Args:
        module: which.
        shadows: the other parameters, by the identity of those in whose place they are.
        made: what stands for modules that were looked at already, by the identity of the original.
    """
    whole, made = made is None, {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    own, made[id(module)] = vars(module), module
    parts: dict[str, dict[str, Any]] = {
        "_parameters": {name: shadows.get(id(each), each) for name, each in own["_parameters"].items()},
        "_modules": {
            name: child if child is None else shadow_of(child, shadows, made) for name, child in own["_modules"].items()
        },
    }
    if whole or any(each is not own[kind][name] for kind, part in parts.items() for name, each in part.items()):
        made[id(module)] = shadow = object.__new__(type(module))
        vars(shadow).update(own, **parts)
    return made[id(module)]


def refuse_norms_of_shards(algorithm: AbstractAlgorithm, trainer: Trainer) -> None:
    """Refuse, before training, clipping by the norm of a gradient that no server has: each has that of its shard.

    Raises:
        ConfigurationError: if the model is cut into shards, and gradients are clipped by their norm.
    """
    own_way = is_overridden("configure_gradient_clipping", trainer.lightning_module)
    by_norm = trainer.gradient_clip_val is not None and trainer.gradient_clip_algorithm != "value" and not own_way
    if algorithm.shards > 1 and by_norm:
        raise ConfigurationError(
            f"{type(algorithm).__name__}(shards={algorithm.shards}) got gradient_clip_val={trainer.gradient_clip_val}, "
            "by the norm of a gradient, but no server has all of one: each would clip its shard, less than the whole. "
            "Use gradient_clip_algorithm='value', shards=1, or a `configure_gradient_clipping` that clips each "
            "parameter by itself."
        )


def refuse_other_parameters(algorithm: AbstractAlgorithm, optimizer: Optimizer) -> None:
    """Refuse, in training, parameters by which a model in shards would be cut elsewhere.

    Raises:
        ConfigurationError: if it is in shards.
    """
    if algorithm.shards > 1:
        raise ConfigurationError(
            f"{type(optimizer).__name__} got other trainable parameters in training, by which {algorithm!r} would cut "
            "the model elsewhere: what a server's optimizer remembers would be of parameters that it has no more. Let "
            "them be trainable from the beginning (with a learning rate of 0), or use shards=1."
        )


def refuse_what_no_server_applies(algorithm: AbstractAlgorithm, trainer: Trainer) -> None:
    """Refuse, before training, what a server cannot do with gradients that come from other workers.

    Raises:
        ConfigurationError: for manual optimization, a gradient scaler, an optimizer that asks for the loss again or
            of which no twin can be made, or what `refuse_norms_of_shards` does.
    """
    method = type(algorithm).__name__
    refuse_norms_of_shards(algorithm, trainer)
    if not trainer.lightning_module.automatic_optimization:
        raise ConfigurationError(
            f"{method} got automatic_optimization=False, but updates are the server's: training_step cannot say when "
            "they are made. Use automatic optimization, or a method without a server, such as ADPSGD."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ConfigurationError(
            f"{method} got a gradient scaler (precision='16-mixed'), which changes the unit of the gradients that "
            "workers send to the server, each at its own time. Use 'bf16-mixed' or '32-true'."
        )
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LBFGS):
            raise ConfigurationError(
                f"{method} got {type(optimizer).__name__}, which evaluates the loss again in each update, but the "
                "server has a gradient and not the batch that it came of. Use an optimizer that needs the gradient "
                "alone, such as SGD or Adam, or a method without a server, such as ADPSGD."
            )
        name = next((name for name, value in vars(optimizer).items() if name not in _READ and _has_others(value)), None)
        if name is not None:
            raise ConfigurationError(
                f"{method} got {type(optimizer).__name__}, which keeps parameters or another optimizer in `{name}`. "
                "But the server makes updates beside gradients, with a copy of the optimizer that has other "
                "parameters: it needs one that finds them in `param_groups` only, and what it remembers in `state`. "
                "Use such a one, perhaps the inner optimizer, or a method without a server, such as ADPSGD."
            )


def _has_others(value: Any) -> bool:
    """Tell whether an optimizer's attribute leads past `param_groups` to parameters, or to another optimizer."""
    if isinstance(value, Mapping):
        return any(map(_has_others, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_has_others, value))
    return isinstance(value, Optimizer | Parameter)
