"""What the tests of each tier may cost, in seconds of processor time; a whole run that takes half as much again fails.

Processor time, of a test and the processes that it started and waited for, and not the clock's: other programs on the
machine do not change it much. It is divided by how much slower than the reference this machine is, as a loop that is
timed in every process says. A run of some of the tests is not judged.

A budget is what a tier took when it was last set, on two busy cores, rounded up. Raise it together with tests that are
worth it; look at the slowest ones first, since it is often one new test that starts Python four times.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.warm import warm_seconds
from helpers.workers import kept_seconds, processor_seconds

BUDGETS = {
    "arithmetic": 270,  # in this process: graphs, compressors, the simulator, the planner, layers, optimizers
    "workers": 400,  # forked workers that train or exchange
    "lab": 60,  # emulated hosts and races
    "programs": 60,  # command lines and recipes, in processes of their own
    "pages": 95,  # the site, its code and its tables; the tutorial on emulated hosts and on SLURM
}
EXCEEDED = 1.5  # times a budget
_TIERS = {
    **dict.fromkeys(
        ["strategies", "distributed", "engine", "transport", "gradient_compression", "callbacks", "words"], "workers"
    ),
    **dict.fromkeys(["bench", "emulation"], "lab"),
    **dict.fromkeys(
        ["recipes", "test_compare.py", "test_package.py", "test_plan_command.py", "test_recipes.py"], "programs"
    ),
    **dict.fromkeys(["test_docs.py", "test_tutorial.py"], "pages"),
}  # of a folder or a file; all others are arithmetic
_REFERENCE_SECONDS = 0.03  # that the loop took where the budgets were set
_USED = "reference seconds"


def tier_of(nodeid: str) -> str:
    """The tier of a test, by the folder or file below ``tests`` that its name begins with."""
    parts = Path(nodeid.partition("::")[0]).parts
    return _TIERS.get(parts[1] if len(parts) > 1 else "", "arithmetic")


def over_budget(seconds: dict[str, float]) -> list[str]:
    """The tiers that took more than half as much again as they may."""
    return [tier for tier, used in seconds.items() if used > EXCEEDED * BUDGETS[tier]]


class Budgets:
    """Adds up what the tests of each tier take; a plugin, of the processes that run tests and of the one that reports.

    Args:
        whole: whether all tests are run, so that the sums are judged.
    """

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._used: Counter[str] = Counter()
        self._slower = 1.0
        self._began = 0.0

    def pytest_collection_finish(self) -> None:
        """Learn how fast this machine is."""
        self._slower = min(_loop_seconds() for _ in range(5)) / _REFERENCE_SECONDS

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[Any]:
        """Note what has been used before a test."""
        self._began = _processor_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
        """Add to a test's last report what it has used."""
        if call.when == "teardown":
            item.user_properties.append((_USED, (_processor_seconds() - self._began) / self._slower))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add it up; also what comes from other processes."""
        if report.when == "teardown":
            self._used[tier_of(report.nodeid)] += sum(
                float(used) for key, used in report.user_properties if key == _USED
            )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a whole run that took too long."""
        if self._judged and over_budget(self._used) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table."""
        if not self._used:
            return
        terminalreporter.section("processor time by tier")
        for tier, budget in BUDGETS.items():
            line = f"{tier:12} {self._used[tier]:7.0f} s of {budget} s"
            if self._judged and tier in over_budget(self._used):
                line += f"   <- more than {EXCEEDED} times its budget: --durations names the slowest tests"
            terminalreporter.write_line(line)

    @property
    def _judged(self) -> bool:
        return self._whole and "PYTEST_XDIST_WORKER" not in os.environ


def _processor_seconds() -> float:
    return processor_seconds() + kept_seconds() + warm_seconds()


def _loop_seconds() -> float:
    began = time.process_time()
    sum(number * number for number in range(1_000_000))
    return time.process_time() - began


def is_whole(config: pytest.Config) -> bool:
    """Whether a run is of all tests: none was named, and none is left out."""
    options = config.option
    chosen = options.keyword or options.markexpr or options.deselect or options.ignore or options.ignore_glob
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen
