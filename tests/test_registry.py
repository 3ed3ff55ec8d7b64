"""Proved here: every strategy name works, in a script that never imports the package too, whichever of Lightning and
the package is imported first; it can be turned off; LightningCLI knows our classes by their short names; Fabric has the
same names; and `import torch` alone imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric import Fabric
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy, StrategyRegistry

import lightning_decentral
from lightning_decentral import AsyncStrategy, FabricStrategy, GossipStrategy, SimulatedStrategy, algorithms
from lightning_decentral.methods import METHODS
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.registry import install

START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


FRESH = """
import os, sys
import torch
print(*sorted(name for name in sys.modules if "lightning" in name and "editable" not in name))
import jsonargparse, torchmetrics, torch._dynamo  # most of what an import of Lightning takes
assert "lightning" not in sys.modules
for script in sys.argv[1:]:
    print("---", flush=True)
    if os.fork() == 0:
        exec(script, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, script
"""


def run(*scripts: str, autoload: str) -> list[list[str]]:
    """Run scripts away from this repository, each in a fork of a fresh interpreter in which nothing has imported
    Lightning; return the lines that each prints, and before them the modules that `import torch` alone imports."""
    process = subprocess.run(
        [sys.executable, "-c", FRESH, *scripts],
        env={**os.environ, "LIGHTNING_DECENTRAL_AUTOLOAD": autoload},
        cwd=Path(sys.executable).parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return [part.splitlines() for part in process.stdout.split("---\n")]


@pytest.mark.parametrize("name", METHODS)
def test_every_name_gives_its_strategy(name: str) -> None:
    cls = METHODS[name].load()
    for suffix, start_method in START_METHODS.items():
        strategy = Trainer(strategy=name + suffix, accelerator="cpu", devices=4, logger=False).strategy
        assert isinstance(strategy, AsyncStrategy if METHODS[name].asynchronous else GossipStrategy)
        assert isinstance(strategy.algorithm, cls)
        assert strategy.algorithm == cls().on_hosts(4).resolved(4)
        assert strategy._start_method == start_method


def test_names_are_all_of_these() -> None:
    assert {method.class_name for method in METHODS.values()} == set(algorithms.__all__)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.asynchronous == issubclass(method.load(), AbstractAsynchronousAlgorithm)
        assert not method.paper or method.paper.rpartition(" ")[2] in (method.load().__doc__ or "")  # its arXiv number
    ours = {name for name in StrategyRegistry.available_strategies() if name.split("_fork")[0] in METHODS}
    assert {name + "_fork" for name in METHODS} <= ours


def test_each_trainer_gets_a_strategy_of_its_own() -> None:
    first, second = (Trainer(strategy="dpsgd", accelerator="cpu", devices=2, logger=False) for _ in range(2))
    assert first.strategy is not second.strategy


def test_names_are_found_in_any_case() -> None:
    assert isinstance(Trainer(strategy="ADPSGD", accelerator="cpu", devices=2, logger=False).strategy, AsyncStrategy)


def test_names_have_descriptions() -> None:
    for name, method in METHODS.items():
        assert StrategyRegistry[name]["description"] == method.description


def test_installing_again_does_no_harm() -> None:
    before = list(StrategyRegistry.available_strategies())
    install()
    install()
    assert list(StrategyRegistry.available_strategies()) == before


@pytest.mark.parametrize("kind", [GossipStrategy, AsyncStrategy, SimulatedStrategy])
@pytest.mark.parametrize("place", ["", "lightning_decentral.", "lightning_decentral.strategies."])
def test_a_class_is_found_by_its_name(kind: type[Strategy], place: str) -> None:
    """What a command line hands to the Trainer that gives the class and none of its options."""
    strategy = Trainer(strategy=place + kind.__name__, accelerator="cpu", logger=False).strategy
    assert type(strategy) is kind


def test_fabric_has_every_name() -> None:
    for name, method in METHODS.items():
        if getattr(method.load(), "updates_in_answers", False) or method.load().shares_model:
            continue  # refused, as in test_fabric
        for suffix, start_method in START_METHODS.items():
            strategy = Fabric(strategy=name + suffix, accelerator="cpu", devices=4).strategy
            assert isinstance(strategy, FabricStrategy)
            assert strategy.algorithm == method.load()().on_hosts(4).resolved(4)
            assert strategy._start_method == start_method


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="adpsdg"):
        Trainer(strategy="adpsdg", accelerator="cpu")


MAKE = 'lightning.Trainer(strategy="adpsgd", accelerator="cpu", devices=2, logger=False).strategy'
ASYNCHRONOUS = "<class 'lightning_decentral.strategies.asynchronous.AsyncStrategy'>"
COMMAND_LINE = """
import sys
from lightning.pytorch.cli import LightningCLI
if {package_is_imported}:
    import lightning_decentral
from lightning.pytorch.demos.boring_classes import BoringModel
for options in (
    ["--trainer", {file!r}],
    ["--trainer.strategy=GossipStrategy"],
    ["--trainer.strategy=AsyncStrategy", "--trainer.strategy.seed=3"],
    ["--trainer.strategy=SimulatedStrategy", "--trainer.strategy.workers=3", "--trainer.callbacks+=Staleness"],
):
    trainer = LightningCLI(
        BoringModel, run=False, save_config_callback=None,
        args=[*options, "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false"],
    ).trainer
    strategy = trainer.strategy
    ours = [type(each).__name__ for each in trainer.callbacks if "decentral" in type(each).__module__]
    print(type(strategy).__name__, type(strategy.algorithm).__name__, strategy.seed, *ours)
"""
MADE_BY_IT = [
    "GossipStrategy D2 0 ConsensusDistance Communication",
    "GossipStrategy DPSGD 0",
    "AsyncStrategy ADPSGD 3",
    "SimulatedStrategy ADPSGD 0 Staleness",
]


@pytest.fixture
def command_line(tmp_path: Path) -> str:
    """A script in whose YAML and options strategies, methods and callbacks have short names."""
    file = tmp_path / "short.yaml"
    file.write_text(
        "strategy: {class_path: GossipStrategy, init_args: {algorithm: {class_path: D2}}}\n"
        "callbacks: [{class_path: ConsensusDistance}, {class_path: Communication}]\n"
    )
    return COMMAND_LINE.replace("{file!r}", repr(str(file)))


def test_a_script_needs_no_import(command_line: str) -> None:
    """The hook leaves Lightning as it is, tells users of its other distribution what to use, and brings to `import
    torch` neither Lightning nor the strategies: only the package itself, its registry and the autoload module."""
    script = f"""
import inspect, sys
import lightning
print(type({MAKE}))
module = sys.modules["lightning.pytorch.strategies"]
print([sorted(f.waiting) for f in sys.meta_path if "decentral" in type(f).__module__])
print("DDPStrategy" in inspect.getsource(module), module.__spec__.name, module.__file__.endswith("__init__.py"))
"""
    other_distribution = """
import lightning_fabric, pytorch_lightning
for make in (lightning_fabric.Fabric, pytorch_lightning.Trainer):
    try:
        make(strategy="dpsgd", accelerator="cpu", devices=2)
    except Exception as error:
        print(type(error).__name__, "import lightning as L" in str(error))
"""
    command_line = command_line.replace("{package_is_imported}", "False")
    with_torch, made, told, by_it = run(script, other_distribution, command_line, autoload="1")
    assert with_torch[0].split() == [
        "lightning_decentral",
        "lightning_decentral.registry",
        "lightning_decentral_autoload",
    ]
    waiting = ["lightning.pytorch.cli", "lightning_fabric.strategies", "pytorch_lightning.strategies"]
    assert made == [ASYNCHRONOUS, f"[{waiting}]", "True lightning.pytorch.strategies True"]
    assert told == ["ConfigurationError True", "ConfigurationError True"]
    assert by_it == MADE_BY_IT


def test_autoload_can_be_turned_off_and_the_package_imported_before_lightning_or_after(command_line: str) -> None:
    after = f"""
import lightning
try:
    {MAKE}
except ValueError as error:
    print("refused:", "adpsgd" in str(error))
import lightning_decentral
print(type({MAKE}))
"""
    before = f"import lightning_decentral, lightning\nprint(type({MAKE}))"
    command_line = command_line.replace("{package_is_imported}", "True")
    with_torch, made_after, made_before, by_it = run(after, before, command_line, autoload="0")
    assert with_torch == ["lightning_decentral_autoload"]
    assert made_after == ["refused: True", ASYNCHRONOUS]
    assert made_before == [ASYNCHRONOUS]
    assert by_it == MADE_BY_IT


def test_the_package_gives_its_names_lazily() -> None:
    assert {"AsyncStrategy", "GossipStrategy", "SimulatedStrategy", "Cluster"} <= set(dir(lightning_decentral))
    for name in lightning_decentral.__all__:
        assert getattr(lightning_decentral, name) is not None
    with pytest.raises(AttributeError, match="GosipStrategy"):
        _ = lightning_decentral.GosipStrategy
