"""The names for `Trainer(strategy=...)`, registered with Lightning as soon as both packages are imported.

Fabric has a registry of its own, with the same names. In those of the other distribution of Lightning they say in words
what to use. Once LightningCLI is imported, so are our classes: it knows a class by its short name only if it is there.

The finder that waits for Lightning sees every import, so it also leads old paths of our modules to new ones (`moved`).
All that an import of torch pays for is in this module; what it needs later is imported later.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

CLASSES = {
    "Strategy": "Any algorithm of lightning_decentral; D-PSGD if it is not told which",
    "GossipStrategy": "A synchronous algorithm of lightning_decentral; D-PSGD if it is not told which",
    "AsyncStrategy": "An asynchronous algorithm of lightning_decentral; AD-PSGD if it is not told which",
    "PipelineStrategy": "One model in stages, each on a worker of lightning_decentral; DSP if it is not told which",
    "AutoStrategy": "Measures links, gradients and data, and chooses a method of lightning_decentral by them",
    "SimulatedStrategy": "Virtual workers of lightning_decentral in one process; AD-PSGD if it is not told which",
}
"""Name -> description of the strategies' classes, which can be given by name where a name is all that can be given."""

AUTO = "decentral_auto"
"""The name of `AutoStrategy` for trainers. "auto" alone is Lightning's own, for the device."""

_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def install() -> None:
    """Register now with what of Lightning is there, and later with the rest. Repeating it does no harm."""
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    for name, action in _ACTIONS.items():
        module = sys.modules.get(name)
        if module is None:
            finder.waiting.add(name)
        elif not getattr(module.__spec__, "_initializing", False):  # half of a module: whoever loads it does it
            action(module)


def register(registry: Any) -> None:
    """Add every name, with its ``_spawn``, ``_fork`` and ``_notebook`` forms, to a Lightning strategy registry."""
    for name, suffix, description in _names():
        _add(registry, name + suffix, partial(_build, name, _START_METHODS[suffix]), description)
    for name, suffix, description in _pipeline_names():
        _add(registry, name + suffix, partial(_build_pipeline, name, _START_METHODS[suffix]), description)
    for suffix, start_method in _START_METHODS.items():
        _add(registry, AUTO + suffix, partial(_build_auto, start_method), CLASSES["AutoStrategy"])
    for name, description in CLASSES.items():
        # A command line that gives a class and nothing more hands its name to the Trainer, which knows small letters.
        for place in ("", "lightning_decentral.", "lightning_decentral.strategies."):
            _add(registry, f"{place}{name}".lower(), partial(_make, name), description)


def _names() -> list[tuple[str, str, str]]:
    from lightning_decentral.methods import METHODS

    return [(method.name, suffix, method.description) for method in METHODS.values() for suffix in _START_METHODS]


def _pipeline_names() -> list[tuple[str, str, str]]:
    from lightning_decentral.methods import PIPELINES

    return [(each.name, suffix, each.description) for each in PIPELINES.values() for suffix in _START_METHODS]


def _add(registry: Any, name: str, factory: Callable[[], Any], description: str) -> None:
    if name not in registry:
        registry.register(name, factory, description=description)


def _register_with_trainer(module: ModuleType) -> None:
    register(module.StrategyRegistry)


def _register_with_fabric(module: ModuleType) -> None:
    for name, suffix, description in _names():
        _add(
            module.STRATEGY_REGISTRY,
            name + suffix,
            partial(_build_for_fabric, name, _START_METHODS[suffix]),
            description,
        )


def _register_with_lightning_fabric(module: ModuleType) -> None:
    for name, suffix, description in _names():
        refusal = (
            f"Fabric of the package lightning_fabric got strategy={name + suffix!r}, a method of lightning_decentral, "
            "which is made for the package lightning: the two share no classes. Write `import lightning as L` and "
            "L.Fabric in the place of lightning_fabric."
        )
        _add(module.STRATEGY_REGISTRY, name + suffix, partial(_refuse, refusal), description)


def _register_with_pytorch_lightning(module: ModuleType) -> None:
    for name, suffix, description in _names():
        refusal = (
            f"The Trainer of the package pytorch_lightning got strategy={name + suffix!r}, a method of "
            "lightning_decentral, which is made for the package lightning: the two share no classes. Write "
            "`import lightning as L` and L.Trainer, L.LightningModule in the place of pytorch_lightning."
        )
        _add(module.StrategyRegistry, name + suffix, partial(_refuse, refusal), description)


def _import_classes(module: ModuleType) -> None:
    """Let LightningCLI find our classes by their short names. Whatever goes wrong is not to stop a CLI without them."""
    try:
        for room in ("strategies", "callbacks", "loggers"):
            importlib.import_module(f"lightning_decentral.{room}")
    except Exception as error:
        warnings.warn(f"lightning_decentral could not give its classes to LightningCLI: {error!r}", stacklevel=2)


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "lightning.pytorch.strategies": _register_with_trainer,
    "pytorch_lightning.strategies": _register_with_pytorch_lightning,
    "lightning.fabric.strategies": _register_with_fabric,
    "lightning_fabric.strategies": _register_with_lightning_fabric,
    "lightning.pytorch.cli": _import_classes,
}


def _refuse(message: str) -> Any:
    from lightning_decentral.errors import ConfigurationError

    raise ConfigurationError(message)


def _make(name: str) -> Any:
    from lightning_decentral import strategies

    return getattr(strategies, name)()


def _build(name: str, start_method: str) -> Any:
    from lightning_decentral import strategies
    from lightning_decentral.methods import METHODS

    return strategies.Strategy(METHODS[name].load()(), start_method=start_method)  # type: ignore[arg-type]


def _build_pipeline(name: str, start_method: str) -> Any:
    from lightning_decentral import strategies

    return strategies.PipelineStrategy(name, start_method=start_method)  # type: ignore[arg-type]


def _build_auto(start_method: str) -> Any:
    from lightning_decentral import strategies

    return strategies.AutoStrategy(start_method=start_method)


def _build_for_fabric(name: str, start_method: str) -> Any:
    from lightning_decentral import strategies
    from lightning_decentral.methods import METHODS

    return strategies.FabricStrategy(METHODS[name].load()(), start_method=start_method)  # type: ignore[arg-type]


def _find_moved(fullname: str) -> importlib.machinery.ModuleSpec | None:
    if fullname == "lightning_decentral.moved":
        return None
    from lightning_decentral import moved

    return moved.find_spec(fullname)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds some modules of Lightning as always, and does what is to be done once they have been executed."""

    def __init__(self) -> None:
        self.waiting: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return _find_moved(fullname) if fullname.startswith("lightning_decentral.") else None
        self.waiting.discard(fullname)  # the others find it now
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _ACTIONS[fullname])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, action: Callable[[ModuleType], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action(module)

    def __getattr__(self, name: str) -> Any:  # get_source, is_package, ...: whatever the wrapped loader can do
        return getattr(self._loader, name)
