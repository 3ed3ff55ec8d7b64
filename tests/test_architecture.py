"""Proved here: the layers of the package hold. Imports are read from the source, also those inside functions and under
``TYPE_CHECKING``; nothing is executed. The checker itself is shown to find each kind of violation."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "lightning_decentral"
ROOT = Path(__file__).parents[1] / PACKAGE

# What a room may import, beside itself: docs/design.md draws it. A room is a folder or a module of the package.
CORE = {"conduct", "errors", "flat", "protocol", "tensors", "traffic", "worker"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "methods": {"protocol"},  # the table; of the standard library, and the type of what it loads
    "moved": set(),
    "traffic": set(),
    "units": {"errors"},
    "membership": {"errors"},
    "agreement": {"errors", "membership"},
    "conduct": CORE,
    "flat": CORE,
    "protocol": CORE,
    "tensors": CORE,
    "worker": CORE,
    "compression": CORE,
    "topology": CORE,
    "averaging": {*CORE, "compression", "topology"},
    "federated": CORE,
    "algorithms": {*CORE, "averaging", "compression", "federated", "topology"},
    "pipeline": {"errors"},
    # Nobody of these knows a method: what they have to know of it, it says.
    "transport": {*CORE, "agreement", "membership"},
    "engine": {*CORE, "transport"},
    "simulation": {*CORE, "agreement", "membership", "units"},
    "gradient_compression": {*CORE, "compression", "simulation", "transport"},
    "planning": {*CORE, "gradient_compression", "methods", "pipeline", "simulation", "topology"},
}
_BELOW_STRATEGIES = {*ROOMS} - {"methods", "moved", "planning", "units"}
ROOMS |= {
    "strategies": {*_BELOW_STRATEGIES, "planning"},  # which chooses a method, for whoever asks for none
    "callbacks": {*_BELOW_STRATEGIES, "normalization", "optimizers", "plots", "strategies"},
    "primal_dual": {"algorithms", "errors", "strategies"},  # what trains itself: its steps need no gradients
    # They stand for themselves: torch, and our errors.
    "normalization": {"errors"},
    "optimizers": {"errors"},
    "loggers": {"errors"},
    "plots": {"errors"},
    "recipes": {
        "callbacks",
        "compression",
        "errors",
        "federated",
        "loggers",
        "normalization",
        "optimizers",
        "primal_dual",
    },
    "registry": {"errors", "methods", "moved", "strategies"},  # inside functions: it runs when torch is imported
}
ROOMS["commands"] = {*ROOMS} - {"moved", "registry"}  # those of the lab are reached by their names, in a table
ROOMS["lab"] = {*ROOMS} - {"moved", "registry"}  # which nobody imports
ROOMS["__main__"] = {"commands"}
ROOMS["__init__"] = {*ROOMS} - {"lab"}
HANDED_OUT = {"algorithms", "flat", "simulation", "strategies", "topology"}  # where the package's own names come from
STANDARD_LIBRARY = {"__init__", "methods", "moved", "registry"}

MAY_IMPORT_LIGHTNING = {"callbacks", "commands", "lab", "loggers", "primal_dual", "recipes", "strategies"}
# A module that fits optimizers without gradients into Lightning: its room does not import it.
LIGHTNING_MODULES = {"optimizers.zeroth_order_module": {"optimizers", "strategies", "errors", "traffic"}}
MAY_IMPORT_DISTRIBUTED = {
    *("gradient_compression.checkpoint", "gradient_compression.collectives", "gradient_compression.hook"),
    *("transport.collectives", "transport.connections", "transport.exchanges", "transport.gathering"),
    *("transport.copies", "transport.living", "transport.membership", "transport.open_edges", "transport.rendezvous"),
    *("transport.edges", "transport.liveness", "transport.pipes", "transport.probing", "transport.ragged"),
    *("transport.jobs", "transport.lagging", "transport.rejoining"),
    "pipeline.tracing",  # torch's tracer lies there; it sends nothing
    # Those who race: torch's own methods and other packages, which are not ours to build on the transport.
    *(f"lab.bench.contenders.{module}" for module in ("hivemind", "loop", "plain", "torchft")),
    "lab.bench.worker",  # where the workers meet, whatever they race with
}
MAY_IMPORT_WANDB = {"loggers"}
PEERS = {"decent_dp", "hivemind", "torchft"}  # other packages that race: each imported by its own adapter alone


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, bool]]:
    """Every dotted name that is imported, and whether that happens inside a function."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = [PACKAGE, *module.split(".")]
                base = ".".join([*parts[: -node.level], *filter(None, [base])])
            for alias in node.names:
                yield f"{base}.{alias.name}", id(node) in inside
        elif isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node.value) == "torch":
            yield "torch.distributed", id(node) in inside


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room_of(name: str) -> str:
    """The room of ours that a dotted name leads to."""
    part = name.split(".")[1] if "." in name else "__init__"
    return part if part in ROOMS else "__init__"  # a name that the package itself hands out: GossipStrategy, DPSGD, ...


def violations(module: str, source: str) -> list[str]:
    """What a module does against the layers.

    Args:
        module: its name in our package, as ``simulation.simulator``; ``topology/__init__.py`` goes by ``topology``.
        source: its text.
    """
    top = module.split(".")[0]
    if top not in ROOMS:
        return [f"{module} is in no room: add it to ROOMS"]
    allowed = LIGHTNING_MODULES.get(module, ROOMS[top])
    found = []
    for name, in_function in imports(ast.parse(source), module):
        if starts_with(name, PACKAGE) and name != f"{PACKAGE}.__version__":
            room = room_of(name)
            if room == "__init__":  # whoever may import what it hands out
                room = top if allowed >= HANDED_OUT else "__init__"
            if room != top and room not in allowed:
                found.append(f"{module} imports {name}: {top} may import only {sorted(allowed)}")
            elif top == "registry" and room != top and not in_function:
                found.append(f"{module} imports {name} outside a function: whoever imports torch would wait for it")
        if (starts_with(name, "lightning") or starts_with(name, "pytorch_lightning")) and not (
            top in MAY_IMPORT_LIGHTNING or module in LIGHTNING_MODULES
        ):
            found.append(f"{module} imports {name}: only {sorted(MAY_IMPORT_LIGHTNING)} may")
        if starts_with(name, "torch.distributed") and module not in MAY_IMPORT_DISTRIBUTED:
            found.append(f"{module} imports {name}: only {sorted(MAY_IMPORT_DISTRIBUTED)} may")
        if starts_with(name, "wandb") and not (top in MAY_IMPORT_WANDB and in_function):
            found.append(f"{module} imports {name}: only loggers may, inside functions")
        if (peer := name.split(".")[0]) in PEERS and module != f"lab.bench.contenders.{peer}":
            found.append(f"{module} imports {name}: only lab.bench.contenders.{peer} may")
        if (
            top in STANDARD_LIBRARY
            and not starts_with(name, PACKAGE)
            and name.split(".")[0] not in sys.stdlib_module_names
        ):
            found.append(f"{module} imports {name}: it is imported with torch, and may need the standard library only")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1]), path


def test_the_layers_hold() -> None:
    found = {module: violations(module, path.read_text(encoding="utf-8")) for module, path in modules()}
    assert {module: broken for module, broken in found.items() if broken} == {}


def test_no_room_is_above_itself() -> None:
    """The picture has no circle, but of modules of the core, which have an order of their own."""
    seen: dict[str, int] = {}

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"a circle: {' -> '.join((*path, room))}"
        if seen.setdefault(room, 0) == 0:
            for below in ROOMS[room] - {room}:
                if not {room, below} <= CORE:
                    visit(below, (*path, room))
            seen[room] = 1

    for room in ROOMS:
        visit(room, ())


def test_no_imports_make_a_circle() -> None:
    """Not those inside functions either; what is only for types does not count."""
    known = dict(modules())
    arrows: dict[str, set[str]] = {}
    for module, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                node.body = []
        package = path.name == "__init__.py"
        names = (name.removeprefix(f"{PACKAGE}.") for name, _ in imports(tree, module) if starts_with(name, PACKAGE))
        targets = {name if name in known else name.rpartition(".")[0] for name in names}
        arrows[module] = {target for target in targets if target in known and target not in (module, "__init__")}
        if package:  # a folder's own file gathers what is in it
            arrows[module] = {target for target in arrows[module] if not starts_with(target, module)}
    state: dict[str, bool] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module, True), f"a circle: {' -> '.join((*path, module))}"
        if module not in state:
            state[module] = False
            for target in sorted(arrows[module]):
                visit(target, (*path, module))
            state[module] = True

    for module in known:
        visit(module, ())


def test_all_modules_are_read() -> None:
    names = {module for module, _ in modules()}
    assert {"flat", "topology", "topology.base", "algorithms.dpsgd", "simulation.simulator", "__init__"} <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flat", "from lightning_decentral.topology import Ring"),
        ("topology.base", "import lightning_decentral.averaging.gossip"),
        ("averaging", "from lightning_decentral import algorithms"),
        ("algorithms.dpsgd", "from lightning_decentral.simulation.simulator import Simulator"),
        ("algorithms.dpsgd", "async def step():\n    from lightning_decentral.simulation import cluster"),
        ("algorithms.dpsgd", "if TYPE_CHECKING:\n    from lightning_decentral.strategies import GossipStrategy"),
        ("algorithms.dpsgd", "from ..simulation import cluster"),
        ("simulation.simulator", "from lightning_decentral import GossipStrategy"),
        ("strategies.gossip", "from lightning_decentral.recipes import images"),
        ("errors", "from lightning_decentral.flat import Vector"),
        ("simulation.simulator", "import lightning.pytorch as pl"),
        ("algorithms.dpsgd", "from lightning import Trainer"),
        ("topology.base", "def main():\n    import pytorch_lightning"),
        ("strategies.gossip", "import torch.distributed as dist"),
        ("strategies.gossip", "from torch import distributed"),
        ("callbacks.consensus", "from torch.distributed import all_reduce"),
        ("simulation.simulator", "import torch\ntorch.distributed.barrier()"),
        ("loggers.wandb", "import wandb"),
        ("strategies.base", "def log():\n    import wandb"),
        ("optimizers.clars", "from lightning_decentral.flat import Vector"),
        ("algorithms.dpsgd", "from lightning_decentral.optimizers import CLARS"),
        ("strategies.gossip", "from lightning_decentral.normalization import FullNorm2d"),
        ("normalization.full_norm", "from lightning_decentral.callbacks import NormalizationSwap"),
        ("normalization.full_norm", "import torch.distributed"),
        ("recipes.images", "import torchft"),
        ("lab.bench.contenders.plain", "from hivemind import Optimizer"),
        ("lab.bench.task", "import torch.distributed"),
        ("strategies.gossip", "from lightning_decentral.lab.bench import task"),
        ("utils", "import math"),
        ("recipes.text", "from lightning_decentral import GossipStrategy"),
        ("algorithms.dpsgd", "from lightning_decentral.engine import stepper"),
        ("algorithms.dpsgd", "from lightning_decentral import Simulator"),
        ("simulation.simulator", "from lightning_decentral.algorithms import DPSGD"),
        ("planning.planner", "from lightning_decentral import ADPSGD"),
        ("planning.planner", "from lightning_decentral.engine.stepper import Stepper"),
        ("engine.stepper", "from lightning_decentral.simulation.cluster import Cluster"),
        ("transport.edges", "from lightning_decentral.engine import stepper"),
        ("commands.main", "from lightning_decentral.lab.bench import command"),
        ("strategies.gossip", "from lightning_decentral.registry import install"),
        ("registry", "from lightning_decentral.methods import METHODS"),
        ("methods", "import torch"),
    ],
)
def test_each_kind_of_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flat", "import torch\nfrom lightning_decentral.errors import ConfigurationError"),
        ("topology.base", "from lightning_decentral.topology import drawing\nfrom . import drawing"),
        ("averaging.gossip", "from lightning_decentral.topology import Ring\nfrom ..protocol import Call"),
        ("transport.exchanges", "import torch.distributed as dist\nimport torch\ntorch.distributed.barrier()"),
        ("callbacks.consensus", "from lightning_decentral.strategies import GossipStrategy\nimport lightning"),
        ("commands.main", "from lightning_decentral import __version__"),
        ("loggers.wandb", "def log():\n    import wandb"),
        ("optimizers.clars", "import torch\nfrom lightning_decentral.errors import ConfigurationError"),
        ("normalization.full_norm", "from lightning_decentral.normalization.base import AbstractNorm"),
        ("callbacks.normalization", "from lightning_decentral.normalization import FullNorm2d"),
        ("callbacks.swap", "from lightning_decentral.optimizers import RSGD\nimport lightning"),
        ("callbacks.pace", "from lightning_decentral import GossipStrategy, Cluster\nimport lightning_utilities"),
        ("simulation.simulator", "import lightning_utilities\nimport torchvision.distributed"),
        ("lab.bench.contenders.torchft", "import torch.distributed\nfrom torchft.manager import Manager"),
        ("lab.bench.task", "def read():\n    from lightning_decentral.recipes.image_data import EmbeddedImages"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
