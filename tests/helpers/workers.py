"""Forked workers that are kept: a worker that has run one job costs the next one neither a fork nor its page faults.

Each job is a run of its own, of workers that somebody else has started, as ``torchrun`` does: the environment says who
they are and where they meet. What a job leaves in its process is undone after it. After a job that failed the workers
are given up, and the next job gets new ones; a test that kills, stops or poisons workers starts its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

from helpers.ports import free_port

Job = Callable[..., Any]
"""Called with the worker's rank and more; a function of a module, as it is sent by name."""

_KEPT: dict[int, Workers] = {}
_RUNNING: set[Workers] = set()


class Workers:
    """So many workers on this machine.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self.processor_seconds = [0.0] * size  # that each has used so far

    def run(self, job: Job, *arguments: Any, seconds: float = 150.0, grace: float = 20.0) -> list[Any]:
        """What a job gives on each worker.

        Args:
            job: see `Job`.
            arguments: what it is given after the rank; sent as pickles.
            seconds: that it may take.
            grace: seconds for the others to fail too, once one has failed.

        Raises:
            AssertionError: with all errors, if there is one; or if a worker ended, or took too long.
        """
        if not self.processes:
            self._start()
        port = free_port()
        message = pickle.dumps((job, arguments, port))  # by value: `send` would let all workers share memory of tensors
        for connection in self._connections:
            connection.send_bytes(message)
        answers: dict[int, Any] = {}
        errors: list[str] = []
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), seconds)
            if not ready:
                errors.append(f"workers {sorted(waiting.values())} gave nothing within {seconds} seconds")
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank], error, self.processor_seconds[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    error = f"worker {rank} ended"
                if error:
                    errors.append(error)
                    seconds = min(seconds, grace)
        if errors:
            self.close()
        assert not errors, "\n".join(errors)
        return [answers[rank] for rank in range(self._size)]

    def close(self) -> None:
        """End the workers, whatever they do."""
        _RUNNING.discard(self)
        for connection in self._connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join(10.0)
        self._connections, self.processes, self.processor_seconds = [], [], [0.0] * self._size

    def _start(self) -> None:
        _RUNNING.add(self)
        fork = multiprocessing.get_context("fork")
        gc.collect()  # a store or a process group of a test before would end in a fork, which has not its threads
        for rank in range(self._size):
            ours, theirs = fork.Pipe()
            process = fork.Process(target=_serve, args=(rank, self._size, theirs, os.getpid()))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)


def _serve(rank: int, size: int, connection: Connection, parent: int) -> None:
    from helpers.isolation import as_it_was  # which imports torch: who only counts seconds needs none of it

    gc.freeze()
    while True:
        while not connection.poll(5.0):
            if os.getppid() != parent:
                os._exit(0)
        try:
            job, arguments, port = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        answer, error = None, ""
        try:
            with as_it_was(), _member(rank, size, port):
                answer = job(rank, *arguments)
        except BaseException:
            error = f"worker {rank}:\n{traceback.format_exc()}"
        connection.send_bytes(pickle.dumps((answer, error, processor_seconds())))


@contextmanager
def _member(rank: int, size: int, port: int) -> Iterator[None]:
    """Of a run of so many, to be undone by `as_it_was`."""
    meet_at(port)
    os.environ |= {"WORLD_SIZE": str(size), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    yield


def meet_at(port: int) -> None:
    """Let this worker's next process group meet there; a job with several of them needs several ports."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def processor_seconds() -> float:
    """What this process has used, and those that it has waited for."""
    used = getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)
    return sum(each.ru_utime + each.ru_stime for each in used)


def kept_workers(size: int) -> Workers:
    """The workers of this process that are kept, so many of them."""
    return _KEPT.setdefault(size, Workers(size))


def kept_processes() -> set[BaseProcess]:
    """All of them, and those of other `Workers`."""
    return {process for workers in _RUNNING for process in workers.processes}


def kept_seconds() -> float:
    """What they have used, of the processor: they have not ended, so that nobody else counts it."""
    return sum(sum(workers.processor_seconds) for workers in _RUNNING)


def give_up_workers() -> None:
    """End all of them."""
    for workers in list(_RUNNING):
        workers.close()
