"""A process that has imported what workers need, and forks one for whoever asks (`prefork_client`).

    python -m lightning_decentral.lab.bench.prefork SOCKET WORKER MODULE ...

It listens on a socket in the file system, which emulated hosts share, and ends when its standard input is closed. A
forked worker moves into the namespaces of the one that asked, so it is killed together with the host.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench.record import descendants

_START_SECONDS = 120


class Prefork:
    """Such a process; a context manager.

    Args:
        python: its interpreter.
        modules: to import before anything is forked.
        path: of its socket.
        worker: the module whose ``main`` runs in the forked process.

    Raises:
        ConfigurationError: if it does not start.
    """

    def __init__(
        self, python: str, modules: Sequence[str], path: Path, worker: str = "lightning_decentral.lab.bench.worker"
    ) -> None:
        self._path = path
        self._process = subprocess.Popen(
            [python, "-m", __name__, str(path), worker, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _START_SECONDS)
        if not ready or self._process.stdout.readline() != b"ready\n":
            self._process.kill()
            said = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
            raise ConfigurationError(f"{python} does not start with {', '.join(modules)}: {' '.join(said[-1:])}")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Tell what runs a worker with these arguments, in the namespaces and the environment in which it is run."""
        client = Path(__file__).with_name("prefork_client.py")
        return [sys.executable, "-S", "-E", str(client), str(self._path), *arguments]

    def close(self) -> None:
        """End it."""
        with suppress(BrokenPipeError):
            self._process.communicate(timeout=10)


def main(arguments: Sequence[str]) -> None:
    """Import, listen, fork."""
    path, name, *modules = arguments
    import torch

    torch.set_num_threads(1)
    for module in modules:
        import_module(module)
    worker = import_module(name)
    # A worker shares the memory of what was imported until somebody writes to it, as the garbage collector does when it
    # looks at an object: copying all that in the first steps would be measured.
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        serve(listener, sys.stdin, worker.main)


def serve(listener: socket.socket, end: IO[str] | socket.socket, work: Callable[[list[str]], int | None]) -> None:
    """Fork for whoever connects, until there is something to read, or nothing any more.

    Args:
        listener: to which `prefork_client` connects.
        end: what is looked at.
        work: called in the forked process with the client's arguments; gives the exit status.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers: their connection tells how they ended
    while True:
        ready, _, _ = select.select([listener, end], [], [])
        if end in ready:
            return
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                listener.close()
                _become(connection, work)


def _become(connection: socket.socket, work: Callable[[list[str]], int | None]) -> None:
    """Be, in the child, what the client would have been, and tell it how that ended."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, descriptors, _, _ = socket.recv_fds(connection, 8, 5)
        arguments, environment, folder = json.loads(_read(connection, int.from_bytes(size, "big")))
        output, errors, *namespaces = descriptors
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        own = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("net", "uts", "mnt")]
        for namespace, inode in zip(namespaces, own, strict=True):
            if os.fstat(namespace).st_ino != inode and ctypes.CDLL(None, use_errno=True).setns(namespace, 0) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        status = work(arguments) or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(OSError):
            connection.sendall(bytes([status & 0xFF]))
        os._exit(status)


def _end_with(client: socket.socket) -> None:
    """End with the client, and let nothing behind that this worker has started."""
    with suppress(OSError):
        if client.recv(1):
            return
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(1)


def _read(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        chunk = connection.recv(size - len(received))
        if not chunk:
            raise ConnectionError("the client has gone")
        received += chunk
    return received


if __name__ == "__main__":
    main(sys.argv[1:])
