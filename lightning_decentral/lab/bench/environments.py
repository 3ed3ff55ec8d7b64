"""Python environments of contenders that need more packages: torch is shared, the rest is theirs alone.

An *overlay* is a virtual environment that also sees the packages of the running one, behind its own. So torch is not
installed twice, and what a framework needs in another version than we do disturbs nobody.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench.contenders import Contender
from lightning_decentral.lab.bench.task import cache_folder

_INSTALL_SECONDS = 900
_STAMP = "lightning_decentral.json"


class NotInstallable(ConfigurationError):
    """A contender's packages are not there, or do not work beside this torch; the message says why in one line."""


def folder_of(contender: Contender) -> Path:
    """Tell where its environment is, or would be: in `cache_folder`."""
    return cache_folder() / (contender.environment or "")


def python_for(contender: Contender, install: bool = False) -> str:
    """Return the interpreter that can run a contender.

    Args:
        contender: whose packages are needed.
        install: whether to install them if they are not there: makes a virtual environment in `folder_of`, a few
            hundred megabytes at most, with pip.

    Returns:
        The running interpreter if the contender needs nothing else; else that of its environment.

    Raises:
        NotInstallable: if they are not there and ``install`` is false, or pip fails, or the framework cannot be
            imported beside this torch.

    Example:
        >>> import sys
        >>> from lightning_decentral.lab.bench.contenders import CONTENDERS
        >>> python_for(CONTENDERS["ddp"]) == sys.executable
        True
    """
    if contender.environment is None:
        return sys.executable
    folder = folder_of(contender)
    python = folder / "bin" / "python"
    # What the environment was made of: another torch, interpreter or list of packages means another environment.
    wanted = {"packages": list(contender.packages), "torch": torch.__version__, "parent": _site_packages()}
    stamp = folder / _STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == wanted and python.exists():
        return str(python)
    if not install:
        raise NotInstallable(
            f"{contender.name} got no environment with {', '.join(contender.packages)} in {folder}, and needs one. "
            "Allow the installation (install=True)."
        )
    _make(folder, contender, python)
    stamp.write_text(json.dumps(wanted))
    return str(python)


def _make(folder: Path, contender: Contender, python: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Where there is a pip, the environment sees it, as all that is installed here; to unpack another takes seconds.
        pip_is_seen = ["--without-pip"] if find_spec("pip") else []
        _run([sys.executable, "-m", "venv", *pip_is_seen, str(folder)], contender, "made no virtual environment")
        own = next(iter(folder.glob("lib/python*/site-packages")))
        # Read after its own packages, with the .pth files that lie there: editable installations are such files.
        lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in _site_packages())
        (own / "running_environment.pth").write_text(lines)
        constraint = folder / "constraint.txt"
        constraint.write_text(f"torch=={torch.__version__}\n")
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
        _run([*pip, "--constraint", str(constraint), *contender.packages], contender, "could not be installed")
        check = (
            f"import torch; print(torch.__file__); import lightning_decentral.lab.bench.contenders.{contender.module}"
        )
        answer = _run([str(python), "-c", check], contender, "cannot be imported")
        if answer.splitlines()[0] != torch.__file__:
            raise NotInstallable(
                f"{contender.name} got a torch of its own, {answer.splitlines()[0]}, needs {torch.__file__} for a fair "
                "race. Install it by hand, with another version of the framework."
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _run(command: list[str], contender: Contender, failure: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONHOME", "PIP_TARGET")}
    try:
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotInstallable(f"{contender.name} {failure}: it took more than {_INSTALL_SECONDS} seconds.") from None
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise NotInstallable(f"{contender.name} {failure}: {errors[-1].strip()}")
    return finished.stdout


def _site_packages() -> list[str]:
    """Return those of the running environment, and of those that it is itself laid over."""
    known = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    torch_home = str(Path(torch.__file__).parents[1])
    return [*known, *([] if torch_home in known else [torch_home])]
