"""Runs of a method in the simulator, as stacked states to compare with the references, and what several tests need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.compression import AbstractCompressor, Payload
from lightning_decentral.compression.base import Field, Traits, numel
from lightning_decentral.flat import Vector
from lightning_decentral.methods import METHODS
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import AbstractTopology
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


def equal_start(workers: int, parameters: int = 5) -> Quadratic:
    """A problem of which all workers begin at the same place."""
    problem = Quadratic(workers, parameters)
    problem.start = problem.start[:1].expand(workers, -1).clone()
    return problem


SHORT = {
    "workers_per_host": 2,
    "every": 4,
    "fragments": 2,
    "delay": 1,
    "theta": 8.0,
}  # rounds that end within a dozen steps


def fitted(name: str) -> AbstractAlgorithm:
    """A method with its defaults, but for rounds, and hosts, as small as tests are."""
    algorithm: Any = METHODS[name].load()()
    known = {field.name for field in dataclasses.fields(algorithm)}
    short: AbstractAlgorithm = dataclasses.replace(algorithm, **{key: SHORT[key] for key in SHORT.keys() & known})
    return short


def largest(x: Tensor) -> Tensor:
    """The 2 largest of each worker's 5 values."""
    positions = x.abs().topk(2, 1).indices
    return torch.zeros_like(x).scatter(1, positions, x.gather(1, positions))


@dataclass(frozen=True)
class Kept(AbstractCompressor):
    """A compressor that sends every element with a probability, and of it a share: 0 for the rest."""

    probability: float = 1.0
    share: float = 1.0

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, randomness="own", keeps_dtype=True)

    def error_bound(self, numel: int) -> float:
        return 1.0 - self.probability * self.share

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return ((dtype, numel(shape)),)

    def _encode(self, x: Tensor, shape: Any, generator: torch.Generator | None, seed: int) -> tuple[Tensor, ...]:
        kept = torch.rand(x.shape, generator=generator, dtype=torch.float64) < self.probability
        return (x * kept * self.share,)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        out.copy_(payload.tensors[0])


def buffer_of(vector: object) -> Tensor:
    """The one tensor of a vector."""
    assert isinstance(vector, Vector)
    (buffer,) = vector.buffers
    return buffer


def simulate(
    algorithm: AbstractAlgorithm,
    problem: Quadratic,
    cluster: Cluster | None = None,
    seed: int = 0,
    micro_batches: int = 1,
) -> Simulator:
    """Virtual workers at the problem's start."""
    start = [Vector([row.clone()]) for row in problem.start]
    return Simulator(algorithm, start, cluster, seed, micro_batches=micro_batches)


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


def assert_steps_equal(
    algorithm: AbstractAlgorithm,
    reference: Callable[..., Iterator[Tensor]],
    workers: int = 4,
    equal: bool = False,
    **options: Any,
) -> None:
    """In 30 steps of very unequal workers, at a learning rate that changes, a method is its stacked reference.

    Args:
        algorithm: the method.
        reference: of `reference.methods`.
        workers: their number.
        equal: whether all begin at the same place.
        options: for the reference.
    """

    def rate(step: int) -> float:
        return 0.2 / (1 + step // 7)

    problem = equal_start(workers) if equal else Quadratic(workers)
    graph = getattr(algorithm.resolved(workers), "topology", None)
    expected = reference(problem.start, problem.gradient, rate, graph and graph.mixing_matrix, **options)
    for state in states(simulate(algorithm, problem, JITTERED), problem, rate, 30):
        torch.testing.assert_close(state, next(expected), rtol=0.0, atol=1e-12)  # float64, values around 1


def settled(simulator: Simulator, problem: Quadratic, rate: float, steps: int = 1500) -> Tensor:
    """The stacked state once nothing changes any more, after so many steps at most."""
    before = stacked(simulator)
    for done in range(0, steps, 25):
        simulator.run(gradient_of(problem), rate, min(25, steps - done))
        now = stacked(simulator)
        if float((now - before).abs().max()) < 1e-13:  # float64, values around 1
            break
        before = now
    return now


def rests_at(algorithm: AbstractAlgorithm, problem: Quadratic, rate: float, steps: int = 1500) -> Tensor:
    """The stacked state once nothing changes any more, after so many steps at most."""
    return settled(simulate(algorithm, problem), problem, rate, steps)


def fixed_point(problem: Quadratic, graph: AbstractTopology, rate: float, order: str) -> Tensor:
    """Where D-PSGD rests on a graph that stays the same: ``(I - W + r A) X = r A B``, or with W before A after it."""
    w, columns = graph.mixing_matrix(), []
    for a, b in zip(problem.a.T, problem.b.T, strict=True):
        pull = rate * (a.diag() if order == "awc" else w @ a.diag())
        columns.append(torch.linalg.solve(torch.eye(graph.size, dtype=torch.float64) - w + pull, pull @ b))
    return torch.stack(columns, 1)
