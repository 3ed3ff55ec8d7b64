"""Everything a checkout needs, with Python and nothing else: ``python3 tasks.py demo`` or ``python3 tasks.py test``.

The first task creates the environment ``.venv`` from ``constraints.txt``; later ones use it.

    demo    ResNet-8 on embedded images, 4 workers, one of them slowed 4 times: DDP, then AD-PSGD; 3 minutes on 2 cores
    test    the tests, two at a time for each core; the site and its tables are among them
    lint    ruff: style and format
    types   mypy
    docs    build the documentation, strictly
    check   lint, types and test, as CI does
    lowest  the tests with the oldest releases that pyproject.toml admits, in an environment of its own: .venv-lowest
    package a wheel and a source archive in dist/, checked by twine
    gpu     the tests that need a GPU and three short measurements on one; `gpu --dry-run` needs none, and is small

``python3 tasks.py lowest torch==2.13.0`` takes this release of a package in the place of the oldest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = "lightning_decentral lightning_decentral_autoload.py tests docs tasks.py setup.py"
USED = (
    "wandb",
    "recipes",
    "emulation",
    "linear",
)  # extras that the package imports; the others are tools

DEMO = [
    "-m lightning_decentral compare --config recipes/images/base.yaml --strategies ddp,adpsgd --workers 4 --slow 3:4 "
    "--epochs 6 --model.depth 8 --no-wandb --output runs/demo"
]
LINT = [f"-m ruff check {SOURCES}", f"-m ruff format --check {SOURCES}"]
TYPES = ["-m mypy"]
DOCS = ["docs/generate.py --check", "-m mkdocs build --strict --quiet"]
# Half of the time a test waits: for workers to meet, for time-outs. More than eight at a time need much memory.
TEST = [f"-m pytest -n {min(3 * (os.cpu_count() or 1), 8)} --dist worksteal --durations 25"]
GPU = ["-m lightning_decentral.lab.benchmarks.gpu"]
PACKAGE = ["-m build --no-isolation --outdir dist", "-m twine check --strict dist/*"]
TASKS = {
    "demo": DEMO,
    "test": TEST,
    "lint": LINT,
    "types": TYPES,
    "docs": DOCS,
    "check": LINT + TYPES + TEST,
    "lowest": TEST,
    "package": PACKAGE,
    "gpu": GPU,
}


def install(folder: Path, constraints: str) -> Path:
    """Create an environment, unless it is there for this very state of the requirements; returns its Python."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + constraints.encode()).hexdigest()
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    if folder.is_symlink():  # what follows would empty the environment that it leads to, under whoever works in it
        sys.exit(
            f"Got a link at {folder.name}, to {folder.resolve()}, need an environment of these requirements there. "
            "Remove the link, and one is made here; or run the task once where that environment belongs."
        )
    began = time.monotonic()
    print(f"Creating the environment {folder.name}, once; downloading takes minutes.", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    file = folder / "constraints.txt"
    file.write_text(constraints)
    pip = f"-m pip install --quiet --disable-pip-version-check --constraint {file.relative_to(ROOT)}"
    print("  1 of 2: PyTorch, with the libraries that it brings ...", flush=True)
    run(python, f"{pip} setuptools>=77 torch")  # torch by itself first: what follows must not choose another build
    print(f"  2 of 2: this package and its tools, after {time.monotonic() - began:.0f} s ...", flush=True)
    run(python, f"{pip} --no-build-isolation --editable .[{','.join(USED)},docs,dev]")
    stamp.write_text(wanted)
    print(f"  The environment is there, after {time.monotonic() - began:.0f} s.", flush=True)
    return python


def tools() -> Path:
    """Create an environment with what makes and checks packages, unless it is there; returns its Python."""
    folder = ROOT / ".venv-package"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        run(python, "-m pip install --quiet --disable-pip-version-check build twine setuptools>=77")
        (folder / "installed").touch()
    return python


def lowest(instead: Sequence[str] = ()) -> str:
    """Give the oldest release of all that the package imports, as constraints of pip; `instead` has other ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(each for extra in USED for each in extras[extra])]
    oldest = dict(re.sub(r"(\[.*\])?>=([\w.]+).*", r"==\2", each).split("==") for each in requirements)
    other = dict(each.split("==") for each in instead)
    if unknown := other.keys() - oldest.keys():
        sys.exit(f"Got {', '.join(sorted(unknown))}, need some of {', '.join(oldest)}. Correct the name.")
    return "".join(f"{name}=={release}\n" for name, release in (oldest | other).items())


def run(python: Path, arguments: str) -> None:
    """Run an environment's Python in the project's folder; end with its exit code if that is not 0."""
    # What is compiled is kept: each of the hundred processes that tests start would compile the package again.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    finished = subprocess.run([str(python), *arguments.split()], cwd=ROOT, env=environment, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def main() -> None:
    if sys.version_info < (3, 11) or sys.version_info >= (3, 14):
        sys.exit(f"Got Python {sys.version.split()[0]}, need 3.11 to 3.13: run this with another python3.")
    instead = [argument for argument in sys.argv[1:] if "==" in argument]
    dry_run = "--dry-run" in sys.argv[1:]
    names = [argument for argument in sys.argv[1:] if argument not in (*instead, "--dry-run")]
    unknown = [name for name in names if name not in TASKS]
    if not names or unknown:
        sys.exit((f"Unknown task {unknown[0]!r}.\n" if unknown else "") + (__doc__ or ""))
    for name in names:
        if name == "package":
            shutil.rmtree(ROOT / "dist", ignore_errors=True)
            python = tools()
            for command in PACKAGE:
                run(python, command)
            continue
        oldest = name == "lowest"
        constraints = lowest(instead) if oldest else (ROOT / "constraints.txt").read_text()
        if oldest and sys.version_info[:2] != (3, 11):
            print(f"This is Python {sys.version.split()[0]}: the oldest that is admitted is 3.11.", flush=True)
        python = install(ROOT / (".venv-lowest" if oldest else ".venv"), constraints)
        for command in TASKS[name]:
            run(python, command + " --dry-run" * (dry_run and name == "gpu"))


if __name__ == "__main__":
    main()
