"""Runs of a method in the simulator, as stacked states to compare with the references."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.transport.network import Cluster
from lightning_decentral.transport.simulator import Simulator
from lightning_decentral.worker import Worker
from reference.quadratic import Quadratic

JITTERED = Cluster(
    compute_seconds=1.0,
    jitter="pareto",
    jitter_scale=1.2,  # infinite variance: now and then somebody takes a hundred times as long
    bandwidth_bytes_per_second=100.0,
    latency_seconds=0.3,
    slowdown={1: 4.0},
)


def simulate(
    algorithm: AbstractAlgorithm, problem: Quadratic, cluster: Cluster | None = None, seed: int = 0
) -> Simulator:
    """Virtual workers at the problem's start."""
    return Simulator(algorithm, [Vector([row.clone()]) for row in problem.start], cluster, seed)


def gradient_of(problem: Quadratic) -> Callable[[Worker], Vector]:
    """Each worker's gradient of the quadratic, where `Simulator.run` wants it."""

    def gradient(worker: Worker) -> Vector:
        assert isinstance(worker.snapshot, Vector)
        return Vector([problem.gradient(worker.snapshot.buffers[0], worker.rank)])

    return gradient


def stacked(simulator: Simulator) -> Tensor:
    """All workers' parameters, [workers, parameters]."""
    vectors = [worker.x for worker in simulator.workers]
    return torch.stack([vector.buffers[0] for vector in vectors if isinstance(vector, Vector)])


def states(
    simulator: Simulator, problem: Quadratic, rate: float | Callable[[int], float], steps: int
) -> Iterator[Tensor]:
    """The stacked state after each of the next steps."""
    for _ in range(steps):
        simulator.run(gradient_of(problem), rate, 1)
        yield stacked(simulator)
