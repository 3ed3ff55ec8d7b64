"""Proved here: FedAdam, FedYogi and FedAdagrad are their paper's recursion step by step under jitter, and for a
population that comes in turns; and what cannot work is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import federated
from reference.populations import problem_of_clients, rounds, turns_of, unequal
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import FedAdagrad, FedAdam, FedYogi
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Clients

ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # of the roots of small squares
ADAPTIVE = [
    pytest.param(FedAdam, federated.fedadam, ("adam", 0.9), id="adam"),
    pytest.param(FedYogi, federated.fedyogi, ("yogi", 0.9), id="yogi"),
    pytest.param(FedAdagrad, federated.fedadagrad, ("adagrad", None), id="adagrad"),  # forgets nothing
]


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize(("method", "recursion", "server"), ADAPTIVE)
def test_it_is_the_reference_step_by_step_under_jitter(method: Any, recursion: Any, server: Any) -> None:
    problem = equal_start(4)
    reference = recursion(problem.start, problem.gradient, rate, torch.eye, 5)
    for state in states(simulate(method(5), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


@pytest.mark.parametrize(("method", "recursion", "server"), ADAPTIVE)
def test_a_population_is_the_reference(method: Any, recursion: Any, server: Any) -> None:
    problem, clients = problem_of_clients(), Clients(9, 4).of_data(unequal(), 4)
    adapts, beta_2 = server
    rule = federated.adaptive(adapts, 0.2, 0.5, beta_2 or 0.0, 0.01)
    reference = federated.population(problem.start[0], problem.gradient, lambda r: turns_of(clients, r), 0.1, rule)
    forgets = {} if beta_2 is None else {"beta_2": beta_2}
    algorithm = method(server_learning_rate=0.2, beta_1=0.5, tau=0.01, clients=clients, **forgets)
    for w in rounds(algorithm, problem, 2, 0.1, 6):
        torch.testing.assert_close(w, next(reference), **ROUNDING)


@pytest.mark.parametrize("method", [FedAdam, FedYogi, FedAdagrad])
def test_what_cannot_work_is_refused(method: Any) -> None:
    with pytest.raises(ConfigurationError, match="needs one in"):
        method(tau=0.0)
