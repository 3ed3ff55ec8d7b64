"""Proved here: FedProx is its stacked reference step by step under jitter; with mu = 0 it is FedAvg; a larger mu keeps
clients nearer to the common model; and what cannot work is refused."""

from __future__ import annotations

import pytest
import torch
from reference import federated
from reference.runs import JITTERED, equal_start, simulate, states

from lightning_decentral.algorithms import FedAvg, FedProx
from lightning_decentral.errors import ConfigurationError

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = federated.fedprox(problem.start, problem.gradient, rate, torch.eye, 5, 0.3)
    for state in states(simulate(FedProx(5, mu=0.3), problem, JITTERED), problem, rate, 30):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_with_mu_0_it_is_fedavg() -> None:
    problem = equal_start(4)
    mean = states(simulate(FedAvg(3), problem), problem, rate, 12)
    for one, other in zip(states(simulate(FedProx(3, mu=0.0), problem), problem, rate, 12), mean, strict=True):
        assert torch.equal(one, other)


def test_a_larger_mu_keeps_clients_nearer() -> None:
    problem, drifts = equal_start(4), []
    for mu in (0.0, 0.5, 2.0):
        simulator = simulate(FedProx(8, mu=mu), problem)
        list(states(simulator, problem, 0.2, 80))
        drifts.append(simulator.algorithm.drift(simulator.workers[0]))  # type: ignore[attr-defined]
    assert drifts[0] > 1.2 * drifts[1] > 1.4 * drifts[2]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs a number of at least 0"):
        FedProx(mu=-1.0)
