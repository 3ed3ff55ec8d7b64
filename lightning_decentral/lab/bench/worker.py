"""One worker of a race, one process: ``python -m lightning_decentral.lab.bench.worker``.

Started once per host, with the environment that torchrun gives (`environment_of`). Writes a `Record` into the folder
and exits with 0; with anything else there is no record. It ends itself when it takes too long.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench.contenders import contender
from lightning_decentral.lab.bench.record import Record, Recorder, descendants
from lightning_decentral.lab.bench.task import Task
from lightning_decentral.lab.emulation.hosts import torchrun_environment

PORTS = 3
"""How many ports on the address of worker 0 a race needs: MASTER_PORT, as torchrun, and the two after it."""


def environment_of(rank: int, world_size: int, address: str, port: int, interface: str | None = None) -> dict[str, str]:
    """Tell what a worker's process needs in its environment, beside what it inherits.

    Args:
        rank: of the worker; there is one on each host.
        world_size: how many workers.
        address: of worker 0, where all can reach it.
        port: the first of `PORTS` free ones there.
        interface: whose traffic is measured, and which gloo uses; ``None``: what the name of the host leads to, and
            loopback is measured.
    """
    environment = torchrun_environment(rank, world_size, address, port, f"bench-{port}")
    environment |= {"OMP_NUM_THREADS": "1", "RUST_LOG": "error"}  # torchft would write some lines for every averaging
    return environment if interface is None else {**environment, "GLOO_SOCKET_IFNAME": interface}


class Meeting:
    """Where the workers of a race meet once, through a store that worker 0 keeps at MASTER_PORT + 2.

    Args:
        rank: of this worker.
        world_size: how many meet.
        timeout_seconds: for waiting.
    """

    def __init__(self, rank: int, world_size: int, timeout_seconds: float) -> None:
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self._store: TCPStore | None = None

    def meet(self, steps: int) -> int:
        """Wait until all workers are here; returns what worker 0 gave."""
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]) + PORTS - 1,
            is_master=self.rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.timeout_seconds),
        )
        if self.rank == 0:
            self._store.set("steps", str(steps))
        if self._store.add("here", 1) == self.world_size:
            self._store.set("all", self._store.get("steps").decode())
        return int(self._store.get("all"))


def end_after(seconds: float) -> None:
    """Let this process, and those that it started, end with status 1 when it is still there after so long.

    It writes why, and what each thread was doing, to standard error.
    """

    def end() -> None:
        print(f"This worker took more than {seconds:g} seconds and ends itself. It was here:", file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        for pid in descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 5, exit=True)  # even if no thread can run Python


def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; returns 0 if its record is there.

    Raises:
        ConfigurationError: if the environment is not that of a worker, or the contender unknown.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_decentral.lab.bench.worker", description=__doc__)
    parser.add_argument("--contender", required=True, help="its name")
    parser.add_argument("--task", required=True, help="as JSON, by Task.to_json()")
    parser.add_argument("--folder", required=True, help="for the record")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds after which the process ends itself")
    options = parser.parse_args(argv)
    end_after(options.timeout)
    chosen = contender(options.contender)
    task = Task.from_json(options.task)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE") if name not in os.environ]
    if missing:
        raise ConfigurationError(
            f"A worker got an environment without {', '.join(missing)}, needs what torchrun gives. "
            "Set what lightning_decentral.lab.bench.worker.environment_of() returns."
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if chosen.each_gradient:
        task = task.for_each_gradient(world_size)
    torch.set_num_threads(1)
    path = Record.path(options.folder, chosen.name, rank)
    path.unlink(missing_ok=True)
    run = chosen.load()
    # Data and imports come before memory is measured; the first optimizer of a process imports much of torch.
    task.batch(rank, world_size, 0)
    task.optimizer([torch.nn.Parameter(torch.zeros(1))]).step()
    meeting = Meeting(rank, world_size, options.timeout)
    recorder = Recorder(task, chosen.name, options.folder, rank, world_size, chosen.asynchronous, meeting.meet)
    run(task, recorder, chosen.options)
    return 0 if path.exists() else 1


if __name__ == "__main__":
    sys.exit(main())
