"""A SLURM cluster of this machine: its own munge, controller and nodes, in one folder, gone with the block."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch", "squeue", "srun")
_SECONDS = 100.0


def missing() -> str:
    """Why there cannot be one; empty if there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} are not installed (Debian: apt-get install slurm-wlm munge)" if absent else ""


@contextlib.contextmanager
def slurm(folder: Path, nodes: int) -> Iterator[dict[str, str]]:
    """Start a cluster with so many nodes, all on this machine, and give the environment in which its commands find it.

    Raises:
        RuntimeError: if it does not start, with what its daemons wrote.
    """
    key, munge = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    (folder / "state").mkdir()
    ports = [free_port() for _ in range(nodes + 1)]
    names = [f"node{number}" for number in range(nodes)]
    host = socket.gethostname()
    config = folder / "slurm.conf"
    config.write_text(
        f"""ClusterName=tutorial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={munge}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PartitionName=all Nodes=ALL Default=YES State=UP
"""
        + "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN\n"
            for name, port in zip(names, ports[1:], strict=True)
        )
    )
    environment = {**os.environ, "SLURM_CONF": str(config)}
    commands = [
        ["munged", "--foreground", "--force", "--key-file", str(key), "--socket", str(munge)]
        + [f"--{kind}-file={folder}/munged.{kind}" for kind in ("pid", "log", "seed")],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", name] for name in names),
    ]
    running: list[subprocess.Popen[bytes]] = []
    log = folder / "daemons.log"
    try:
        with log.open("wb") as output:
            for command in commands:
                running.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
                )
                if command[0] == "munged":
                    _until(munge.exists, running, log)
        idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        _until(
            lambda: len(subprocess.run(idle, env=environment, capture_output=True, timeout=60).stdout.split()) == nodes,
            running, log,
        )  # fmt: skip
        yield environment
    finally:
        for process in reversed(running):  # the nodes first
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in reversed(running):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_jobs(environment: dict[str, str], seconds: float = 200.0) -> None:
    """Wait until no job waits or runs.

    Raises:
        TimeoutError: if one still does after so many seconds.
    """
    deadline = time.monotonic() + seconds
    queue = ["squeue", "--noheader"]
    while left := subprocess.run(queue, env=environment, capture_output=True, check=True, timeout=60).stdout.decode():
        if time.monotonic() > deadline:
            raise TimeoutError(f"After {seconds} s there are still these jobs:\n{left}")
        time.sleep(0.3)


def _until(condition: object, running: list[subprocess.Popen[bytes]], log: Path) -> None:
    assert callable(condition)
    deadline = time.monotonic() + _SECONDS
    while not condition():
        ended = [process.args for process in running if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise RuntimeError(f"SLURM did not start (ended by itself: {ended}):\n{log.read_text(errors='replace')}")
        time.sleep(0.1)
