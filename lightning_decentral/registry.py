"""The names for `Trainer(strategy=...)`, registered with Lightning as soon as both packages are imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

NAMES = {
    "sync_sgd": "Synchronous data-parallel SGD through the engine of lightning_decentral",
    "dpsgd": "D-PSGD: gossip with the neighbours while the gradient is computed",
    "d2": "D2: gossip that is exact on data that differs between workers",
    "choco_sgd": "CHOCO-SGD: D-PSGD with compressed differences, whose error vanishes as the workers agree",
    "moniqua_sgd": "Moniqua: D-PSGD with modulo-quantized messages, without memory between steps",
    "saef": "SAEF: compressed updates with error feedback, gradients a step ahead of the error",
    "ef21": "EF21: compressed differences of gradients to what all workers know of them",
    "adpsgd": "AD-PSGD: asynchronous pairwise averaging, nobody waits for a slow worker",
}
"""Name -> description of every registered method."""

_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
_LIGHTNING_STRATEGIES = "lightning.pytorch.strategies"


def install() -> None:
    """Register now if Lightning is there already, or else when it is imported. Repeating it does no harm."""
    module = sys.modules.get(_LIGHTNING_STRATEGIES)
    registry = getattr(module, "StrategyRegistry", None)
    if registry is not None:
        register(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(registry: Any) -> None:
    """Add every name, with its ``_spawn``, ``_fork`` and ``_notebook`` forms, to a Lightning strategy registry."""
    for name, description in NAMES.items():
        for suffix, start_method in _START_METHODS.items():
            if name + suffix not in registry:
                registry.register(name + suffix, partial(_build, name, start_method), description=description)


def _build(name: str, start_method: str) -> Any:
    from lightning_decentral import algorithms, strategies

    if name == "adpsgd":
        return strategies.AsyncStrategy(algorithms.ADPSGD(), start_method=start_method)  # type: ignore[arg-type]
    methods = {
        "sync_sgd": algorithms.SyncSGD,
        "dpsgd": algorithms.DPSGD,
        "d2": algorithms.D2,
        "choco_sgd": algorithms.ChocoSGD,
        "moniqua_sgd": algorithms.MoniquaSGD,
        "saef": algorithms.SAEF,
        "ef21": algorithms.EF21,
    }
    return strategies.GossipStrategy(methods[name](), start_method=start_method)  # type: ignore[arg-type]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `lightning.pytorch.strategies` as always, and registers the names once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _LIGHTNING_STRATEGIES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register(module.StrategyRegistry)

    def __getattr__(self, name: str) -> Any:  # get_source, is_package, ...: whatever the wrapped loader can do
        return getattr(self._loader, name)
