"""The training loop of every contender that leaves the loop to its user."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_decentral.lab.bench.record import Recorder
from lightning_decentral.lab.bench.task import Task


class Steppable(Protocol):
    """What a loop needs of an optimizer."""

    def zero_grad(self) -> Any:
        """Forget the gradients."""

    def step(self) -> Any:
        """Update the parameters."""


def train(
    task: Task,
    recorder: Recorder,
    module: nn.Module,
    optimizer: Steppable,
    after_step: Callable[[], Any] = lambda: None,
) -> None:
    """Make all steps of one worker.

    Args:
        task: gives the batches.
        recorder: notes the steps, and says when it is over.
        module: the model, or what a framework wrapped around it.
        optimizer: likewise.
        after_step: called after every update, as part of the step.
    """
    while recorder.more:
        images, labels = task.batch(recorder.rank, recorder.world_size, recorder.step)
        recorder.begin_step()
        optimizer.zero_grad()
        loss = F.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()
        after_step()
        recorder.end_step(loss.detach())


@contextmanager
def gloo_group() -> Iterator[None]:
    """Open the default process group of all workers, over gloo."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_all(values: Tensor) -> None:
    """Replace a tensor by its sum over all workers. All of them together, in the default group."""
    dist.all_reduce(values)


def address_of_this_host() -> str:
    """Return the address that this host has in the network in which worker 0 is; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        return str(probe.getsockname()[0])
