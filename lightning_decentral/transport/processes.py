"""Whether processes of this machine are still there, where its kernel tells (Linux)."""

from __future__ import annotations

import os
from pathlib import Path


def own_process() -> str:
    """Return a name of this process by which others on its machine know it: its number, when it was started, and in
    which name space of processes."""
    return _named(os.getpid())


def is_there(process: str) -> bool:
    """Tell whether a process still runs, or is stopped: has not ended, even if nobody has taken note of that.

    Args:
        process: what `own_process` gave there; in another name space of processes nobody is known.
    """
    number = process.partition(" ")[0]
    return number.isdigit() and _named(int(number)) == process


def is_near(process: str) -> bool:
    """Tell whether a process is, or was, in this one's name space, in which `is_there` knows of it.

    Args:
        process: what `own_process` gave there.
    """
    return process.rpartition(" ")[2] == _name_space() != ""


def _name_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _named(number: int) -> str:
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return ""
    state, *rest = text.rpartition(")")[2].split()  # after the command's name, which may have spaces
    return "" if state in "ZX" else f"{number} {rest[18]} {_name_space()}"
