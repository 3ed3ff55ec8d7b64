"""Proved here: SGP is its stacked reference step by step, on regular and irregular directed graphs, with messages that
come late; no mass is lost, in flight either, and all workers come to the mean; it refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, assert_steps_equal, buffer_of, gradient_of, simulate, stacked

from lightning_decentral.algorithms import DPSGD, SGP
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.topology import AbstractTopology, DirectedGraph, OnePeerExponential, Ring

IRREGULAR = DirectedGraph([[1, 2], [2], [0, 3], [4], [0]])


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("topology", [IRREGULAR, OnePeerExponential(5)], ids=["irregular", "one peer"])
def test_it_is_the_reference_step_by_step_under_jitter(topology: AbstractTopology, overlap: int) -> None:
    assert_steps_equal(SGP(topology, overlap=overlap), methods.sgp, 5, overlap=overlap)


@pytest.mark.parametrize("overlap", [0, 2])
def test_no_mass_is_lost_and_the_weights_correct_the_models(overlap: int) -> None:
    problem = Quadratic(5)
    simulator = simulate(SGP(IRREGULAR, overlap=overlap), problem, JITTERED)
    for _ in range(4):
        simulator.run(gradient_of(problem), 0.0, 3)
        simulator.state_dict()  # what is under way arrives, and is not counted yet
        mass, weights = torch.zeros(5, dtype=torch.float64), []
        for worker in simulator.workers:
            (weight,) = worker.state["weight"].numbers()
            mass += weight * buffer_of(worker.x)
            weights.append(weight)
            if "late" in worker.state:
                model, number = worker.state["late"].apart(worker.x, worker.x.new_numbers(0.0))
                mass += buffer_of(model)
                weights[-1] += number.numbers()[0]
        assert sum(weights) == pytest.approx(5, abs=1e-13)
        assert max(weights) - min(weights) > 0.1  # the rows do not sum up to one
        torch.testing.assert_close(mass, problem.start.sum(0), rtol=0.0, atol=1e-12)
    simulator.run(gradient_of(problem), 0.0, 400)
    torch.testing.assert_close(stacked(simulator), problem.start.mean(0).expand(5, -1), rtol=0.0, atol=1e-12)


def test_on_a_doubly_stochastic_graph_it_sends_no_weight_and_is_dpsgd() -> None:
    problem = Quadratic(4)
    runs = [simulate(algorithm, problem) for algorithm in (SGP(Ring), DPSGD(Ring, order="atc"))]
    for simulator in runs:
        simulator.run(gradient_of(problem), 0.1, 10)
    assert torch.equal(*map(stacked, runs))
    assert runs[0].traffic == runs[1].traffic


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigurationError, match="SGP got overlap=-1, needs a number of steps"):
        SGP(overlap=-1)
    with pytest.raises(TopologyError, match="needs a way from every worker to all others"):
        SGP(DirectedGraph([[1], [2], [1]]))
    with pytest.raises(TopologyError, match=r"DPSGD needs a doubly stochastic topology.*push-sum"):
        DPSGD(IRREGULAR)
