"""What launchers and trainers leave in a process, undone: in the one that runs tests, and in workers that are kept."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
import torch.distributed

from helpers.threads import threads_besides

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


@contextmanager
def as_it_was() -> Iterator[None]:
    """Bring environment, folder, signal handlers, generators and Lightning's rank back; no process group, no thread."""
    threads = set(threading.enumerate())
    environment, folder = dict(os.environ), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()  # noqa: NPY002
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
        if rank_zero is not None:
            rank_zero.rank_zero_only.rank = 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        numpy.random.set_state(generators[2])  # noqa: NPY002
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.set_num_threads(1)
    deadline = time.monotonic() + 20.0
    while (left := threads_besides(threads)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"threads outlived their run: {left}"
