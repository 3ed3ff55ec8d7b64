"""Everything a checkout needs, with Python and nothing else: ``python3 tasks.py demo`` or ``python3 tasks.py test``.

The first task creates the environment ``.venv`` from ``constraints.txt``; later ones use it.

    demo    ResNet-20 on embedded images: 4 AD-PSGD workers, one of them slowed 4 times, against DDP
    test    the tests, two at a time; the 25 slowest are printed
    lint    ruff: style and format
    types   mypy
    docs    build the documentation, strictly (a test does it, too)
    check   lint, types and test, as CI does
    lowest  the tests with the oldest versions that pyproject.toml admits, in an environment of its own, .venv-lowest
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
SOURCES = "lightning_decentral lightning_decentral_autoload.py tests benchmarks docs tasks.py"

DEMO = [
    "-m lightning_decentral compare --config recipes/images/base.yaml --strategies ddp,adpsgd --workers 4 --slow 3:4 "
    "--epochs 8 --output runs/demo"
]
LINT = [f"-m ruff check {SOURCES}", f"-m ruff format --check {SOURCES}"]
TYPES = ["-m mypy"]
DOCS = ["docs/generate.py --check", "-m mkdocs build --strict --quiet"]
TEST = ["-m pytest -n 2 --dist loadgroup --durations 25"]
TASKS = {
    "demo": DEMO,
    "test": TEST,
    "lint": LINT,
    "types": TYPES,
    "docs": DOCS,
    "check": LINT + TYPES + TEST,
    "lowest": TEST,
}


def install() -> None:
    """Create the environment, unless there is one for this very state of the project's requirements."""
    wanted = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        wanted.update((ROOT / name).read_bytes())
    stamp = VENV / "installed"
    if stamp.exists() and stamp.read_text() == wanted.hexdigest():
        return
    print("Creating the environment .venv (once; some minutes) ...", flush=True)
    venv.create(VENV, with_pip=True, clear=True)
    pip = "-m pip install --quiet --disable-pip-version-check --constraint constraints.txt"
    run(f"{pip} setuptools torch")  # torch by itself first: what follows must not choose another build of it
    run(f"{pip} --no-build-isolation --editable .[wandb,recipes,emulation,docs,dev]")
    stamp.write_text(wanted.hexdigest())


def run(arguments: str) -> None:
    """Run the environment's Python in the project's folder; end with its exit code if that is not 0."""
    finished = subprocess.run([str(PYTHON), *arguments.split()], cwd=ROOT, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def main() -> None:
    if sys.version_info < (3, 11) or sys.version_info >= (3, 14):
        sys.exit(f"Got Python {sys.version.split()[0]}, need 3.11 to 3.13: run this with another python3.")
    names = sys.argv[1:]
    unknown = [name for name in names if name not in TASKS]
    if not names or unknown:
        sys.exit((f"Unknown task {unknown[0]!r}.\n" if unknown else "") + (__doc__ or ""))
    install()
    for name in names:
        for command in TASKS[name]:
            run(command)


if __name__ == "__main__":
    main()
