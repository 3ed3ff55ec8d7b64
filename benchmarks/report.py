"""What every result file begins with."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import subprocess
from pathlib import Path

import lightning
import torch


def environment() -> str:
    """Date, machine, versions and commit, as one Markdown line."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return (
        f"{datetime.date.today()}; {os.cpu_count()} cores of {model}, {platform.system()} {platform.release()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}; commit "
        f"{commit.stdout.strip()}{' with changes' if changed.stdout.strip() else ''}."
    )


def logging_off() -> None:
    """Keep Lightning's notices out of the report."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
