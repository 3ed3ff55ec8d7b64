"""Proved here: SparseLoCo, and DiLoCo, Streaming DiLoCo and local SGD with a compressor, are their stacked reference
step by step under jitter; nothing is lost in a round: what was sent and what is remembered are what was moved; with a
compressor that leaves out nothing they are what they are without; a mean of messages under way is in checkpoints, and
what another number of workers goes on with has the sum of all errors; and what cannot work is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import methods
from reference.runs import JITTERED, buffer_of, equal_start, gradient_of, largest, simulate, stacked, states

from lightning_decentral.algorithms import DiLoCo, LocalSGD, SparseLoCo, StreamingDiLoCo
from lightning_decentral.algorithms.local_updates import AbstractLocalUpdates
from lightning_decentral.compression import FP4, Identity, Int8, RandomBlock, ScaledSign, Threshold, TopK
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.planner import plan
from lightning_decentral.simulation.cluster import Cluster

ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, some ten steps
TOP = TopK(0.4)  # 2 of 5


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (SparseLoCo(5, compressor=TOP), {}),
        (SparseLoCo(3, 0.8, TOP, 0.5), {"outer_rate": 0.8, "error_feedback": 0.5}),
        (DiLoCo(4, 0.6, 0.8, compressor=TOP), {"outer_rate": 0.6, "momentum": 0.8, "error_feedback": 1.0}),
        (
            StreamingDiLoCo(4, fragments=1, delay=2, compressor=TOP),
            {"outer_rate": 0.7, "momentum": 0.9, "error_feedback": 1.0, "local_share": 0.5, "delay": 2},
        ),
        (LocalSGD(4, compressor=TOP), {"outer_rate": 1.0, "error_feedback": 1.0}),
    ],
    ids=str,
)
def test_they_are_the_reference_step_by_step_under_jitter(
    algorithm: AbstractLocalUpdates, options: dict[str, Any]
) -> None:
    problem, every = equal_start(4), algorithm.rounds.every
    reference = methods.sparseloco(
        problem.start,
        problem.gradient,
        rate,
        torch.eye,
        every,
        lambda all: methods.of_messages(all, largest),
        **options,
    )
    for state in states(simulate(algorithm, problem, JITTERED), problem, rate, 40):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_dense_messages_travel_in_parts_and_are_the_reference_step_by_step() -> None:
    problem = equal_start(4, parameters=11)  # parts of 2, 3, 3, 3

    def coarse(rows: torch.Tensor) -> torch.Tensor:
        sign = ScaledSign(bucket=None)
        return torch.stack([sign.decompress(sign.compress(row)) for row in rows])

    for algorithm, options in (
        (DiLoCo(3, 0.6, 0.8, compressor=ScaledSign(bucket=None)), {"outer_rate": 0.6, "momentum": 0.8}),
        (
            StreamingDiLoCo(4, fragments=1, delay=2, compressor=ScaledSign(bucket=None), error_feedback=0.7),
            {"outer_rate": 0.7, "momentum": 0.9, "local_share": 0.5, "delay": 2, "error_feedback": 0.7},
        ),
    ):
        options = {"error_feedback": 1.0} | options
        reference = methods.sparseloco(
            problem.start, problem.gradient, rate, torch.eye, algorithm.every,
            lambda all: methods.in_parts(all, coarse), **options,
        )  # fmt: skip
        for state in states(simulate(algorithm, problem, JITTERED), problem, rate, 40):
            torch.testing.assert_close(state, next(reference), **ROUNDING)


@pytest.mark.parametrize("delay", [0, 1])
def test_what_leaves_out_nothing_changes_nothing(delay: int) -> None:
    problem = equal_start(4)
    for plain, sending in (
        (LocalSGD(6, delay, fragments=2), LocalSGD(6, delay, fragments=2, compressor=Identity())),
        (
            StreamingDiLoCo(6, fragments=2, delay=delay),
            StreamingDiLoCo(6, fragments=2, delay=delay, compressor=Identity()),
        ),
    ):
        runs = (states(simulate(each, problem, JITTERED), problem, rate, 30) for each in (plain, sending))
        for one, other in zip(*runs, strict=True):
            torch.testing.assert_close(one, other, **ROUNDING)


def test_what_is_sent_and_what_is_remembered_are_what_was_moved() -> None:
    problem = equal_start(4, parameters=300)
    for compressor in (RandomBlock(0.1), TOP, ScaledSign(bucket=None)):  # reduced, gathered, in parts
        simulator = simulate(SparseLoCo(1, 1.0, compressor, 1.0), problem)
        for _ in range(5):
            before = [buffer_of(worker.state["global"]).clone() for worker in simulator.workers]
            errors = torch.stack([buffer_of(worker.state["error"]) for worker in simulator.workers])
            moved = -0.1 * problem.gradient(stacked(simulator))
            simulator.run(gradient_of(problem), 0.1, 1)
            left = torch.stack([buffer_of(worker.state["error"]) for worker in simulator.workers])
            applied = buffer_of(simulator.workers[0].state["global"]) - before[0]
            torch.testing.assert_close(applied, (moved - errors + left).mean(0), **ROUNDING)


def test_a_mean_of_messages_under_way_is_in_the_checkpoint() -> None:
    problem, algorithm = equal_start(4), StreamingDiLoCo(6, fragments=2, delay=2, compressor=Int8(stochastic=True))
    uninterrupted, paused, resumed = (simulate(algorithm, problem, JITTERED, seed) for seed in (0, 0, 9))
    uninterrupted.run(gradient_of(problem), 0.1, 25)
    paused.run(gradient_of(problem), 0.1, 7)
    resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
    resumed.run(gradient_of(problem), 0.1, 18)
    assert torch.equal(stacked(resumed), stacked(uninterrupted))


def test_another_number_of_workers_goes_on_with_all_errors_and_the_outer_state() -> None:
    problem, algorithm = equal_start(4), DiLoCo(3, compressor=TOP)
    simulator = simulate(algorithm, problem)
    simulator.run(gradient_of(problem), 0.1, 10)
    before = [worker.state for worker in simulator.workers]
    state = algorithm.regrouped(before)
    mean = torch.stack([buffer_of(each["error"]) for each in before]).mean(0)
    torch.testing.assert_close(buffer_of(state["error"]), mean, **ROUNDING)
    assert torch.equal(buffer_of(state["global"]), buffer_of(before[2]["global"]))
    assert state["outer"] == before[0]["outer"]


def test_it_sends_what_it_says() -> None:
    """64 of 4096 in 14 bits to 7 others, against 2 * 7 / 8 models of 32 bits: 36.5 times less."""
    cluster = Cluster()
    sparse, dense = (plan(each, 8, 4 * 4096 * 1000, cluster) for each in (SparseLoCo(30), DiLoCo(30)))
    assert dense.bytes_per_step / sparse.bytes_per_step == pytest.approx(4096 * 32 * 2 / 8 / (64 * 14), rel=1e-3)
    packed = plan(StreamingDiLoCo(32, compressor=FP4(), error_feedback=0.0), 2, 4_000_000, cluster)
    whole = plan(StreamingDiLoCo(32), 2, 4_000_000, cluster)
    assert whole.bytes_per_step / packed.bytes_per_step == pytest.approx(32 / 4.25, rel=1e-3)
    whole, packed = (plan(LocalSGD(4, compressor=each), 8, 4_000_000, cluster) for each in (None, Int8(bucket=1000)))
    assert whole.bytes_per_step / packed.bytes_per_step == pytest.approx(32 / (8 + 64 / 1000), rel=1e-3)


def test_what_cannot_work_is_refused() -> None:
    for options in ({"outer_learning_rate": 0.0}, {"error_feedback": 1.5}, {"every": 0}, {"compressor": "topk"}):
        with pytest.raises(ConfigurationError, match="needs"):
            SparseLoCo(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no fixed size"):
        DiLoCo(compressor=Threshold(0.1))
    with pytest.raises(ConfigurationError, match="a contraction"):
        simulate(DiLoCo(compressor=Int8(bucket=None, stochastic=True)), equal_start(2, parameters=10**6))
