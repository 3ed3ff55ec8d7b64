"""Proved here: the tests of a run are added up by tier, from all its processes; a whole run that takes half as much
again as it may fails and names the tier, and a run of some tests is never judged."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.budgets import BUDGETS, over_budget, tier_of

SUITE = """
import time
def work(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass
def test_a(): work(0.02)
def test_b(): work(0.02)
"""
CONFTEST = """
import sys
sys.path.insert(0, {tests!r})
from helpers import budgets
budgets.BUDGETS["lab"] = {budget}
def pytest_configure(config):
    config.pluginmanager.register(budgets.Budgets(whole=budgets.is_whole(config)), "budgets")
"""


def run(folder: Path, python: str, budget: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run two tests of the lab, of 0.02 s each, where its budget is another one."""
    (folder / "tests" / "bench").mkdir(parents=True)
    (folder / "tests" / "bench" / "test_it.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (folder / "tests" / "conftest.py").write_text(CONFTEST.format(tests=str(Path(__file__).parent), budget=budget))
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    # Without what a run of this very test, in a process of xdist's, has put there.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_whole_run_over_budget_fails_and_names_the_tier(processes: int, warm: str, tmp_path: Path) -> None:
    if processes and importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed: pip install -e '.[dev]'")
    several = ["-n", str(processes)] if processes else []
    done = run(tmp_path, sys.executable if processes else warm, 1e-6, *several)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "times its budget" in line]
    assert line.startswith("lab")


def test_a_whole_run_within_budget_passes(warm: str, tmp_path: Path) -> None:
    done = run(tmp_path, warm, 1e6)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processor time by tier" in done.stdout
    assert "times its budget" not in done.stdout


@pytest.mark.parametrize("arguments", [["tests/bench"], ["-k", "test_a"]], ids=" ".join)
def test_a_run_of_some_tests_is_not_judged(arguments: list[str], warm: str, tmp_path: Path) -> None:
    assert run(tmp_path, warm, 1e-6, *arguments).returncode == 0


def test_every_test_has_a_tier() -> None:
    assert tier_of("tests/strategies/test_async.py::test_x[a::b]") == "workers"
    assert tier_of("tests/test_docs.py::test_x") == "pages"
    assert tier_of("tests/test_flat.py::test_x") == "arithmetic"
    assert tier_of("tests/topology/test_sites.py::test_x") == "arithmetic"


def test_half_as_much_again_is_still_allowed() -> None:
    assert over_budget({"lab": 1.5 * BUDGETS["lab"], "pages": 1.51 * BUDGETS["pages"]}) == ["pages"]
