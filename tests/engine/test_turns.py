"""Proved here, with two workers that share memory: where cores are crowded the thread that trains exchanges and
averages itself, waits for a neighbour that is late, and leaves to the lane what was not waited for before something
else was asked for; with a lane for everything the models have the same bits."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers.workers import kept_workers
from torch import nn

from lightning_decentral.algorithms import DPSGD, MoniquaSGD
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.protocol import AbstractAlgorithm, NeighborAverage
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings

STEPS, LATE_SECONDS = 6, 0.3


def train(rank: int, algorithm: AbstractAlgorithm, crowded: bool, asks: bool) -> tuple[list[float], set[str]]:
    """What becomes of a worker's model in a few steps, and the threads that have averaged."""
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    communicator = Communicator(
        ConnectionSettings(torch.device("cpu"), "127.0.0.1", 60.0, timedelta(seconds=60), shared_memory=True)
    )
    communicator.crowded = crowded
    threads, apply = set(), NeighborAverage.apply

    def note(self: NeighborAverage, *arguments: object, **options: object) -> None:
        threads.add(threading.current_thread().name)
        apply(self, *arguments, **options)  # type: ignore[arg-type]

    NeighborAverage.apply = note  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(rank)
    parameter = nn.Parameter(0.1 * torch.randn(10_001, generator=generator))
    optimizer = torch.optim.SGD([parameter], lr=0.1 + rank)
    stepper = Stepper(algorithm.resolved(2), [parameter], communicator, 0, seed=0)
    for step in range(STEPS):
        if step == 3 and rank == 1:
            time.sleep(LATE_SECONDS)  # the other one waits
        stepper.begin()
        if asks:
            communicator.barrier()
        parameter.grad = parameter.detach() * 0.01
        stepper.after_gradient()
        with stepper.updating():
            optimizer.step()
        stepper.finish(True)
    NeighborAverage.apply = apply  # type: ignore[method-assign]
    communicator.barrier()
    values = parameter.tolist()
    stepper.flat.release()
    communicator.close()
    dist.destroy_process_group()
    return values, threads


@pytest.mark.parametrize("algorithm", [DPSGD(), MoniquaSGD(theta=2.0)], ids=["model", "message"])
def test_the_thread_that_trains_exchanges_where_there_is_no_core_for_another(algorithm: AbstractAlgorithm) -> None:
    workers = kept_workers(2)
    here, asked, lane = (workers.run(train, algorithm, *how) for how in ((True, False), (True, True), (False, False)))
    for rank in range(2):
        assert here[rank][0] == asked[rank][0] == lane[rank][0]
        if isinstance(algorithm, DPSGD):
            assert here[rank][1] == {"MainThread"}
            assert asked[rank][1] == lane[rank][1] == {f"decentral-lane-{rank}"}
