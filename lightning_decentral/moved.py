"""Where modules have gone: the old paths work for one release, with a warning that names the new one.

`registry` asks `find_spec` for modules of this package that nobody has imported yet. An old module *is* the new one, so
classes are the same, and pickles and configuration files that name an old path are read.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType

MOVED: dict[str, str | tuple[str, ...]] = {
    "bench": "lab.bench",
    "cli": "commands.main",
    "compare": "commands.compare",
    "emulation": "lab.emulation",
    "layers": "normalization",
    "lightning_cli": "commands.lightning_cli",
    "modules": "optimizers.zeroth_order_module",
    "modules.zeroth_order": "optimizers.zeroth_order_module",
    "tracking": "loggers",
    "transport.aggregation": tuple(f"gradient_compression.{file}" for file in ("scheme", "sizes", "groups")),
    "transport.cluster_file": "simulation.cluster_file",
    "transport.gradient_exchange": ("gradient_compression.hook", "gradient_compression.measuring"),
    "transport.network": ("simulation.cluster", "traffic"),
    "transport.planner": "planning.planner",
    "transport.process_group": (
        *("engine.stepper", "engine.monitor"),
        *("transport.communicator", "transport.collectives", "transport.connections"),
    ),
    "transport.simulator": "simulation.simulator",
    "transport.tensors": "tensors",
}
"""Old path -> new path, without the package's name; what is below an old path is below the new one.

Several new paths: each name of the old module is in one of them.

``plan`` is not here: `lightning_decentral.plan` is the planner's function now. The command is `commands.plan`.
"""


def new_paths(name: str) -> tuple[str, ...]:
    """Tell where a module of this package has gone, by its whole name; nowhere: it has not moved."""
    package, _, path = name.partition(".")
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        new = MOVED.get(".".join(parts[:length]), ())
        if new:
            heads = (new,) if isinstance(new, str) else new
            return tuple(".".join([package, head, *parts[length:]]) for head in heads)
    return ()


def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Tell how to import a module by its old path; ``None`` for any other module."""
    new = new_paths(name)
    return importlib.machinery.ModuleSpec(name, _Loader(new)) if new else None


class _Loader(importlib.abc.Loader):
    def __init__(self, new: tuple[str, ...]) -> None:
        self._new = new

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        # Of the stack, the frames of the import system are left out: the warning is about whoever imports.
        warnings.warn(
            f"{old} is now {' and '.join(self._new)}: import from there, the old path goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        modules = [importlib.import_module(each) for each in self._new]
        was_a_folder = any(f"{__package__}.{path}".startswith(f"{old}.") for path in MOVED)
        if len(modules) == 1 and not was_a_folder:
            sys.modules[old] = modules[0]
            return
        if was_a_folder:  # of which each file has gone somewhere
            module.__path__ = []
        for each in reversed(modules):
            vars(module).update({name: value for name, value in vars(each).items() if not name.startswith("__")})
