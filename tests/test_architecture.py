"""Proved here: the layers of the package hold. Imports are read from the source, also those inside functions and under
``TYPE_CHECKING``; nothing is executed. The checker itself is shown to find each kind of violation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "lightning_decentral"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the bottom to the top: a module may import from its own layer and those below.
LAYERS = (
    {"errors"},
    {"conduct", "flat", "protocol", "tensors", "units", "worker"},
    {"compression", "topology"},
    {"averaging"},
    {"algorithms"},
    {"engine", "gradient_compression", "planning", "simulation", "transport"},
    {"callbacks", "loggers", "registry", "strategies"},
    {"commands", "lab", "recipes"},
    {"__init__", "__main__"},
)
ONLY_TORCH = {"normalization", "optimizers"}  # beside the layers: they import torch and our errors
MAY_IMPORT_ONLY_TORCH = {"callbacks", "lab", "recipes"}  # what fits them into Lightning, and examples
MAY_IMPORT_LIGHTNING = {
    *("callbacks", "commands", "lab", "loggers", "recipes", "strategies"),
}
# A module that fits an optimizer without gradients into Lightning: the room itself does not import it.
LIGHTNING_MODULES = {"optimizers.zeroth_order_module"}
MAY_IMPORT_DISTRIBUTED = {
    *("gradient_compression.checkpoint", "gradient_compression.collectives", "gradient_compression.hook"),
    *("transport.collectives", "transport.connections", "transport.exchanges"),
    *("transport.edges", "transport.liveness", "transport.ragged", "transport.rejoining"),
    # Those who race: torch's own methods and other packages, which are not ours to build on the transport.
    *(f"lab.bench.contenders.{module}" for module in ("hivemind", "loop", "plain", "torchft")),
    "lab.bench.worker",  # where the workers meet, whatever they race with
}
MAY_IMPORT_WANDB = {"loggers"}
PEERS = {"decent_dp", "hivemind", "torchft"}  # other packages that race: each imported by its own adapter alone
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


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
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", id(node) in inside


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(module: str, source: str) -> list[str]:
    """What a module does against the normalization.

    Args:
        module: its name in our package, as ``simulation.simulator``; ``topology/__init__.py`` goes by ``topology``.
        source: its text.
    """
    top = module.split(".")[0]
    if top not in LEVEL and top not in ONLY_TORCH:
        return [f"{module} is in no layer: add it to LAYERS"]
    found = []
    for name, in_function in imports(ast.parse(source), module):
        if starts_with(name, PACKAGE):
            part = name.split(".")[1] if "." in name else "__init__"
            if part == "__version__":
                continue
            if part not in LEVEL and part not in ONLY_TORCH:
                part = "strategies"  # a class that the package itself hands out: GossipStrategy, ...
            if top in ONLY_TORCH:
                if part not in ("errors", top) and module not in LIGHTNING_MODULES:
                    found.append(f"{module} imports {name}, but may import only torch")
            elif part in ONLY_TORCH and top in MAY_IMPORT_ONLY_TORCH:
                continue
            elif part in ONLY_TORCH:
                found.append(f"{module} imports {name}, which stands for itself")
            elif part in LEVEL and LEVEL[part] > LEVEL[top]:
                found.append(f"{module} imports {name}, which is in a layer above")
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
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1]), path


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_the_layers_hold(module: str, path: Path) -> None:
    assert violations(module, path.read_text(encoding="utf-8")) == []


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
        ("recipes.text", "from lightning_decentral import GossipStrategy, Cluster\nimport lightning_utilities"),
        ("simulation.simulator", "import lightning_utilities\nimport torchvision.distributed"),
        ("lab.bench.contenders.torchft", "import torch.distributed\nfrom torchft.manager import Manager"),
        ("lab.bench.task", "def read():\n    from lightning_decentral.recipes.image_data import EmbeddedImages"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
