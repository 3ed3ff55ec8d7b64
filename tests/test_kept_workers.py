"""Proved here: workers that are kept do one job after the other in the same processes and leave nothing of one for the
next; a job that fails, or a worker that ends, is told with its rank, and the next job gets new workers; what they use
of the processor is counted once; who started scripts in this process is told."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.threads import threads_besides
from helpers.workers import Workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    workers = Workers(2)
    yield workers
    workers.close()


def change(rank: int, folder: str) -> tuple[Any, ...]:
    before = (os.getcwd(), os.environ.get("LEFT"), dist.is_initialized(), random.random())
    os.environ["LEFT"] = str(rank)
    os.chdir(folder)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    total = torch.ones(1) * rank
    dist.all_reduce(total)
    return os.getpid(), before, float(total)


def fail(rank: int, how: str) -> int:
    if rank == 1 and how == "raises":
        raise ValueError("a mistake")
    if rank == 1:
        os._exit(3)
    return os.getpid()


def share(rank: int, value: torch.Tensor) -> float:
    value.add_(1.0)
    return float(value)


def test_a_job_leaves_nothing_for_the_next(workers: Workers, tmp_path: Any) -> None:
    first, second = (workers.run(change, str(tmp_path), seconds=60.0) for _ in range(2))
    assert first == second
    assert all(before[:3] == (os.getcwd(), None, False) and total == 1.0 for _, before, total in first)
    assert len({pid for pid, _, _ in first} | {os.getpid()}) == 3


def test_arguments_are_each_workers_own(workers: Workers) -> None:
    value = torch.zeros(())
    assert workers.run(share, value) == [1.0, 1.0]
    assert float(value) == 0.0


@pytest.mark.parametrize(("how", "words"), [("raises", "worker 1:\n(?s:.*)a mistake"), ("ends", "worker 1 ended")])
def test_a_failure_is_told_and_the_next_job_gets_new_workers(workers: Workers, how: str, words: str) -> None:
    before = set(workers.run(os_pid))
    with pytest.raises(AssertionError, match=words):
        workers.run(fail, how, seconds=60.0)
    assert not workers.processes
    assert before.isdisjoint(workers.run(os_pid))


def os_pid(rank: int) -> int:
    return os.getpid()


def test_the_processor_time_is_that_of_the_processes(workers: Workers) -> None:
    workers.run(os_pid)
    before = list(workers.processor_seconds)
    workers.run(burn)
    assert all(now - then >= 0.05 for then, now in zip(before, workers.processor_seconds, strict=True))
    workers.close()
    assert sum(workers.processor_seconds) == 0.0  # who waited for them counts it now


def burn(rank: int) -> None:
    until = os.times().user + 0.1
    while os.times().user < until:
        pass


class Observes(threading.Thread):
    """As Lightning's launcher of scripts has one, which kills this process when one of them fails."""

    def __init__(self, processes: list[str]) -> None:
        super().__init__(name="child-process-observer", daemon=True)
        self._child_processes, self.ends = processes, threading.Event()

    def run(self) -> None:
        self.ends.wait(60.0)


def test_who_started_scripts_is_told_before_their_observer_kills_this_process() -> None:
    before = set(threading.enumerate())
    for processes, told in (([], []), (["a script"], ["child-process-observer"])):
        thread = Observes(processes)
        thread.start()
        try:
            assert threads_besides(before) == told
        finally:
            thread.ends.set()
            thread.join(10.0)
