"""Proved here: DeepSqueeze is its stacked reference step by step with a compressor that loses; the mean of the models
moves by the mean gradient exactly; workers stay apart by what compression loses, where CHOCO's come together."""

from __future__ import annotations

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, assert_steps_equal, gradient_of, largest, simulate, states

from lightning_decentral.algorithms import DPSGD, DeepSqueeze
from lightning_decentral.averaging import Choco, Squeeze
from lightning_decentral.compression import TopK
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.topology import OnePeerExponential, Ring


def test_it_is_the_reference_step_by_step_under_jitter() -> None:
    algorithm = DeepSqueeze(Ring(5), TopK(0.4), 0.3)
    assert_steps_equal(algorithm, methods.deepsqueeze, 5, consensus_step_size=0.3, compress=largest)


def test_the_mean_moves_by_the_mean_gradient_exactly_also_on_a_changing_graph() -> None:
    problem = Quadratic(5)
    before = problem.start
    simulator = simulate(DeepSqueeze(OnePeerExponential(5), TopK(0.4), 0.3), problem, JITTERED)
    for state in states(simulator, problem, 0.1, 20):
        expected = before.mean(0) - 0.1 * problem.gradient(before).mean(0)
        torch.testing.assert_close(state.mean(0), expected, rtol=0.0, atol=1e-13)
        before = state


def test_without_learning_workers_stay_apart_where_those_of_choco_meet() -> None:
    problem = Quadratic(4)
    apart = []
    for averager in (Squeeze(TopK(0.4), 0.2), Choco(TopK(0.4), 0.2)):
        simulator = simulate(DPSGD(Ring, averager, order="atc"), problem)
        simulator.run(gradient_of(problem), 0.0, 180)
        apart.append(simulator.consensus_distance() ** 0.5)
    assert apart[0] > 1e-3 > 1e-9 > apart[1]


def test_a_coarse_compressor_needs_a_step_size() -> None:
    with pytest.raises(ConfigurationError, match="without a consensus_step_size, needs one"):
        DeepSqueeze(compressor=TopK(0.01)).resolved(4)
