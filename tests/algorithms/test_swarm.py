"""Proved here: SwarmSGD is its event-driven stacked reference update by update; whatever is rounded, refused or
overtaken, the sum over the workers moves by the updates alone; what cannot be read is noticed, repaired and counted; in
the blocking form both of a meeting have ended their round; in 8 bits, with H = 4, it sends at most 1/14 of AD-PSGD's
bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, buffer_of, equal_start, gradient_of, simulate, stacked
from torch import Tensor

from lightning_decentral.algorithms import ADPSGD, Swarm
from lightning_decentral.averaging import LatticePairs
from lightning_decentral.errors import CompressionError, ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import BipartiteRing, Complete, Exponential, Ring
from lightning_decentral.worker import Worker

SLOWDOWN = [1.0, 1.37, 2.11, 0.83, 5.03, 1.71]  # no two updates happen at the same time


def rate(step: int) -> float:
    return 0.3 / (1 + step // 5)


def updates(simulator: Simulator, problem: Quadratic, rate: Callable[[int], float], steps: int | None) -> Any:
    """Drive a simulation; yield each update, before and after it is made."""
    gradient, gradients = gradient_of(problem), {}
    for request, worker in simulator.demands(steps):
        if type(request) is Gradient:
            gradients[worker.rank] = gradient(worker)
            continue
        yield None
        change = buffer_of(gradients[worker.rank]) * -rate(worker.step)
        buffer_of(worker.x).add_(change)
        yield change


def mass(simulator: Simulator) -> Tensor:
    """What all shared copies have, and what was not shared yet."""
    states = [(worker.state, buffer_of(worker.x)) for worker in simulator.workers]
    return sum(buffer_of(state["shared"]) + x - buffer_of(state["began"]) for state, x in states)  # type: ignore[return-value]


@pytest.mark.parametrize("topology", [Complete(6), Ring(6), Exponential(6)], ids=repr)
def test_it_is_the_reference_update_by_update(topology: Any) -> None:
    problem, algorithm = Quadratic(6), Swarm(topology, every=3, levels=None)
    simulator = simulate(algorithm, problem, Cluster(compute_seconds=1.0, slowdown=dict(enumerate(SLOWDOWN))), seed=7)
    peers = [algorithm.peers(rank) for rank in range(6)]
    reference = methods.swarm(problem.start, problem.gradient, rate, peers, SLOWDOWN, seed=7, every=3)
    expected = problem.start
    for number, change in enumerate(updates(simulator, problem, rate, None)):
        if change is None:  # the step before has come to its end
            # Float64, values around 1, 200 updates that contract.
            torch.testing.assert_close(stacked(simulator), expected, rtol=0.0, atol=1e-13)
            expected = next(reference)
        if number == 400:
            break


@pytest.mark.parametrize(
    "algorithm",
    [
        Swarm(),
        Swarm(levels=16, every=2),
        Swarm(levels=None, geometric=True),
        Swarm(blocking=True),
        Swarm(Ring, blocking=True, geometric=True, levels=None),
        Swarm(BipartiteRing, every=1),
    ],
    ids=repr,
)
def test_the_sum_moves_by_the_updates_alone(algorithm: Swarm) -> None:
    """From models far apart: the first meetings are refused, and repaired. Calls cross, and overtake each other."""
    problem = Quadratic(8)
    simulator = simulate(algorithm, problem, JITTERED, seed=3)
    total = problem.start.sum(0)
    for change in updates(simulator, problem, lambda step: 0.05, 60):
        total = total if change is None else total + change
    simulator.rest()
    torch.testing.assert_close(stacked(simulator).sum(0), total, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(mass(simulator), total, rtol=0.0, atol=1e-12)
    repaired = [worker.state["repaired"] for worker in simulator.workers]
    assert (sum(repaired) > 0) == (algorithm.levels is not None)
    if algorithm.levels == 256:
        assert sum(repaired) < 0.2 * sum(traffic.exchanges for traffic in simulator.traffic)


def test_rounding_keeps_the_workers_no_farther_apart() -> None:
    spread = {None: 0.0, 256: 0.0}
    for levels in spread:
        problem = equal_start(8, parameters=100)
        simulator = simulate(Swarm(levels=levels), problem, Cluster(jitter="lognormal", jitter_scale=0.1))
        simulator.run(gradient_of(problem), 0.05, 40)
        for _ in range(40):
            simulator.run(gradient_of(problem), 0.05, 4)
            spread[levels] += simulator.consensus_distance() / 40
    # Rounding adds about (1/32)^2 / 12 of a squared distance at each meeting; who meets whom is drawn anew.
    assert spread[256] == pytest.approx(spread[None], rel=0.1)


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_two_move_by_the_same_steps_or_not_at_all(levels: int) -> None:
    pairs, read = LatticePairs(levels, margin=2.0), 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        a = Vector([torch.randn(5000, generator=generator, dtype=torch.float64), torch.zeros(0)])
        far = 4.0 ** ((seed % 5) - 2)  # of what is expected
        b = a.clone()
        b.buffers[0].add_(torch.rand(5000, generator=generator, dtype=torch.float64) * 2 - 1, alpha=0.01 * far)
        one, other = (Worker(rank, 2, x, x) for rank, x in enumerate((a, b)))
        one.seed(seed)
        before = a.clone(), b.clone()
        opened = pairs.opened(one, a, expected=0.01)
        reply, apart = pairs.answer_(other, b, opened.vector)
        assert pairs.close_(a, opened, reply) == apart
        if apart is None:
            assert far > 1
            assert torch.equal(a.buffers[0], before[0].buffers[0])
            assert torch.equal(b.buffers[0], before[1].buffers[0])
            continue
        read += 1
        step = opened.lattice.step
        assert far <= 4
        assert apart == pytest.approx(0.01 * far, abs=1.1 * step)
        moved, back = (x.buffers[0] - was.buffers[0] for x, was in zip((a, b), before, strict=True))
        torch.testing.assert_close(moved, -back, rtol=0.0, atol=1e-15)
        due = (before[1].buffers[0] - before[0].buffers[0]) / 2
        assert float((moved - due).abs().max()) <= step * (0.5 + 1e-3)  # each is rounded by half a step at most
    assert 24 <= read < 60


def test_what_is_not_finite_is_refused_by_name() -> None:
    problem = equal_start(4)
    simulator = simulate(Swarm(every=1), problem)
    with pytest.raises(CompressionError, match=r"Worker \d in step \d+: .*NaN"):
        simulator.run(lambda worker: Vector([problem.start[0] * torch.nan]), 0.1, 5)


def test_nobody_waits_for_a_slow_worker_and_in_the_blocking_form_its_partners_do() -> None:
    seconds = {}
    for blocking in (False, True):
        cluster = Cluster(compute_seconds=1.0, slowdown={3: 10.0}, bandwidth_bytes_per_second=1e6)
        problem = Quadratic(4)
        simulator = simulate(Swarm(blocking=blocking), problem, cluster)
        for request, worker in simulator.demands(200):
            if worker.rank != 3 and worker.step == 199 and type(request) is not Gradient:
                seconds[blocking] = simulator.seconds
                break
    assert seconds[False] < 1.01 * 200
    assert seconds[True] > 2 * seconds[False]


def test_rounds_are_fixed_or_geometric() -> None:
    for geometric in (False, True):
        problem = Quadratic(4, parameters=1)
        simulator = simulate(Swarm(geometric=geometric, every=4, levels=None), problem)
        simulator.run(gradient_of(problem), 0.0, 800)
        meetings = [traffic.exchanges for traffic in simulator.traffic]
        if geometric:  # 200, with a standard deviation of 12 for each worker
            assert all(abs(count - 200) < 60 for count in meetings)
            assert len(set(meetings)) > 1
        else:
            assert meetings == [200] * 4


def test_it_sends_a_fourteenth_of_the_bytes_of_adpsgd() -> None:
    sent = {}
    for algorithm in (ADPSGD(Complete), Swarm()):
        problem = equal_start(8, parameters=10_000)
        problem.start = problem.start.float()
        simulator = simulate(algorithm, problem, Cluster(jitter="lognormal", jitter_scale=0.1))
        simulator.run(lambda worker: Vector([worker.snapshot.buffers[0] - worker.rank]), 0.05, 40)  # type: ignore[attr-defined]
        sent[type(algorithm)] = sum(traffic.bytes_sent for traffic in simulator.traffic)
    assert sent[Swarm] * 14 <= sent[ADPSGD]  # also with what had to be repaired


def test_bad_numbers_are_refused() -> None:
    for wrong, named in (({"every": 0}, "every=0"), ({"levels": 2}, "levels"), ({"margin": 0.5}, "margin=0.5")):
        with pytest.raises(ConfigurationError, match=named):
            Swarm(**wrong)
