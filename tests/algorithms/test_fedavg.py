"""Proved here: FedAvg is its stacked reference step by step under jitter, and local SGD where all workers are clients;
with a population it is the reference of clients that come one after the other, however many workers are these clients;
a biased mean of unequal samples and the unbiased one are what they are said to be; where it drifts to on unequal
quadratics is the closed form; a checkpoint in the middle of a round goes on exactly; what cannot work is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import federated
from reference.populations import begin, problem_of_clients, rounds, run, turns_of, unequal
from reference.runs import JITTERED, equal_start, simulate, stacked, states

from lightning_decentral.algorithms import FedAvg, LocalSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Clients

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    problem = equal_start(4)
    reference = federated.fedavg(problem.start, problem.gradient, rate, torch.eye, 5, federated.plain(0.7))
    for state in states(simulate(FedAvg(5, 0.7), problem, JITTERED), problem, rate, 30):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_with_all_workers_as_clients_it_is_local_sgd() -> None:
    problem = equal_start(4)
    local = states(simulate(LocalSGD(3), problem), problem, rate, 20)
    for one, other in zip(states(simulate(FedAvg(3), problem), problem, rate, 20), local, strict=True):
        torch.testing.assert_close(one, other, **ROUNDING)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("weights", ["samples", "all", "equal"])
def test_a_population_is_the_reference_however_many_workers_it_has(workers: int, weights: str) -> None:
    problem = problem_of_clients()
    clients = Clients(9, 5, weights=weights, stateful=weights == "all").of_data(unequal(), 4)  # type: ignore[arg-type]
    reference = federated.population(
        problem.start[0], problem.gradient, lambda r: turns_of(clients, r), 0.1, federated.plain()
    )
    for w in rounds(FedAvg(clients=clients), problem, workers, 0.1, 6):
        torch.testing.assert_close(w, next(reference), **ROUNDING)


def test_weights_by_all_are_right_on_average_and_those_of_the_round_are_not() -> None:
    """Each client moves by its number of samples: then all that counts is the weights."""
    samples = torch.tensor(unequal(), dtype=torch.float64)
    exact = float(samples.square().sum() / samples.sum())

    def mean(weights: str) -> float:
        clients = Clients(9, 2, local_steps=1, weights=weights).of_data(unequal(), 1)  # type: ignore[arg-type]
        turns = [turn for number in range(3000) for turn in clients.round(number).turns]
        return sum(turn.weight * unequal()[turn.client] for turn in turns) / 3000

    assert mean("all") == pytest.approx(exact, rel=0.06)  # five standard deviations of the mean of as many draws
    assert mean("samples") < 0.93 * exact


def test_where_it_drifts_to_is_the_closed_form() -> None:
    problem, every, learning_rate = equal_start(4), 7, 0.3
    shrunk = 1.0 - (1.0 - learning_rate * problem.a) ** every
    fixed = (shrunk * problem.b).sum(0) / shrunk.sum(0)
    *_, last = states(simulate(FedAvg(every), problem), problem, learning_rate, 20 * every)
    torch.testing.assert_close(last[0], fixed, rtol=0.0, atol=1e-12)
    assert float((fixed - problem.optimum).abs().max()) > 0.01


def test_a_checkpoint_in_the_middle_of_a_round_goes_on_exactly() -> None:
    problem = problem_of_clients()
    algorithm = FedAvg(clients=Clients(9, 5, weights="all").of_data(unequal(), 4))
    straight, paused, resumed = (begin(algorithm, problem, 2) for _ in range(3))
    run(straight, problem, 0.1, 40)
    run(paused, problem, 0.1, 17)
    assert paused.workers[0].state["made"] > 0
    resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
    run(resumed, problem, 0.1, 23)
    assert torch.equal(stacked(resumed), stacked(straight))


def test_the_drift_is_the_distance_of_the_clients_from_their_mean() -> None:
    problem = equal_start(3)
    simulator = simulate(FedAvg(4), problem)
    *_, before = states(simulator, problem, 0.2, 3)
    clients = before - 0.2 * problem.gradient(before)
    list(states(simulator, problem, 0.2, 1))
    expected = float((clients - clients.mean(0)).square().sum(1).mean().sqrt())
    algorithm = simulator.algorithm
    assert isinstance(algorithm, FedAvg)
    assert [algorithm.drift(worker) for worker in simulator.workers] == pytest.approx([expected] * 3, rel=1e-12)


def test_what_cannot_work_is_refused() -> None:
    for options in ({"every": 0}, {"server_learning_rate": 0.0}):
        with pytest.raises(ConfigurationError, match="needs"):
            FedAvg(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="use local_steps"):
        FedAvg(clients=Clients(9, 5)).shares(0, 1)
