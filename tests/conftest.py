"""What all tests share: one thread per process (results do not depend on the machine), and `reference` importable.

Every test leaves the process as it found it: environment, signal handlers, Lightning's rank, no process group, and no
thread. Workers are forked from this process, so whatever a test left here would be there.

Several tests may run at the same time (``pytest -n 4``): ports are from `helpers.ports`, files lie in `tmp_path`. What
each tier of them may cost is in `helpers.budgets`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from helpers.budgets import Budgets, is_whole
from helpers.forks import launch_kept
from helpers.isolation import as_it_was
from helpers.names import refuse_places
from helpers.ports import free_port
from helpers.warm import warm_python
from helpers.workers import give_up_workers, kept_processes
from lightning.fabric.plugins.environments import lightning as lightning_environment
from lightning.fabric.utilities import registry
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.logger_connector import result

gc.disable()  # until all tests are collected: a tenth of what this takes
# Else each forked worker imports these, in each test; older releases of torch lack one.
for module in ("distributed.algorithms.ddp_comm_hooks", "profiler._cupti_monitor", "utils.serialization.config"):
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(f"torch.{module}")
lightning_environment.find_free_network_port = free_port  # where forked workers of a `Trainer` meet
# Each `Trainer` reads the metadata of all packages that are installed, for callbacks that they bring.
registry.entry_points = functools.cache(registry.entry_points)  # type: ignore[attr-defined]
# Each value that is logged is looked for in all that a metric has, to be moved to its device: a sixth of a small fit.
if not torch.cuda.is_available():
    result._ResultMetric.to = lambda metric, *_, **__: metric  # type: ignore[method-assign, assignment]
torch.set_num_threads(1)
# Lightning would otherwise give workers more threads again: a forked one hangs where its parent had a pool of them.
os.environ["OMP_NUM_THREADS"] = "1"
# Each connection to a store asks for the name of 127.0.0.1 as an IPv6 address. Where the answer is lost, the resolver
# asks again after 5 seconds; one is enough for tests.
os.environ.setdefault("RES_OPTIONS", "timeout:1")
# Who is woken does not interrupt who runs, here and in all that is started here. Workers that share a core otherwise
# interrupt each other within locks of gloo, whose thread then asks for the same event thousands of times.
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def pytest_configure(config: pytest.Config) -> None:
    """Add up what the tests cost."""
    config.pluginmanager.register(Budgets(is_whole(config)), "budgets")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let all processes give the tests the same names, and begin early with what is marked so."""
    refuse_places(items)
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


def pytest_collection_finish() -> None:
    """Let the collector of garbage, in workers that are forked too, leave alone what lives as long as this process.

    It is called less often than by default, which would be a twelfth of all time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Undo what launchers and trainers leave in this process, and refuse threads that outlive their run."""
    with as_it_was():
        yield
        for process in (
            set(multiprocessing.active_children()) - kept_processes()
        ):  # of a test that failed by its time-out
            process.kill()
            process.join(10.0)


@pytest.fixture
def kept_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainers that fork their workers use those that are kept: see `helpers.forks`."""
    monkeypatch.setattr(_MultiProcessingLauncher, "launch", launch_kept)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python that needs no seconds to start: see `helpers.warm`."""
    with warm_python(tmp_path_factory.mktemp("warm")) as python:
        yield python


@pytest.fixture(scope="session", autouse=True)
def no_worker_is_left() -> Iterator[None]:
    """End the workers that are kept for tests."""
    yield
    give_up_workers()
