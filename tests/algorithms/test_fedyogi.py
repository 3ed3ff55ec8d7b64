"""Proved here: FedYogi is its paper's recursion step by step under jitter, and for a population that comes in
turns; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import federated
from reference.populations import problem_of_clients, rounds, turns_of, unequal
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import FedYogi
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Clients

ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # of the roots of small squares


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = federated.fedyogi(problem.start, problem.gradient, rate, torch.eye, 5)
    for state in states(simulate(FedYogi(5), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_a_population_is_the_reference() -> None:
    problem, clients = problem_of_clients(), Clients(9, 4).of_data(unequal(), 4)
    server = federated.adaptive("yogi", 0.2, 0.5, 0.9, 0.01)
    reference = federated.population(problem.start[0], problem.gradient, lambda r: turns_of(clients, r), 0.1, server)
    algorithm = FedYogi(server_learning_rate=0.2, beta_1=0.5, beta_2=0.9, tau=0.01, clients=clients)
    for w in rounds(algorithm, problem, 2, 0.1, 6):
        torch.testing.assert_close(w, next(reference), **ROUNDING)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs one in"):
        FedYogi(tau=0.0)
