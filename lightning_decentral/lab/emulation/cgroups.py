"""Limits on the processor time of emulated hosts, by Linux control groups of version 2 or 1."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_decentral.errors import EmulationError

_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/cpu")
_PERIOD_MICROSECONDS = 20_000  # short: a host that has used its share stops for less than one of these
_SHORTEST_QUOTA_MICROSECONDS, _LONGEST_PERIOD_MICROSECONDS = 1_000, 1_000_000  # the kernel's
_REMOVE_SECONDS = 5.0  # until a killed process has left its group


def create(name: str, cpus: Sequence[float | None]) -> None:
    """Make the groups of those hosts whose processor time is limited.

    Args:
        name: of the run.
        cpus: by host, how many cores it may use; ``None``: all.

    Raises:
        EmulationError: if the machine has no control groups for processor time, if they cannot be changed, or if a
            limit is below what they can do.
    """
    if all(cpu is None for cpu in cpus):
        return
    least = min(cpu for cpu in cpus if cpu is not None)
    if least * _LONGEST_PERIOD_MICROSECONDS < _SHORTEST_QUOTA_MICROSECONDS:
        raise EmulationError(f"A host got {100 * least:g}% as its cpu, needs at least 0.1%. Write for example cpu=5%.")
    version_2 = "cpu" in _read(_V2 / "cgroup.controllers").split()
    if not version_2 and not _V1.is_dir():
        raise EmulationError(
            "Limits on a host's processor time (cpu) need control groups, and this machine has none for cpu. Leave out "
            "cpu, or boot with cgroup version 2."
        )
    try:
        folder = _folder(name)
        folder.mkdir()
        if version_2:
            (_V2 / "cgroup.subtree_control").write_text("+cpu")
            (folder / "cgroup.subtree_control").write_text("+cpu")
        for rank, cpu in enumerate(cpus):
            if cpu is None:
                continue
            group = folder / f"host{rank}"
            group.mkdir()
            period = max(_PERIOD_MICROSECONDS, math.ceil(_SHORTEST_QUOTA_MICROSECONDS / cpu))
            quota = round(cpu * period)
            if version_2:
                (group / "cpu.max").write_text(f"{quota} {period}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(str(quota))
    except OSError as error:
        raise EmulationError(
            f"A control group for a host's processor time cannot be made ({error}). Leave out cpu, or run where "
            "/sys/fs/cgroup can be written (a container needs --privileged --cgroupns=host)."
        ) from error


def group(name: str, rank: int) -> Path | None:
    """Return the folder of a host's group; ``None`` if the host is not limited."""
    folder = _folder(name) / f"host{rank}"
    return folder if folder.is_dir() else None


def exist(name: str) -> bool:
    """Tell whether there are groups of a run."""
    return _folder(name).is_dir()


def remove(name: str) -> None:
    """Remove the groups of a run, whose processes have been killed."""
    folder = _folder(name)
    deadline = time.monotonic() + _REMOVE_SECONDS
    while folder.is_dir():
        try:
            for group in [path for path in folder.iterdir() if path.is_dir()]:
                group.rmdir()
            folder.rmdir()
        except OSError as error:
            if time.monotonic() > deadline:
                raise EmulationError(
                    f"The control group {error.filename} cannot be removed ({error.strerror}): a process is still in "
                    "it. End those in its file cgroup.procs, then run: lightning-decentral emulate --clean"
                ) from error
            time.sleep(0.01)


def _folder(name: str) -> Path:
    root = _V2 if "cpu" in _read(_V2 / "cgroup.controllers").split() else _V1
    return root / f"lightning-decentral-{name}"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
