"""Proved here: FedAvgM is its paper's recursion step by step under jitter, and for a population that comes in
turns; it is slow momentum where all workers are clients; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import federated
from reference.populations import problem_of_clients, rounds, turns_of, unequal
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import FedAvgM, SlowMo
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Clients

ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # of the roots of small squares


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = federated.fedavgm(problem.start, problem.gradient, rate, torch.eye, 5)
    for state in states(simulate(FedAvgM(5), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_a_population_is_the_reference() -> None:
    problem, clients = problem_of_clients(), Clients(9, 4).of_data(unequal(), 4)
    server = federated.heavy_ball(0.7, 0.8)
    reference = federated.population(problem.start[0], problem.gradient, lambda r: turns_of(clients, r), 0.1, server)
    for w in rounds(FedAvgM(10, 0.7, momentum=0.8, clients=clients), problem, 2, 0.1, 6):
        torch.testing.assert_close(w, next(reference), **ROUNDING)


def test_with_all_workers_as_clients_it_is_slow_momentum() -> None:
    problem = equal_start(4)
    slow = states(simulate(SlowMo(4, 0.6, 0.9), problem), problem, rate, 20)
    for one, other in zip(
        states(simulate(FedAvgM(4, 0.9, momentum=0.6), problem), problem, rate, 20), slow, strict=True
    ):
        torch.testing.assert_close(one, other, **ROUNDING)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs a number in"):
        FedAvgM(momentum=-0.1)
