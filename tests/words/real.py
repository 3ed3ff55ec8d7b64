"""Real workers below Lightning: forked processes on gloo that run a method on the quadratic, with a training loop of
three lines."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.ports import free_port
from reference.quadratic import Quadratic
from torch import nn

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm, LocalStep
from lightning_decentral.transport import shared_memory
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings

RATE = 0.05
TIMEOUT_SECONDS = 60.0
Work = Callable[[int, int], Any]


def run_workers(workers: int, work: Work, folder: Path, dies: Sequence[int] = (), seconds: float = 150.0) -> list[Any]:
    """What ``work(rank, port)`` gives on each worker; an error as its text; nothing of those that die."""
    port = free_port()
    fork = multiprocessing.get_context("fork")

    def run(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=workers, timeout=timedelta(seconds=60))
        torch.save(work(rank, workers), folder / f"{rank}.pt")
        os._exit(0)  # the others may have been killed: nobody is waited for

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
    return [None if rank in dies else torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(workers)]


def connected(rank: int, hosts: int) -> Communicator:
    """A communicator of workers that are divided among so many hosts; 0: each one on its own."""
    if hosts > 1:
        shared_memory.host_name = lambda: f"host {rank % hosts}"
    return Communicator(
        ConnectionSettings(torch.device("cpu"), "127.0.0.1", TIMEOUT_SECONDS, timedelta(seconds=60), hosts > 0)
    )


class Loop:
    """A worker's training loop.

    Args:
        method: resolved.
        problem: whose gradients it takes.
        communicator: to the others.
        sizes: of its parameters; by default there is one.
    """

    def __init__(
        self,
        method: AbstractAlgorithm,
        problem: Quadratic,
        communicator: Communicator,
        sizes: Sequence[int] | None = None,
    ) -> None:
        start = problem.start[communicator.rank]
        self.weights = [nn.Parameter(each.clone()) for each in start.split(list(sizes or [len(start)]))]
        self.stepper = Stepper(method, self.weights, communicator, 0, seed=0)
        self._problem, self._rank = problem, communicator.rank
        if isinstance(method, AbstractAsynchronousAlgorithm):
            communicator.open_edges(method, [self.stepper.callee])

    def update(self) -> bool:
        """Plain SGD."""
        with self.stepper.updating() as wanted, torch.no_grad():
            if wanted:
                for weight in self.weights:
                    if weight.grad is not None:
                        weight.add_(weight.grad, alpha=-RATE)
        return wanted

    def update_beside(self, gradient: Vector, shard: tuple[int, int] | None) -> bool:
        """Plain SGD with what others have sent."""
        LocalStep(gradient=gradient, shard=shard).target(self.stepper.worker).add_(gradient, alpha=-RATE)
        return True

    def step(self) -> bool:
        """One step; tells whether it was one."""
        stepper = self.stepper
        stepper.begin()
        while stepper.awaits_update:
            stepper.made(self.update())
        gradient = self._problem.gradient(torch.cat([weight.detach() for weight in self.weights]), self._rank)
        parts = gradient.split([len(each) for each in self.weights]) if len(self.weights) > 1 else (gradient,)  # sparse
        for weight, own in zip(self.weights, parts, strict=True):
            weight.grad = own.clone()
        stepper.after_gradient()
        stepper.finish(self.update())
        return stepper.conduct.counts

    @property
    def x(self) -> torch.Tensor:
        """The worker's own model."""
        assert isinstance(self.stepper.x, Vector)
        return self.stepper.x.buffers[0].clone()
