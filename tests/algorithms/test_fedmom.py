"""Proved here: FedMom is its paper's recursion step by step under jitter, with v beginning at the model; it is
Nesterov's SGD on the pseudo-gradient, and DiLoCo, to 1e-12; without momentum it is FedAvg, bit by bit; a population is
the reference; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import federated
from reference.populations import problem_of_clients, rounds, turns_of, unequal
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import DiLoCo, FedAvg, FedMom
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Clients

ROUNDING = {"rtol": 0.0, "atol": 1e-12}


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = federated.fedmom(problem.start, problem.gradient, rate, torch.eye, 5)
    for state in states(simulate(FedMom(5), problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_the_first_round_is_that_of_v_beginning_at_the_model() -> None:
    problem = equal_start(4)
    *_, after = states(simulate(FedMom(3, 1.0, momentum=0.9), problem), problem, 0.1, 3)
    *_, mean = states(simulate(FedAvg(3), problem), problem, 0.1, 3)
    v = mean[0]
    torch.testing.assert_close(after[0], v + 0.9 * (v - problem.start[0]), **ROUNDING)


def test_it_is_nesterov_on_the_pseudo_gradient_of_the_clients() -> None:
    problem = problem_of_clients()
    clients = Clients(9, 4).of_data(unequal(), 4)
    common = torch.nn.Parameter(problem.start[0].clone())
    nesterov = torch.optim.SGD([common], lr=0.8, momentum=0.85, nesterov=True)
    for number, w in enumerate(rounds(FedMom(10, 0.8, momentum=0.85, clients=clients), problem, 2, 0.1, 50)):
        common.grad = federated.moved(problem.gradient, common.detach(), turns_of(clients, number), 0.1)
        nesterov.step()
        torch.testing.assert_close(w, common.detach(), **ROUNDING)


def test_with_all_workers_as_clients_it_is_diloco() -> None:
    problem = equal_start(4)
    diloco = states(simulate(DiLoCo(4, 0.7, 0.8), problem), problem, rate, 30)
    for one, other in zip(
        states(simulate(FedMom(4, 0.7, momentum=0.8), problem), problem, rate, 30), diloco, strict=True
    ):
        torch.testing.assert_close(one, other, **ROUNDING)


def test_without_momentum_it_is_fedavg_bit_by_bit() -> None:
    problem = problem_of_clients()
    clients = Clients(9, 4).of_data(unequal(), 4)
    mean = rounds(FedAvg(clients=clients), problem, 2, 0.1, 8)
    for w in rounds(FedMom(momentum=0.0, clients=clients), problem, 2, 0.1, 8):
        assert torch.equal(w, next(mean))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs a number in"):
        FedMom(momentum=1.0)
