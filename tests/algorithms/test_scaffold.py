"""Proved here: SCAFFOLD is its stacked reference step by step under jitter, and its paper's option II, at a constant
rate, of a population of which few take part; it reaches the optimum where FedAvg is biased; what clients remember is in
checkpoints; clients that remember nothing are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import federated
from reference.populations import begin, problem_of_clients, rounds, run, turns_of
from reference.runs import JITTERED, equal_start, simulate, stacked, states

from lightning_decentral.algorithms import SCAFFOLD, FedAvg
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Clients

ROUNDING = {"rtol": 0.0, "atol": 1e-12}  # option II divides differences by the learning rate


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)

    reference = federated.scaffold(problem.start, problem.gradient, rate, torch.eye, 5)
    for state in states(simulate(SCAFFOLD(5), problem, JITTERED), problem, rate, 30):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_population_is_the_reference(workers: int) -> None:
    problem = problem_of_clients()
    clients = Clients(9, 4, local_steps=5, stateful=True)
    reference = federated.scaffold_population(
        problem.start[0], problem.gradient, 9, lambda r: turns_of(clients, r), 0.1
    )
    for w in rounds(SCAFFOLD(clients=clients), problem, workers, 0.1, 12):
        torch.testing.assert_close(w, next(reference), **ROUNDING)


def test_it_reaches_the_optimum_where_fedavg_is_biased() -> None:
    problem = equal_start(4)
    *_, mean = states(simulate(FedAvg(5), problem), problem, 0.1, 500)
    *_, exact = states(simulate(SCAFFOLD(5), problem), problem, 0.1, 500)
    assert float((mean[0] - problem.optimum).abs().max()) > 0.01
    torch.testing.assert_close(exact[0], problem.optimum, rtol=0.0, atol=1e-10)


def test_only_clients_that_took_part_are_remembered_and_are_in_the_checkpoint() -> None:
    problem = problem_of_clients()
    algorithm = SCAFFOLD(clients=Clients(9, 2, local_steps=3, stateful=True))
    straight, paused, resumed = (begin(algorithm, problem, 1) for _ in range(3))
    run(straight, problem, 0.1, 30)
    run(paused, problem, 0.1, 8)
    assert set(paused.workers[0].state["controls"]) < set(range(9))
    resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
    run(resumed, problem, 0.1, 22)
    assert torch.equal(stacked(resumed), stacked(straight))


def test_clients_that_remember_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="it needs clients that can"):
        SCAFFOLD(clients=Clients(1000, 20))
