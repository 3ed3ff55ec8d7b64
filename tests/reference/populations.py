"""Clients of a quadratic problem, run by virtual workers that are several of them in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_decentral.algorithms.federated import AbstractFederated
from lightning_decentral.federated import Clients
from lightning_decentral.flat import Vector
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.worker import Worker
from reference.federated import Turns
from reference.quadratic import Quadratic
from reference.runs import JITTERED, buffer_of

CLIENTS = 9


def problem_of_clients(clients: int = CLIENTS, parameters: int = 4) -> Quadratic:
    """One quadratic for each client."""
    return Quadratic(clients, parameters, seed=3)


def unequal(clients: int = CLIENTS) -> tuple[int, ...]:
    """Samples of each client."""
    return tuple(3 + 5 * client % 17 for client in range(clients))


def turns_of(clients: Clients, number: int) -> Turns:
    """A round as plain numbers."""
    return [(turn.client, turn.steps, turn.weight) for turn in clients.round(number).turns]


def begin(algorithm: AbstractFederated, problem: Quadratic, workers: int) -> Simulator:
    """Workers that all begin at the problem's first start."""
    return Simulator(
        algorithm, [Vector([problem.start[0].clone()]) for _ in range(workers)], replace(JITTERED, slowdown={})
    )


def run(simulator: Simulator, problem: Quadratic, rate: float, steps: int) -> None:
    """Make some steps, each with the gradient of the client whose turn it is."""
    algorithm: Any = simulator.algorithm

    def gradient(worker: Worker) -> Vector:
        turn = algorithm.turn(worker)
        return Vector([problem.gradient(buffer_of(worker.snapshot), 0 if turn is None else turn.client)])

    simulator.run(gradient, rate, steps)


def rounds(algorithm: AbstractFederated, problem: Quadratic, workers: int, rate: float, count: int) -> Iterator[Tensor]:
    """The first worker's model after each round."""
    simulator = begin(algorithm, problem, workers)
    for number in range(count):
        run(simulator, problem, rate, max(sum(t.steps for t in share) for share in algorithm.shares(number, workers)))
        yield buffer_of(simulator.workers[0].x).clone()
