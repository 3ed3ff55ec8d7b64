"""Proved here: a method is the files that CONTRIBUTING.md and docs/extending.md name, and no other. A fresh one is
added in a copy of the project; it trains by name, is planned, raced, listed and documented, and its contracts and pages
are checked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = "docs/methods/toy.md"
GENERATED = ("README.md", "docs/index.md", "docs/api/algorithms.md", "mkdocs.yml", PAGE)
METHOD = '''"""A toy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, LocalStep, Mixing
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class Toy(AbstractAlgorithm):
    r"""Local steps; after every few of them all workers take the mean of their models.

    Args:
        every: steps from one mean to the next.

    Example:
        >>> Toy()
        Toy(every=2)
    """

    every: int = 2

    def resolved(self, world_size: int) -> Toy:
        return self

    def init(self, worker: Worker) -> None:
        pass

    def period(self, world_size: int) -> int:
        return self.every

    def mixing(self, world_size: int) -> Mixing:
        return Mixing(1.0, self.every)

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        if (worker.step + 1) % self.every == 0:
            await AllReduce(worker.x)
'''
REFERENCE = """

def toy(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing) -> Iterator[Tensor]:
    for step in range(10**9):
        x = x - rate(step) * gradients(x)
        if step % 2:
            x = x.mean(0, keepdim=True).expand_as(x)
        yield x
"""
TEST = '''"""Proved here: the toy equals its reference."""

import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import simulate, states

from lightning_decentral.algorithms import Toy


def test_it_equals_its_reference() -> None:
    problem = Quadratic(4)
    steps = methods.toy(problem.start.clone(), problem.gradient, lambda step: 0.1, lambda step: torch.eye(4))
    for ours, theirs in zip(states(simulate(Toy(), problem), problem, 0.1, 6), steps):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-14)  # a few roundings of numbers near 1
'''
USE = """
import os
import sys
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_decentral
from lightning_decentral.commands.main import main
from lightning_decentral.lab.bench import worker
from lightning_decentral.lab.bench.contenders import CONTENDERS
from lightning_decentral.lab.bench.task import Task

assert Path(lightning_decentral.__file__).is_relative_to(Path.cwd())
sys.path += ["docs", "tests"]
import generate
from helpers.ports import free_port

assert generate.main(sys.argv[1:]) == 0


class Module(BoringModel):
    def on_train_end(self):
        assert self.global_step == 2


trainer = L.Trainer(
    strategy="toy_fork", accelerator="cpu", devices=2, max_steps=2, limit_val_batches=0, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
)
trainer.fit(Module())
assert type(trainer.strategy.algorithm) is lightning_decentral.Toy
print("trained")
network = ["--workers", "4", "--bandwidth", "1gbit", "--compute", "100ms"]
assert main(["plan", "--parameters", "1e6", "--methods", "ddp", "toy", *network]) == 0
assert CONTENDERS["toy"].title == "Toy"
checks = ["tests/test_docs.py", "tests/contract/test_algorithms.py", "tests/algorithms/test_toy.py"]
assert pytest.main(["-q", "-p", "no:cacheprovider", *checks, "-k", "toy or Toy or every_algorithm"]) == 0
os.environ |= worker.environment_of(0, 1, "127.0.0.1", free_port())
task = Task(steps=2, warm_up_steps=0, model_bytes=100_000, compute_seconds=0.001, batch_size=2)
assert worker.main(["--contender", "toy", "--task", task.to_json(), "--folder", "race"]) == 0
print("raced")
"""


def page() -> str:
    """Of the toy, by the headings and the table that pages have."""
    text = (ROOT / "docs/methods/sync_sgd.md").read_text(encoding="utf-8")
    text = re.sub(r"(?<=generated: sends sync_sgd -->\n).*?(?=<!-- end)", "", text, flags=re.DOTALL)
    return text.replace("sync_sgd", "toy")


def add(file: Path, before: str, text: str) -> None:
    """Insert text before the first place where another one stands; at the end, if it is empty."""
    old = file.read_text(encoding="utf-8")
    assert before in old
    at = old.index(before) if before else len(old)
    file.write_text(old[:at] + text + old[at:], encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with a method more."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("lightning_decentral", "docs", "tests"):
        shutil.copytree(ROOT / name, folder / name)  # with what is compiled of it, which takes seconds
    for name in ("lightning_decentral_autoload.py", "pyproject.toml", "README.md", "CONTRIBUTING.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, folder)
    pictures = shutil.ignore_patterns("*.png", "*.svg", "*.csv", "*.md")
    shutil.copytree(ROOT / "results", folder / "results", ignore=pictures)  # from which the README has a table
    before = contents(folder)
    package, tests = folder / "lightning_decentral", folder / "tests"
    (package / "algorithms/toy.py").write_text(METHOD)
    add(package / "algorithms/__init__.py", "\n__all__ = [", "from lightning_decentral.algorithms.toy import Toy\n")
    add(package / "algorithms/__init__.py", '    "SyncSGD",\n]', '    "Toy",\n')
    entry = 'Method("toy", "Toy", "Toy", "the mean of all models in every second step", family="Gossip"),\n        '
    add(package / "methods.py", 'Method(\n            "sync_sgd"', entry)
    (folder / PAGE).write_text(page())
    add(tests / "reference/methods.py", "", REFERENCE)
    (tests / "algorithms/test_toy.py").write_text(TEST)
    add(
        tests / "contract/test_algorithms.py",
        "    Line(SyncSGD()",
        "    Line(Toy(), 0.05, Complete(WORKERS), remains=1e-12),\n",
    )
    add(tests / "contract/test_algorithms.py", "from lightning_decentral.comp", "from lightning_decentral import Toy\n")
    after = contents(folder)
    changed = {path for path in after if after[path] != before.get(path)}
    named = (ROOT / "docs/extending.md").read_text(encoding="utf-8").partition("## Into the package")[2]
    seven = [
        path.replace("/x.", "/toy.").replace("test_x.", "test_toy.")
        for path in re.findall(r"^\d\. `(.+?)`", named, re.M)
    ]
    assert sorted(changed) == sorted(seven)
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(path.replace("toy", "x") in contributing for path in seven)
    return folder


@pytest.fixture(scope="module")
def said(copy: Path) -> str:
    """What a program prints that does all with the method: one process, as most of its time goes into imports."""
    (copy / "use.py").write_text(USE)
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "use.py", *GENERATED], cwd=copy, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_trains_by_name_is_planned_and_raced(said: str) -> None:
    assert "trained" in said
    assert re.search(r"^ *Toy +.*1\.\d+x", said, re.MULTILINE)  # of the plan: fewer bytes, and faster than DDP
    assert "raced" in said


@pytest.mark.usefixtures("said")
def test_it_is_listed_and_documented(copy: Path) -> None:
    assert "[Toy](docs/methods/toy.md)" in (copy / "README.md").read_text(encoding="utf-8")
    assert "the mean of all models in every second step" in (copy / "docs/index.md").read_text(encoding="utf-8")
    assert "      - Toy: methods/toy.md" in (copy / "mkdocs.yml").read_text(encoding="utf-8")
    assert "::: lightning_decentral.algorithms.Toy" in (copy / "docs/api/algorithms.md").read_text(encoding="utf-8")
    assert "| 8 | all | 0.875 |" in (copy / PAGE).read_text(encoding="utf-8")


def test_its_contracts_hold_and_nothing_is_missing(said: str) -> None:
    assert re.search(r"\b[1-9]\d passed", said)
