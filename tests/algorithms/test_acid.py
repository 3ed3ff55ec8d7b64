"""Proved here: A2CiD2 is its event-driven stacked reference update by update; what all models and companions have
together moves by the updates alone, whatever overtakes whatever; its rates are those of the graph, whose averages it
brings about in fewer exchanges than AD-PSGD.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, buffer_of, gradient_of, simulate, stacked
from torch import Tensor

from lightning_decentral.algorithms import ADPSGD, ACiD
from lightning_decentral.algorithms.acid import rates
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import BipartiteRing, Complete, Ring

SLOWDOWN = [1.0, 1.37, 2.11, 0.83, 5.03, 1.71]  # no two updates happen at the same time


def rate(step: int) -> float:
    return 0.2 / (1 + step // 5)


@pytest.mark.parametrize("topology", [Ring(6), BipartiteRing(6), Complete(6)], ids=repr)
def test_it_is_the_reference_update_by_update(topology: Any) -> None:
    problem, algorithm = Quadratic(6), ACiD(topology)
    simulator = simulate(algorithm, problem, Cluster(compute_seconds=1.0, slowdown=dict(enumerate(SLOWDOWN))))
    peers = [algorithm.peers(rank) for rank in range(6)]
    in_turn = [[(rank + hop) % 6 for hop in range(1, 6) if (rank + hop) % 6 in peers[rank]] for rank in range(6)]
    constants = rates(peers)
    reference = methods.acid(
        problem.start,
        problem.gradient,
        rate,
        in_turn,
        SLOWDOWN,
        (constants.mixing, constants.companion),
        constants.exchanges,
    )
    gradient, gradients, compared = gradient_of(problem), {}, 0
    for request, worker in simulator.demands(None):
        if type(request) is Gradient:
            gradients[worker.rank] = gradient(worker)
            continue
        worker.x.add_(gradients[worker.rank], alpha=-rate(worker.step))
        # Float64, values around 1, 200 updates.
        torch.testing.assert_close(stacked(simulator), next(reference), rtol=0.0, atol=1e-12)
        compared += 1
        if compared == 200:
            break


def mass(simulator: Simulator) -> Tensor:
    """What models and companions have together, halved."""
    algorithm = simulator.algorithm
    assert isinstance(algorithm, ACiD)
    return torch.stack([buffer_of(algorithm.mass(worker)) for worker in simulator.workers]).sum(0)


@pytest.mark.parametrize("algorithm", [ACiD(), ACiD(Ring, "random", 2)], ids=repr)
def test_what_all_have_moves_by_the_updates_alone(algorithm: ACiD) -> None:
    problem = Quadratic(8)
    simulator, total = simulate(algorithm, problem, JITTERED), problem.start.sum(0)
    gradient, gradients = gradient_of(problem), {}
    for request, worker in simulator.demands(50):
        if type(request) is Gradient:
            gradients[worker.rank] = gradient(worker)
        else:
            worker.x.add_(gradients[worker.rank], alpha=-0.05)
            total = total - 0.05 * buffer_of(gradients[worker.rank])
    simulator.rest()
    torch.testing.assert_close(mass(simulator), total, rtol=0.0, atol=1e-12)


def test_the_rates_are_those_of_the_graph() -> None:
    """On a ring on which one half calls: each edge averages half as often as a worker calls."""
    for size in (4, 6, 16):
        graph = BipartiteRing(size)
        one = 1 / (1 - math.cos(2 * math.pi / size))  # the Laplacian of a ring has 2 - 2 cos
        two = (size - 1) / size  # of two resistors of size 2 and 2 (size - 1), side by side, half
        found = rates([graph.peers(rank) if rank % 2 else () for rank in range(size)])
        assert found.mixing == pytest.approx(0.5 / math.sqrt(one * two))
        assert found.companion == pytest.approx(0.5 * math.sqrt(one / two))
        assert found.exchanges == pytest.approx([1.0] * size)
    assert rates([(1,), ()]).companion == pytest.approx(0.5)  # two workers: nothing to accelerate
    assert rates([()]).mixing == 0.0


def test_it_brings_a_ring_together_in_fewer_exchanges() -> None:
    remains = {}
    algorithms: list[AbstractAlgorithm] = [ADPSGD(BipartiteRing), ACiD()]
    for algorithm in algorithms:
        problem = Quadratic(32)
        simulator = simulate(algorithm, problem, Cluster(jitter="lognormal", jitter_scale=0.2))
        before = simulator.consensus_distance()
        simulator.run(gradient_of(problem), 0.0, 150)
        remains[type(algorithm)] = math.log(simulator.consensus_distance() / before)
    # By the constants: 104 / sqrt(52) of a ring of 32, of which a random start shows less at first.
    assert remains[ACiD] < 2.0 * remains[ADPSGD] < 0.0
    graph = ACiD().resolved(32)
    measured = 1 - math.exp(remains[ACiD] / 300)
    assert 0.7 * graph.mixing(32).spectral_gap < measured < 2.0 * graph.mixing(32).spectral_gap


def test_bad_hyper_parameters_are_refused() -> None:
    for wrong, named in (({"max_pending_steps": 0}, "max_pending"), ({"partners": "x"}, "partners")):
        with pytest.raises(ConfigurationError, match=named):
            ACiD(**wrong)  # type: ignore[arg-type]
