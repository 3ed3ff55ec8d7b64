"""Proved here: the old path of every module that moved works, is the new module, and warns whoever imports it."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import pkgutil
import sys
import warnings

import pytest

from lightning_decentral.moved import MOVED, new_paths
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.traffic import Traffic

PACKAGE = "lightning_decentral"


def old_and_new() -> list[tuple[str, tuple[str, ...]]]:
    """The whole table, and what is below the folders in it."""
    found = []
    for old in MOVED:
        new = new_paths(f"{PACKAGE}.{old}")
        found.append((f"{PACKAGE}.{old}", new))
        folder = importlib.util.find_spec(new[0])
        assert folder is not None
        for below in pkgutil.iter_modules(folder.submodule_search_locations or []):
            found.append((f"{PACKAGE}.{old}.{below.name}", (f"{new[0]}.{below.name}",)))
    return found


@pytest.fixture(autouse=True)
def nothing_was_imported_by_an_old_path() -> None:
    for name in [name for name in sys.modules if name.startswith(PACKAGE) and new_paths(name)]:
        del sys.modules[name]
        folder, _, last = name.rpartition(".")
        if folder in sys.modules:
            vars(sys.modules[folder]).pop(last, None)


@pytest.mark.parametrize(("old", "new"), old_and_new(), ids=lambda value: value if isinstance(value, str) else "")
def test_an_old_path_is_the_new_one(old: str, new: tuple[str, ...]) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new[0]}"):
        module = importlib.import_module(old)
    for path in new:
        current = importlib.import_module(path)
        assert current is module or len(new) > 1 or old.endswith(".modules")  # a folder is a file now
        assert current.__name__ == path  # importing the old one has not renamed it
        assert all(getattr(module, name) is value for name, value in vars(current).items() if not name.startswith("__"))


def test_what_is_not_there_is_missed_by_its_name() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"transport\.nothing"):
        importlib.import_module(f"{PACKAGE}.transport.nothing")
    with (
        pytest.warns(DeprecationWarning, match="layers"),
        pytest.raises(ModuleNotFoundError, match=f"{PACKAGE}.normalization.nothing"),
    ):
        importlib.import_module(f"{PACKAGE}.layers.nothing")


def test_a_script_with_old_paths_works_and_is_told_where() -> None:
    script = """
import lightning_decentral.layers as layers
import lightning_decentral.transport.network
from lightning_decentral.layers import FullNorm2d
from lightning_decentral.modules import AbstractZerothOrderModule
from lightning_decentral.tracking.wandb import OfflineFirstWandbLogger
from lightning_decentral.transport import simulator
from lightning_decentral.transport.network import Cluster, Traffic
import lightning_decentral

assert layers.FullNorm2d is FullNorm2d is lightning_decentral.normalization.FullNorm2d
assert lightning_decentral.transport.network.Cluster is Cluster is lightning_decentral.Cluster
assert simulator.Simulator is lightning_decentral.Simulator
assert callable(lightning_decentral.plan)
assert FullNorm2d.__module__ == "lightning_decentral.normalization.full_norm"
"""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        exec(compile(script, "a script", "exec"), {"__name__": "__main__"})
    told = [(warning.lineno, str(warning.message)) for warning in said if warning.filename == "a script"]
    # Once for each of: layers, transport.network, modules, tracking, tracking.wandb, transport.simulator.
    assert len(told) == len(set(told)) == 6, told
    assert told[0] == (
        2,
        "lightning_decentral.layers is now lightning_decentral.normalization: "
        "import from there, the old path goes with the next release.",
    )


@pytest.mark.parametrize("value", [Cluster(latency_seconds=0.5), Traffic(bytes_sent=3)], ids=["Cluster", "Traffic"])
def test_pickles_of_before_are_read(value: object) -> None:
    new, old = (f"c{module}\n".encode() for module in (type(value).__module__, f"{PACKAGE}.transport.network"))
    data = pickle.dumps(value, protocol=2)  # which names classes on lines of text
    assert new in data
    with pytest.warns(DeprecationWarning, match=r"transport\.network"):
        assert pickle.loads(data.replace(new, old)) == value
