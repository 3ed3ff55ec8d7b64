"""Proved here: Moniqua is its stacked reference, written with the paper's modulo operations, step by step under jitter
and on graphs that change; the mean moves by the mean gradient whatever rounding does; without learning the
workers come as near to each other as the lattice allows, also with one bit; a model beyond theta is an error and not a
wrong average, and one just below is decoded; a theta computed from the largest change of a step is enough for the
worst changes, and hardly more; messages have the stated size and nothing is kept between steps.
"""

from __future__ import annotations

from random import Random

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, gradient_of, simulate, stacked, states

from lightning_decentral.algorithms import MoniquaSGD
from lightning_decentral.errors import ConfigurationError, DecodingError
from lightning_decentral.flat import Vector
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import (
    AbstractTopology,
    AlternatingMatching,
    Complete,
    Exponential,
    OnePeerExponential,
    RandomMatching,
    Ring,
)
from lightning_decentral.worker import Worker

GRAPHS = [Ring(8), Exponential(6), OnePeerExponential(8), RandomMatching(5), AlternatingMatching(6)]
THETA = 8.0  # the quadratic's workers begin up to 5 apart


def rate(step: int) -> float:
    return 0.3 / (1 + step // 7)


def shift(step: int, levels: int) -> float:
    """What all workers draw from the step's number."""
    seed = int(torch.randint(1, 2**62, (), generator=torch.Generator().manual_seed(step)))
    return 2 * THETA / (levels - 1) * Random(seed).random()


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
@pytest.mark.parametrize("levels", [16, 256])
def test_it_is_the_reference_step_by_step_under_jitter(topology: AbstractTopology, levels: int) -> None:
    problem = Quadratic(topology.size)
    reference = methods.moniqua_sgd(
        problem.start, problem.gradient, rate, topology.mixing_matrix, THETA, levels, lambda step: shift(step, levels)
    )
    simulator = simulate(MoniquaSGD(topology, THETA, levels), problem, JITTERED)
    for state in states(simulator, problem, rate, 30):
        # Lattice points are computed in float32: some 1e-7 each, of models of size 1.
        torch.testing.assert_close(state, next(reference), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
@pytest.mark.parametrize(("levels", "step_size"), [(256, 1.0), (4, 0.3)])
def test_the_mean_moves_by_the_mean_gradient_whatever_rounding_does(
    topology: AbstractTopology, levels: int, step_size: float
) -> None:
    problem = Quadratic(topology.size)
    simulator = simulate(MoniquaSGD(topology, THETA, levels, step_size), problem, JITTERED)
    before = problem.start
    for step, state in enumerate(states(simulator, problem, rate, 20)):
        expected = before.mean(0) - rate(step) * problem.gradient(before).mean(0)
        # The points are the same float32 numbers on all workers; only their float64 sums are rounded.
        torch.testing.assert_close(state.mean(0), expected, rtol=0.0, atol=1e-13)
        before = state


@pytest.mark.parametrize(
    ("levels", "step_size", "steps"), [(256, 1.0, 40), (16, 1.0, 40), (4, 0.3, 80), (2, 0.05, 200)]
)
def test_without_learning_workers_come_as_near_as_the_lattice_allows(levels: int, step_size: float, steps: int) -> None:
    problem = Quadratic(4, parameters=50)
    simulator = simulate(MoniquaSGD(Complete(4), THETA, levels, step_size), problem)
    simulator.run(gradient_of(problem), 0.0, steps)
    point = 2 * THETA / (levels - 1)
    # Rounding is off by at most half a step of the lattice, on both sides of a difference; of that the step size.
    assert simulator.consensus_distance() ** 0.5 < 50**0.5 * point * step_size**0.5
    torch.testing.assert_close(stacked(simulator).mean(0), problem.start.mean(0), rtol=0.0, atol=1e-12)


def pair(distance: float) -> Simulator:
    start = [Vector([torch.zeros(5000)]), Vector([torch.zeros(5000)])]
    start[1].buffers[0][4321] = distance
    return Simulator(MoniquaSGD(theta=0.5), start)


def test_a_model_beyond_theta_is_an_error_and_not_a_wrong_average() -> None:
    for distance in (0.51, 1.0, 64.0, -3.0):
        with pytest.raises(DecodingError, match=r"step 0 that differs from its own by more than theta=0.5 .* Go on"):
            pair(distance).run(lambda worker: worker.x.clone(), 0.0, 1)


def test_a_model_just_within_theta_is_averaged() -> None:
    simulator = pair(0.499)
    simulator.run(lambda worker: worker.x.clone(), 0.0, 1)
    for worker in simulator.workers:
        assert float(worker.x.buffers[0][4321]) == pytest.approx(0.2495, abs=1 / 255)  # type: ignore[attr-defined]


def test_messages_have_the_stated_size_and_nothing_is_kept() -> None:
    for levels, bits in ((256, 8), (16, 4), (4, 2), (2, 1)):
        start = [Vector([torch.zeros(8192, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)])] * 4
        simulator = Simulator(MoniquaSGD(Ring(4), levels=levels), [vector.clone() for vector in start])
        simulator.run(lambda worker: worker.x.clone(), 0.0, 3)
        assert [t.bytes_sent for t in simulator.traffic] == [3 * 2 * 2 * (8192 * bits // 8 + 2 * 4)] * 4
        assert [worker.state for worker in simulator.workers] == [{}] * 4


def test_half_precision_is_rounded_to_the_lattice_in_float32() -> None:
    torch.manual_seed(0)
    start = [Vector([torch.rand(600).bfloat16()]) for _ in range(4)]
    simulator = Simulator(MoniquaSGD(Complete(4), theta=1.0), start)
    mean = torch.stack([vector.buffers[0].float() for vector in start]).mean(0)
    simulator.run(lambda worker: worker.x.clone(), 0.0, 3)
    for worker in simulator.workers:
        own = worker.x.buffers[0]  # type: ignore[attr-defined]
        assert own.dtype == torch.bfloat16
        # Half a lattice step of 2 / 255 on each side, and three roundings to 8 bits of numbers below 1.
        torch.testing.assert_close(own.float(), mean, rtol=0.0, atol=2 / 255 + 3 * 2**-9)


@pytest.mark.parametrize("topology", [Ring(5), OnePeerExponential(8), AlternatingMatching(6), Complete(2)], ids=repr)
def test_theta_for_is_enough_for_the_worst_changes_and_hardly_more(topology: AbstractTopology) -> None:
    """Each parameter's changes all push one pair apart, as long as the steps before its exchange allow: 24 steps, after
    which a ring of five has less than 1e-3 of a difference left. Rounding, which theta_for takes at its worst, is a few
    per cent with 256 levels."""
    change, steps, n = 0.01, 24, topology.size
    theta = MoniquaSGD(topology).theta_for(n, change)
    pairs = [pair for pair in topology.edges(steps) if pair[0] != pair[1]]
    same = torch.eye(n, dtype=torch.float64)
    apart = torch.stack([same[i] - same[j] for i, j in pairs])  # [parameters, workers]
    pushes = []  # the last step's first
    for step in reversed(range(steps)):
        pushes.append(-change * apart.sign())
        apart = apart @ topology.mixing_matrix(step)

    def gradient(worker: Worker) -> Vector:
        push = pushes[steps - 1 - worker.step][:, worker.rank] if worker.step < steps else torch.zeros(len(pairs))
        return Vector([push.double()])

    def run(with_theta: float) -> None:
        start = [Vector([torch.zeros(len(pairs), dtype=torch.float64)]) for _ in range(n)]
        Simulator(MoniquaSGD(topology, with_theta), start).run(gradient, 1.0, steps + 1)

    run(theta)
    with pytest.raises(DecodingError):
        run(0.85 * theta)


def test_theta_for_refuses_what_it_cannot_bound() -> None:
    with pytest.raises(ConfigurationError, match=r"largest_change=0, needs a positive number.*learning rate"):
        MoniquaSGD().theta_for(4, 0)
    with pytest.raises(ConfigurationError, match="whose rounds repeat"):
        MoniquaSGD(RandomMatching(4)).theta_for(4, 0.1)
    with pytest.raises(ConfigurationError, match=r"levels=2 .* Use more levels"):
        MoniquaSGD(levels=2).theta_for(4, 0.1)
    assert MoniquaSGD().theta_for(1, 0.1) == 0.1


def test_it_refuses_what_cannot_work() -> None:
    for theta in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigurationError, match=r"needs a positive number, in the units of the"):
            MoniquaSGD(theta=theta)
    with pytest.raises(ConfigurationError, match="levels"):
        MoniquaSGD(levels=3)
    with pytest.raises(ConfigurationError, match=r"consensus_step_size=0.0, needs a number in \(0, 1\]"):
        MoniquaSGD(consensus_step_size=0.0)
    with pytest.raises(ConfigurationError, match="for 5 workers, but 6 take part"):
        MoniquaSGD(Ring(5)).resolved(6)
    assert MoniquaSGD().resolved(2).topology == Complete(2)
