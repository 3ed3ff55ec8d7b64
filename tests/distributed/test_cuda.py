"""Proved here: two processes on one CUDA device, whose messages go through pinned memory and gloo, make the iterates
of the CPU; asynchronous averaging on the device keeps the sum. The driver is checked against the stacked references
on the CPU, so that it runs without a GPU too."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers.ports import free_port
from reference import methods
from reference.quadratic import Quadratic
from torch import Tensor, nn

from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, SyncSGD
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.topology import Complete
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings

WORKERS = 2
PARAMETERS = 70_000  # more than one block of a kernel, and far more than a socket's buffer
STEPS = 8
RATE = 0.2

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def work(rank: int, port: int, kind: str, algorithm: AbstractAlgorithm, rate: float, folder: str) -> None:
    """Train one worker's quadratic, with a step hidden behind each exchange; write its iterates."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS, timeout=timedelta(seconds=60))
    quadratic = Quadratic(WORKERS, PARAMETERS)
    start = quadratic.start[0 if rate else rank]
    x = nn.Parameter(start.to(device))
    optimizer = torch.optim.SGD([x], lr=rate)
    communicator = Communicator(ConnectionSettings(device, "127.0.0.1", 60.0, timedelta(seconds=60), True))
    stepper = Stepper(algorithm.resolved(WORKERS), [x], communicator, 0, seed=0)
    if isinstance(algorithm, ADPSGD):
        communicator.open_edges(stepper.algorithm, [stepper.callee])  # type: ignore[arg-type]
    a, b = quadratic.a[rank].to(device), quadratic.b[rank].to(device)
    iterates = []
    for _ in range(STEPS):
        stepper.begin()
        x.grad = None
        (a * (x - b) ** 2).sum().div(2).backward()
        stepper.after_gradient()
        with stepper.updating():
            optimizer.step()
        stepper.finish(True)
        iterates.append(x.detach().cpu().clone())
    communicator.barrier()
    mean = stepper.mean().buffers[0].cpu()
    end = stepper.x.buffers[0].cpu().clone()
    torch.save((torch.stack(iterates), end, mean, communicator.traffic.bytes_sent), f"{folder}/{kind}-{rank}.pt")
    communicator.close()
    dist.destroy_process_group()


def run(kind: str, algorithm: AbstractAlgorithm, folder: Path, rate: float = RATE) -> list[Any]:
    port = free_port()
    method = "spawn" if kind == "cuda" else "fork"  # CUDA cannot be used in a forked process
    context = torch.multiprocessing.start_processes(
        work, (port, kind, algorithm, rate, str(folder)), WORKERS, join=False, start_method=method
    )
    try:
        for _ in range(60):
            if context.join(timeout=2.0):
                break
        else:
            pytest.fail("the workers did not end within two minutes")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(WORKERS)]


def stacked(results: list[Any]) -> Tensor:
    return torch.stack([iterates for iterates, *_ in results], dim=1)  # [steps, workers, parameters]


CASES = [(SyncSGD(), methods.sync_sgd), (DPSGD(), methods.dpsgd), (D2(), methods.d2)]


@pytest.mark.parametrize(("algorithm", "reference"), CASES, ids=[repr(each) for each, _ in CASES])
def test_the_driver_equals_the_reference_on_the_cpu(algorithm: Any, reference: Any, tmp_path: Path) -> None:
    quadratic = Quadratic(WORKERS, PARAMETERS)
    start = quadratic.start[0].expand(WORKERS, -1)
    steps = reference(start, quadratic.gradient, lambda step: RATE, Complete(WORKERS).mixing_matrix)
    results = run("cpu", algorithm, tmp_path)
    measured = stacked(results)
    torch.testing.assert_close(measured, torch.stack(list(islice(steps, STEPS))), rtol=0.0, atol=1e-12)
    for _, _, mean, _ in results:
        torch.testing.assert_close(mean, measured[-1].mean(0), rtol=0.0, atol=1e-14)


def conserves(kind: str, folder: Path) -> None:
    quadratic = Quadratic(WORKERS, PARAMETERS)
    results = run(kind, ADPSGD(), folder, rate=0.0)
    ends = torch.stack([end for _, end, _, _ in results])
    torch.testing.assert_close(ends.sum(0), quadratic.start.sum(0), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(ends[0], ends[1], rtol=0.0, atol=1e-12)  # one of the two calls: each call is an average
    assert [sent for *_, sent in results] == [STEPS * PARAMETERS * 8] * WORKERS  # one calls, one answers


def test_asynchronous_averaging_keeps_the_sum_on_the_cpu(tmp_path: Path) -> None:
    conserves("cpu", tmp_path)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("algorithm", [algorithm for algorithm, _ in CASES], ids=repr)
def test_two_workers_on_one_cuda_device_equal_the_cpu(algorithm: AbstractAlgorithm, tmp_path: Path) -> None:
    cpu, cuda = run("cpu", algorithm, tmp_path), run("cuda", algorithm, tmp_path)
    # Fused multiply-add on the device: a few roundings in float64.
    torch.testing.assert_close(stacked(cuda), stacked(cpu), rtol=0.0, atol=1e-12)
    for on_cuda, on_cpu in zip(cuda, cpu, strict=True):
        torch.testing.assert_close(on_cuda[2], on_cpu[2], rtol=0.0, atol=1e-12)
        assert on_cuda[3] == on_cpu[3]


@pytest.mark.gpu
@needs_cuda
def test_asynchronous_averaging_on_a_cuda_device_keeps_the_sum(tmp_path: Path) -> None:
    conserves("cuda", tmp_path)
