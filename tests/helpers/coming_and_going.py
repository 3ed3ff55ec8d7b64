"""Workers that are started, killed and started again one by one, with a rendezvous that is none of them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from helpers.ports import free_port

_FORK = multiprocessing.get_context("fork")


class Town:
    """A rendezvous, and the workers that somebody starts.

    Args:
        folder: for what the workers write.
        job: what a worker does, given its rank.
    """

    def __init__(self, folder: Path, job: Callable[[int], None]) -> None:
        gc.collect()  # a store or a process group of a test before would end in a fork, which has not its threads
        self.folder, self._job = folder, job
        self.port = free_port()
        self.workers: dict[int, BaseProcess] = {}
        self._ended: list[BaseProcess] = []
        self._rendezvous = _FORK.Process(target=_serve, args=(self.port,), daemon=True)
        self._rendezvous.start()

    def start(self, rank: int, **environment: str) -> None:
        """Start a worker, again or for the first time."""
        if rank in self.workers:
            self._ended.append(self.workers[rank])
        process = _FORK.Process(target=self._work, args=(rank, environment), daemon=True)
        process.start()
        self.workers[rank] = process

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a worker."""
        pid = self.workers[rank].pid
        assert pid is not None
        os.kill(pid, number)
        if number == signal.SIGKILL:
            self.workers[rank].join(10.0)

    def text(self, rank: int) -> str:
        """What a worker has printed so far, in all its lives."""
        path = self.folder / f"{rank}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, rank: int, what: str, count: int = 1, seconds: float = 120.0) -> None:
        """Wait until a worker has printed something so many times."""
        deadline = time.monotonic() + seconds
        while self.text(rank).count(what) < count:
            assert time.monotonic() < deadline, f"worker {rank} did not say {what!r}:\n{self.text(rank)}"
            time.sleep(0.02)

    def ports(self, rank: int) -> list[int]:
        """Where a worker listens."""
        process = Path(f"/proc/{self.workers[rank].pid}")
        links = []
        for link in (process / "fd").iterdir():
            with suppress(OSError):  # it has been closed since
                links.append(os.readlink(link))
        sockets = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
        tables = (line.split() for name in ("tcp", "tcp6") for line in (process / "net" / name).open().readlines()[1:])
        return sorted({int(row[1].rpartition(":")[2], 16) for row in tables if row[3] == "0A" and row[9] in sockets})

    def join(self, seconds: float = 120.0) -> dict[int, int | None]:
        """The exit codes of the workers that were started last, once all have ended."""
        deadline = time.monotonic() + seconds
        for process in self.workers.values():
            process.join(max(0.0, deadline - time.monotonic()))
        return {rank: process.exitcode for rank, process in self.workers.items()}

    def close(self) -> None:
        """End everybody."""
        for process in (*self._ended, *self.workers.values(), self._rendezvous):
            process.kill()
            process.join(10.0)

    def _work(self, rank: int, environment: dict[str, str]) -> None:
        gc.freeze()
        file = os.open(self.folder / f"{rank}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        os.environ |= place | environment
        try:
            self._job(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


@contextmanager
def town(folder: Path, job: Callable[[int], None]) -> Iterator[Town]:
    """A `Town` under which nobody is left behind."""
    made = Town(folder, job)
    try:
        yield made
    finally:
        made.close()


def _serve(port: int) -> None:
    from lightning_decentral.transport.rendezvous import serve

    with serve("127.0.0.1", port):
        signal.pause()
