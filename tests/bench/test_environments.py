"""Proved here: an overlay environment has its own packages and our torch, is made once, and says in one line why it
cannot be made. Nothing is downloaded: the package is a wheel written here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_decentral.lab.bench.contenders import CONTENDERS, Contender
from lightning_decentral.lab.bench.environments import NotInstallable, folder_of, python_for


@pytest.fixture
def needy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contender:
    """A contender that needs a small package, which needs torch."""
    monkeypatch.setenv("LIGHTNING_DECENTRAL_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "bench_needed-1.0-py3-none-any.whl"
    info = "bench_needed-1.0.dist-info"
    files = {
        "bench_needed.py": "answer = 42\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: bench-needed\nVersion: 1.0\nRequires-Dist: torch>=2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return Contender("needy", "in need", "plain", {"method": "none"}, None, "needy", (str(wheel),))


def test_torch_alone_needs_no_environment() -> None:
    assert python_for(CONTENDERS["ddp"]) == sys.executable


def test_an_overlay_has_the_package_and_our_torch_and_is_made_once(needy: Contender) -> None:
    with pytest.raises(NotInstallable, match=r"needy got no environment with .* Allow the installation"):
        python_for(needy)
    python = python_for(needy, install=True)
    assert Path(python).is_relative_to(folder_of(needy))
    answer = subprocess.run(
        [
            python,
            "-c",
            "import bench_needed, importlib.util as u; print(bench_needed.answer, u.find_spec('torch').origin)",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert answer.stdout.split() == ["42", torch.__file__]
    Path(needy.packages[0]).unlink()  # nothing could be installed again
    assert python_for(needy, install=True) == python_for(needy) == python


def test_the_reason_is_one_line(needy: Contender) -> None:
    missing = dataclasses.replace(needy, packages=(str(folder_of(needy) / "missing-1.0-py3-none-any.whl"),))
    with pytest.raises(NotInstallable, match=r"needy could not be installed: ERROR: .*missing-1\.0") as caught:
        python_for(missing, install=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not folder_of(missing).exists()
