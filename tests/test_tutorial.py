"""Proved here: what the tutorial tells a user to do works, block by block: the script with its one changed line on one
machine, torchrun on emulated hosts, and a real SLURM cluster of this machine, started and stopped by the test.

The page says four machines; here there are two. ``TUTORIAL_MACHINES=4`` in
the environment takes as many as the page.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from emulation.machines import needs_hosts
from helpers.slurm import missing, slurm, wait_for_jobs
from test_docs import DOCS, blocks, run

PAGE = DOCS / "tutorial.md"
MACHINES = int(os.environ.get("TUTORIAL_MACHINES", "2"))
SCRIPT, BATCH = (next(code for name, code, _ in blocks(PAGE, kind) if name) for kind in ("python", "bash"))
COMMANDS = [code for name, code, _ in blocks(PAGE, "bash") if not name]
ENDS = re.compile(rf"{MACHINES} workers, accuracy (0\.\d+|1\.000)")


def changed() -> str:
    """The script after the change of one line that the page shows."""
    (diff,) = (code for _, code, _ in blocks(PAGE, "diff"))
    before, after = (line[1:] for line in diff.splitlines())
    assert SCRIPT.count(before) == 1
    return SCRIPT.replace(before, after)


def command(word: str) -> str:
    """The block with the command that begins with a word, for as many machines as there are here."""
    (code,) = (code for code in COMMANDS if re.search(rf"^{word} ", code, re.MULTILINE))
    return re.sub(r"(MACHINES=|--hosts |--nnodes )4", rf"\g<1>{MACHINES}", code)


@pytest.fixture
def programs(warm: str, tmp_path: Path) -> Path:
    """A folder with the programs of this environment; those that import Lightning need no seconds to start."""
    folder = tmp_path / "programs"
    folder.mkdir()
    programs = {
        "torchrun": f"{warm} -m torch.distributed.run",
        "python": warm,
        "lightning-decentral": f"{sys.executable} -m lightning_decentral",  # gives open files to what it starts
    }
    for name, program in programs.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def shell(code: str, folder: Path, environment: dict[str, str], programs: Path, seconds: float = 200.0) -> str:
    """Run a block as a user would, where the programs of this environment are found; returns what was said."""
    path = f"{programs}{os.pathsep}{environment.get('PATH', '')}"
    done = subprocess.run(
        ["bash", "-ec", code], cwd=folder, env={**environment, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def plain_environment() -> dict[str, str]:
    """That of a user who has started nothing yet."""
    others = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in others}


def test_the_script_after_its_change_on_one_machine(tmp_path: Path) -> None:
    """As `python train.py` runs it; before the change it runs with the other scripts of the pages."""
    assert command("python").split() == ["python", "train.py"]
    run([(changed(), 1)], PAGE, tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_emulated_hosts_run_the_command_of_real_machines() -> None:
    """The block for four machines is the tail of the one for hosts, so what is tried is what is run."""
    words = [
        shlex.split(command(word).replace("\\\n", " "))[2:] for word in ("lightning-decentral emulate", "torchrun")
    ]
    assert words[0][words[0].index("--") + 1 :] == words[1]


@needs_hosts
def test_torchrun_on_emulated_hosts(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(changed())
    code = command("lightning-decentral emulate").replace("emulate", f"emulate --name tutorial{os.getpid()}", 1)
    assert ENDS.search(shell(code, tmp_path, plain_environment(), programs))


def test_the_batch_script_fits_the_trainer(tmp_path: Path) -> None:
    """Checked wherever there is no SLURM, too: bash understands it, and it asks for what the script expects."""
    (tmp_path / "train.sbatch").write_text(BATCH)
    subprocess.run(["bash", "-n", "train.sbatch"], cwd=tmp_path, check=True, timeout=100)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", BATCH, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1", "devices of a machine that is one of several"
    assert "export MACHINES=$SLURM_JOB_NUM_NODES" in BATCH
    assert f"{asked['output']}`" in PAGE.read_text(encoding="utf-8"), "where the page says to look"


@pytest.mark.skipif(bool(missing()), reason=f"{missing()}; the batch script was checked with bash and against the page")
def test_slurm(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(changed())
    (tmp_path / "train.sbatch").write_text(BATCH.replace("--nodes=4", f"--nodes={MACHINES}"))
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm", MACHINES) as environment:
        # The names of its nodes are those of no machine: the script puts the first one's address in their place.
        shell(command("sbatch"), tmp_path, environment, programs)
        wait_for_jobs(environment)
    said = (tmp_path / "train.log").read_text()
    assert ENDS.search(said), said[-5000:]
