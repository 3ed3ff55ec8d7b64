"""Runs of methods with a server in the simulator, as the sequence of the server's models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from reference.quadratic import Quadratic
from reference.runs import buffer_of, gradient_of, simulate

SECONDS = [1.0, 1.37, 2.11, 0.83, 5.03, 1.71]
"""Of a gradient of each of six workers: no two updates happen at the same time."""


def served(
    algorithm: AbstractAlgorithm, problem: Quadratic, seconds: Sequence[float] = SECONDS, micro_batches: int = 1
) -> Simulator:
    """A simulation of it, for `updates`; messages take no time."""
    cluster = Cluster(compute_seconds=1.0, slowdown=dict(enumerate(seconds)))
    return simulate(algorithm, problem, cluster, micro_batches=micro_batches)


def updates(simulator: Simulator, problem: Quadratic, rate: float, steps: int | None = None) -> Iterator[Tensor]:
    """The server's model after each update, by plain SGD."""
    gradient = gradient_of(problem)
    gradients: dict[int, Vector] = {}
    for worker in simulator.workers:
        worker.read_gradient = lambda rank=worker.rank: gradients[rank]  # type: ignore[misc]
    for request, worker in simulator.demands(steps):
        if type(request) is Gradient:
            gradients[worker.rank] = gradient(worker)
            continue
        target = request.target(worker)  # type: ignore[union-attr]
        direction = request.gradient  # type: ignore[union-attr]
        target.add_(gradients[worker.rank] if direction is None else direction, alpha=-rate)
        yield buffer_of(simulator.consensus()).clone()


def centres(simulator: Simulator, problem: Quadratic, rate: float) -> Iterator[Tensor]:
    """The centre that the server keeps, after each message that it has had, by plain local SGD of all."""
    gradient, heard = gradient_of(problem), 0
    gradients: dict[int, Vector] = {}
    state = simulator.workers[0].state
    for worker in simulator.workers:
        worker.read_gradient = lambda rank=worker.rank: gradients[rank]  # type: ignore[misc]
    for request, worker in simulator.demands():
        now = sum(state["accepted"].values())
        if now > heard:
            heard = now
            yield buffer_of(state["centre"]).clone()
        if type(request) is Gradient:
            gradients[worker.rank] = gradient(worker)
        else:
            worker.x.add_(gradients[worker.rank], alpha=-rate)
