"""Proved here: FedNova is its stacked reference step by step, which is FedAvg's where all make equally many steps; with
unequal local epochs it is the paper's rule, with the paper's length of steps with momentum; it goes near the optimum of
the mean loss, and FedAvg to another; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import federated
from reference.populations import problem_of_clients, rounds, unequal
from reference.runs import JITTERED, equal_start, simulate, states
from torch import Tensor

from lightning_decentral.algorithms import FedAvg, FedNova
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Clients
from lightning_decentral.federated.clients import Turn

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = federated.fednova(problem.start, problem.gradient, rate, torch.eye, 5)
    for state in states(simulate(FedNova(5), problem, JITTERED), problem, rate, 30):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_a_population_is_the_papers_rule() -> None:
    problem, clients = problem_of_clients(), Clients(9, 4).of_data(unequal(), 4)
    w = problem.start[0]
    for number, found in enumerate(rounds(FedNova(clients=clients), problem, 2, 0.1, 6)):
        turns = clients.round(number).turns
        effective = sum(turn.weight * turn.steps for turn in turns)
        direction: Tensor | float = 0.0
        for turn in turns:
            moved = federated.moved(problem.gradient, w, [(turn.client, turn.steps, 1.0)], 0.1)
            direction = direction + turn.weight * moved / turn.steps
        w = w - effective * direction
        torch.testing.assert_close(found, w, **ROUNDING)


def test_the_length_of_steps_with_momentum_is_that_of_a_constant_gradient() -> None:
    """Heavy ball makes steps of 1, 1 + m, 1 + m + m^2, ... with a gradient of 1."""
    turns = [Turn(0, 1, 0.5), Turn(1, 3, 0.5)]
    lengths = 1.0, 1.0 + 1.5 + 1.75
    expected = [0.5 * (0.5 * sum(lengths)) / length for length in lengths]
    assert FedNova(local_momentum=0.5).weights(turns) == pytest.approx(expected, rel=1e-14)


def test_it_goes_to_the_optimum_of_the_mean_loss_and_fedavg_to_another() -> None:
    problem = problem_of_clients()
    clients = Clients(9, 9, weights="equal").of_data(unequal(), 1)  # steps from 3 to 19
    away = []
    for algorithm in (FedAvg(clients=clients), FedNova(clients=clients)):
        *_, w = rounds(algorithm, problem, 1, 0.004, 120)  # nearly no drift: what is left is the inconsistency
        away.append(float((w - problem.optimum).norm()))
    assert away[1] < 0.3 * away[0]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs a number in"):
        FedNova(local_momentum=1.0)
