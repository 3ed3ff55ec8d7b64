"""Proved here: AD-PSGD is its event-driven stacked reference update by update; averaging keeps the sum whatever
overtakes whatever; a step does not wait for a slow network, but after so many steps; with learning rate going to 0 it
rests at the optimum of the losses weighted with the workers' speeds.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, gradient_of, simulate, stacked

from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.algorithms.pairwise import Partners
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import (
    BipartiteExponential,
    BipartiteRing,
    Complete,
    Exponential,
    Ring,
)

SLOWDOWN = [1.0, 1.37, 2.11, 0.83, 5.03, 1.71]  # no two updates happen at the same time


def rate(step: int) -> float:
    return 0.3 / (1 + step // 5)


def partners(algorithm: ADPSGD, seed: int) -> list[Iterator[int]]:
    """Whom each of six workers calls."""
    peers, calls = [algorithm.peers(rank) for rank in range(6)], []
    for rank, others in enumerate(peers):
        draws = random.Random((seed << 20) + rank)
        in_turn = [(rank + hop) % 6 for hop in range(1, 6) if (rank + hop) % 6 in others]
        calls.append(
            itertools.cycle(in_turn)
            if algorithm.partners == "rotating"
            else map(draws.choice, itertools.repeat(others))
        )
    return calls


@pytest.mark.parametrize(
    ("algorithm", "delay"),
    [
        (ADPSGD(Complete(6), "random", 1), 0.0),
        (ADPSGD(Ring(6), "random"), 0.0),
        (ADPSGD(Exponential(6)), 0.0),
        (ADPSGD(Exponential(6)), 0.9137),  # of messages: calls last two steps of the fast ones
        (ADPSGD(Complete(6), "random", 2), 1.7713),  # longer than the fast ones go on
    ],
    ids=lambda value: f"{value!r} {value.partners} {value.max_pending_steps}" if isinstance(value, ADPSGD) else None,
)
def test_it_is_the_reference_update_by_update(algorithm: ADPSGD, delay: float) -> None:
    problem = Quadratic(6)
    slowdown = dict(enumerate(SLOWDOWN))
    cluster = Cluster(compute_seconds=1.0, slowdown=slowdown, latency_seconds=delay, rendezvous=False)
    simulator = simulate(algorithm, problem, cluster, seed=7)
    reference = methods.adpsgd(
        problem.start,
        problem.gradient,
        rate,
        partners(algorithm, seed=7),
        SLOWDOWN,
        delay,
        algorithm.max_pending_steps,
    )
    gradient = gradient_of(problem)
    gradients = {}
    compared = 0
    for request, worker in simulator.demands(None):
        if type(request) is Gradient:
            gradients[worker.rank] = gradient(worker)
            continue
        worker.x.add_(gradients[worker.rank], alpha=-rate(worker.step))
        # Float64, values around 1, 200 updates that contract.
        torch.testing.assert_close(stacked(simulator), next(reference), rtol=0.0, atol=1e-13)
        compared += 1
        if compared == 200:
            break
    waits = [traffic.exposed_seconds for traffic in simulator.traffic]
    assert (max(waits) > 0.0) == (delay > 1.0)


@pytest.mark.parametrize(
    ("workers", "algorithm", "remains"),
    [(2, ADPSGD(), 1e-6), (3, ADPSGD(), 1e-6), (8, ADPSGD(), 1e-2), (8, ADPSGD(Complete, "random", 1), 1e-6)],
    ids=repr,
)
def test_averaging_keeps_the_sum_whatever_overtakes_whatever(workers: int, algorithm: ADPSGD, remains: float) -> None:
    """Calls of both ends cross, answers arrive after further calls: nothing is lost. A lerp instead of the difference
    form, or an average of only one end, drifts by the size of the values."""
    problem = Quadratic(workers)
    cluster = Cluster(jitter="pareto", jitter_scale=1.1, bandwidth_bytes_per_second=100.0, latency_seconds=0.5)
    simulator = simulate(algorithm, problem, cluster)
    before = simulator.consensus_distance()
    simulator.run(gradient_of(problem), 0.0, 60)
    total, expected = stacked(simulator).sum(0), problem.start.sum(0)
    torch.testing.assert_close(total, expected, rtol=0.0, atol=1e-13)  # 120 * workers float64 additions
    assert simulator.consensus_distance() < remains * before


def test_the_sum_moves_by_the_gradients_exactly() -> None:
    problem = Quadratic(8)
    simulator = simulate(ADPSGD(), problem, JITTERED)
    gradient = gradient_of(problem)
    applied = torch.zeros(5, dtype=torch.float64)
    gradients = {}
    for request, worker in simulator.demands(50):
        if type(request) is Gradient:
            gradients[worker.rank] = gradient(worker)
        else:
            worker.x.add_(gradients[worker.rank], alpha=-0.1)
            applied -= 0.1 * gradients[worker.rank].buffers[0]
    torch.testing.assert_close(stacked(simulator).sum(0), problem.start.sum(0) + applied, rtol=0.0, atol=1e-12)


def test_a_worker_that_computes_is_averaged_under_its_gradient() -> None:
    problem = Quadratic(4)
    simulator = simulate(ADPSGD(), problem, Cluster(compute_seconds=1.0, slowdown={2: 20.0}))
    staleness = []
    for request, worker in simulator.demands(20):
        if type(request) is not Gradient and worker.rank == 2:
            staleness.append(worker.staleness)
            break
        worker.x.add_(worker.x.clone().mul_(0.0))
    # Three fast workers with 20 steps each call one of three peers: 20 calls on average, standard deviation 3.7.
    assert 8 <= staleness[0] <= 32


def test_it_rests_where_the_losses_are_weighted_with_the_workers_speeds() -> None:
    problem, slowdown, learning_rate = Quadratic(6), [1.0, 1.37, 2.11, 0.83, 5.03, 9.71], 0.002
    simulator = simulate(ADPSGD(), problem, Cluster(compute_seconds=1.0, slowdown=dict(enumerate(slowdown))))
    gradient = gradient_of(problem)
    gradients = {}
    for request, worker in itertools.takewhile(lambda _: simulator.seconds < 4000, simulator.demands(None)):
        if type(request) is Gradient:
            gradients[worker.rank] = gradient(worker)
        else:
            worker.x.add_(gradients[worker.rank], alpha=-learning_rate)
    speeds = 1 / torch.tensor(slowdown, dtype=torch.float64)[:, None]
    weighted = (speeds * problem.a * problem.b).sum(0) / (speeds * problem.a).sum(0)
    mean = stacked(simulator).mean(0)
    # Off by O(learning rate): 0.002 times curvatures up to 2 times staleness and disagreement of order 1 to 10.
    assert float((mean - weighted).abs().max()) < 0.02
    assert float((mean - problem.optimum).abs().max()) > 0.2


def test_on_a_bipartite_graph_only_the_active_half_calls() -> None:
    problem = Quadratic(8)
    simulator = simulate(ADPSGD(BipartiteRing(8), max_pending_steps=1), problem, JITTERED)
    simulator.run(gradient_of(problem), 0.05, 20)
    assert [traffic.exchanges for traffic in simulator.traffic] == [0, 20] * 4
    answered = [traffic.calls_answered for traffic in simulator.traffic]
    assert answered[1::2] == [0] * 4
    assert sum(answered) == 80


def test_peers_are_drawn_evenly_and_by_everyone_for_itself() -> None:
    problem = Quadratic(5)
    simulator = simulate(ADPSGD(), problem)
    simulator.run(gradient_of(problem), 0.0, 500)
    # Each is called by 4 others in a quarter of their 500 steps: 500, standard deviation 19.
    assert all(abs(traffic.calls_answered - 500) < 80 for traffic in simulator.traffic)


def slow_network(algorithm: ADPSGD, steps: int = 60) -> Simulator:
    """Eight equal workers; a model takes two gradients on each link."""
    problem = Quadratic(8)
    cluster = Cluster(compute_seconds=1.0, jitter="lognormal", jitter_scale=0.02, bandwidth_bytes_per_second=20.0)
    simulator = simulate(algorithm, problem, cluster)
    simulator.run(gradient_of(problem), 0.05, steps)
    return simulator


def test_steps_do_not_wait_for_a_slow_network_and_averages_come_as_often_as_it_allows() -> None:
    free, waiting = slow_network(ADPSGD()), slow_network(ADPSGD(max_pending_steps=1))
    compute = 60 * 1.02  # and a little for the slowest of eight
    assert free.workers[0].step == waiting.workers[0].step == 60
    assert all(worker.step == 60 for worker in free.workers)
    exposed = [traffic.exposed_seconds for traffic in free.traffic]
    assert max(exposed) < 0.05 * compute
    assert waiting.seconds > 1.9 * compute
    sent = [traffic.bytes_sent for traffic in free.traffic]
    busy = [2.0 * count / 40 / free.seconds for count in sent]  # of each worker's link
    assert min(busy) > 0.5  # some are called by several at a time, whose own links stand still meanwhile
    assert free.consensus_distance() < 2 * waiting.consensus_distance() + 0.1


def test_a_worker_goes_so_many_steps_without_an_average_and_no_more() -> None:
    """With 3: of 60 steps at least each third has an average of its own, though the network gives one in 4 or more."""
    simulator = slow_network(ADPSGD(Complete, "random", 3))
    assert all(20 <= traffic.exchanges <= 30 for traffic in simulator.traffic)
    assert all(traffic.exposed_seconds > 10 for traffic in simulator.traffic)


def test_partners_in_turn_do_not_share_a_link() -> None:
    """On a bipartite graph the callers call different workers at the same time: a call has a link to itself."""
    averages = {}
    choices: tuple[Partners, ...] = ("random", "rotating")
    for partners in choices:
        simulator = slow_network(ADPSGD(BipartiteExponential(8), partners, 64))
        averages[partners] = sum(traffic.calls_answered for traffic in simulator.traffic)
    assert averages["rotating"] > 1.15 * averages["random"]


def test_what_is_under_way_comes_to_an_end_before_a_checkpoint() -> None:
    simulator = slow_network(ADPSGD(max_pending_steps=64), steps=7)
    assert any("averaging" in worker.state for worker in simulator.workers)
    total = stacked(simulator).sum(0)
    state = simulator.state_dict()
    assert torch.equal(stacked(simulator).sum(0), total)  # it has come back, and what a rest does is to let go of it
    assert all(set(worker["state"]) <= {"arrived", "pending", "turn"} for worker in state["workers"])


@pytest.mark.parametrize(
    ("wrong", "named"), [({"max_pending_steps": 0}, "max_pending"), ({"partners": "x"}, "partners")]
)
def test_bad_hyper_parameters_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        ADPSGD(**wrong)


def test_its_default_graph_fits_the_number_of_workers() -> None:
    graphs = [Complete(1), BipartiteRing(2), Complete(3), BipartiteExponential(4), Complete(7), Exponential(9)]
    for graph in (*graphs, BipartiteExponential(16)):
        assert ADPSGD().resolved(graph.size) == ADPSGD(graph)
    with pytest.raises(ConfigurationError, match="for 5 workers, but 6 take part"):
        ADPSGD(Ring(5)).resolved(6)
