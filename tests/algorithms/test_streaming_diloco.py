"""Proved here: Streaming DiLoCo is its stacked reference step by step under jitter; with one fragment and no delay it
is DiLoCo; it follows torchft's published trajectory; a mean that is under way survives a checkpoint; no step sends more
than a fragment; a mean that takes less than the delay costs no time; and fragments by layer are whole layers, of which
there must be enough."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import Strategy
from reference import methods
from reference.runs import JITTERED, equal_start, gradient_of, simulate, stacked, states
from torch import nn

from lightning_decentral import GossipStrategy, SimulatedStrategy
from lightning_decentral.algorithms import DiLoCo, StreamingDiLoCo
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import FlatParameters, Vector, layers_of
from lightning_decentral.planning.planner import plan
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator

ROUNDING = {"rtol": 0.0, "atol": 1e-14}  # float64, values around 1, some ten steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


@pytest.mark.parametrize(
    "options",
    [
        {"every": 9, "fragments": 3, "delay": 2},
        {"every": 10, "fragments": 3, "delay": 1, "local_share": 0.0},
        {"every": 4, "fragments": 1, "delay": 3, "local_share": 0.75},
    ],
    ids=str,
)
def test_it_is_the_reference_step_by_step_under_jitter(options: dict[str, Any]) -> None:
    problem = equal_start(4, parameters=11)
    reference = methods.streaming_diloco(problem.start, problem.gradient, rate, torch.eye, **options)
    for state in states(simulate(StreamingDiLoCo(**options), problem, JITTERED), problem, rate, 50):
        torch.testing.assert_close(state, next(reference), **ROUNDING)


def test_one_fragment_without_delay_is_diloco() -> None:
    problem = equal_start(4)
    streaming = states(simulate(StreamingDiLoCo(4, fragments=1, delay=0), problem), problem, rate, 30)
    for one, other in zip(streaming, states(simulate(DiLoCo(4), problem), problem, rate, 30), strict=True):
        assert torch.equal(one, other)


def test_what_is_under_way_survives_a_checkpoint() -> None:
    problem, algorithm = equal_start(4), StreamingDiLoCo(9, fragments=3, delay=2)
    for pause in (3, 4, 5, 11):
        uninterrupted, paused, resumed = (simulate(algorithm, problem, JITTERED, seed) for seed in (0, 0, 9))
        uninterrupted.run(gradient_of(problem), 0.1, 25)
        paused.run(gradient_of(problem), 0.1, pause)
        resumed.load_state_dict(copy.deepcopy(paused.state_dict()))
        resumed.run(gradient_of(problem), 0.1, 25 - pause)
        assert torch.equal(stacked(resumed), stacked(uninterrupted))


def test_a_mean_within_the_delay_costs_no_time() -> None:
    """A fragment of 25 MB takes 1.75 s on this link, the delay of 8 steps 2 s; and DiLoCo waits for 7 s in 32 steps."""
    cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=25e6)
    streaming = StreamingDiLoCo(every=36, fragments=4, delay=8)
    hidden = plan(streaming, workers=8, model_bytes=100_000_000, cluster=cluster)
    waiting = plan(DiLoCo(every=36), workers=8, model_bytes=100_000_000, cluster=cluster)
    assert hidden.bytes_per_step == pytest.approx(waiting.bytes_per_step)
    assert hidden.seconds_per_step == pytest.approx(0.25, rel=1e-3)
    assert waiting.seconds_per_step == pytest.approx(0.25 + 7 / 36, rel=1e-3)


def test_a_delay_as_long_as_a_fragments_turn_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="less than every / fragments = 8 steps"):
        StreamingDiLoCo(every=32, fragments=4, delay=8)


@pytest.mark.parametrize(
    ("delay", "local_share", "first", "second", "common"),
    [
        (
            0,
            0.0,
            [-1, -3, -11, -13, -15, -17, -19, -21, -35, -37, -39, -41, -43, -45, -59],
            [-1, -3, -5, -7, -9, -23, -25, -27, -29, -31, -33, -47, -49, -51, -53],
            {3: [-11, 1], 6: [-11, -23], 9: [-35, -23], 12: [-35, -47]},
        ),
        (
            0,
            0.5,
            [-1, -3, -8, -10, -12, -14, -16, -18, -24.5, -26.5, -28.5, -30.5, -32.5, -34.5, -40.25],
            [-1, -3, -5, -7, -9, -17, -19, -21, -23, -25, -27, -32, -34, -36, -38],
            {3: [-11, 1], 6: [-11, -23], 9: [-29, -23], 12: [-29, -35]},
        ),
        (
            1,
            0.0,
            [-1, -3, -7, -9, -11, -13, -15, -17, -27, -29, -31, -33, -35, -37, -47],
            [-1, -3, -5, -7, -9, -19, -21, -23, -25, -27, -29, -39, -41, -43, -45],
            {3: [-7, 1], 6: [-7, -19], 9: [-27, -19], 12: [-27, -39]},
        ),
        (
            1,
            0.5,
            [-1, -3, -6, -8, -10, -12, -14, -16, -21.5, -23.5, -25.5, -27.5, -29.5, -31.5, -35.75],
            [-1, -3, -5, -7, -9, -15, -17, -19, -21, -23, -25, -29, -31, -33, -35],
            {3: [-7, 1], 6: [-7, -19], 9: [-25, -19], 12: [-25, -31]},
        ),
    ],
)
def test_it_follows_the_trajectories_that_torchft_publishes(
    delay: int, local_share: float, first: list[float], second: list[float], common: dict[int, list[float]]
) -> None:
    """Two workers, two fragments of one value, gradients of 2, outer SGD of rate 2: all that torchft (at 73dafea) has
    in ``test_fixtures``, ``test_diloco_mocked_updates_0``, ``_1``, ``_3`` and ``_4``: both values after each step, and
    those of the common model where one has changed. In ``_2`` and ``_5`` (``fragment_update_alpha=1``) what is received
    never reaches a model."""
    outer = partial(torch.optim.SGD, lr=2.0)
    start = [Vector([torch.ones(2, dtype=torch.float64)]) for _ in range(2)]
    algorithm = StreamingDiLoCo(6, outer=outer, fragments=2, delay=delay, local_share=local_share, early=True)
    simulator = Simulator(algorithm, start)
    for step, published in enumerate(zip(first, second, strict=True), 1):
        simulator.run(lambda _: Vector([torch.full((2,), 2.0, dtype=torch.float64)]), 1.0, 1)
        assert stacked(simulator).tolist() == [list(published)] * 2, step
        if step in common:
            for worker in simulator.workers:
                assert worker.state["global"].buffers[0].tolist() == common[step], step


def test_a_worker_that_goes_on_with_its_own_alone_is_refused() -> None:
    for early in (False, True):
        with pytest.raises(ConfigurationError, match=r"local_share=1.0\): needs a share in \[0, 1\).* train alone"):
            StreamingDiLoCo(6, fragments=2, delay=1, local_share=1.0, early=early)


@pytest.mark.parametrize("fragments", [2, 4, 8])
def test_no_step_sends_more_than_a_fragment(fragments: int) -> None:
    problem = equal_start(4, parameters=80)

    def peak(algorithm: AbstractAlgorithm) -> int:
        simulator, before, most = simulate(algorithm, problem), 0, 0
        for _ in range(40):
            simulator.run(gradient_of(problem), 0.1, 1)
            sent = simulator.traffic[0].bytes_sent
            before, most = sent, max(most, sent - before)
        return most

    assert peak(StreamingDiLoCo(8, fragments=fragments, delay=0)) * fragments <= peak(DiLoCo(8))


def test_fragments_by_layer_are_whole_layers_of_nearly_equal_size() -> None:
    inner = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    net = nn.Sequential(nn.Linear(3, 5), inner, nn.LayerNorm(4), nn.Linear(4, 2))  # 20, 24, 8 and 10 parameters
    parameters = list(net.parameters())
    x = FlatParameters(parameters, layers_of(net, parameters)).x
    assert x.borders == (20, 44, 52)
    assert [part.numel for part in x.slices(3, x.borders)] == [20, 24, 18]
    algorithm = StreamingDiLoCo(every=2, fragments=2, delay=0, local_share=0.0, by_layer=True)
    simulator = Simulator(algorithm, [x.clone(), x.clone()])
    simulator.run(lambda worker: Vector([torch.full((62,), float(worker.rank))]), 0.1, 1)
    one, other = (worker.x.buffers[0] for worker in simulator.workers)  # type: ignore[attr-defined]
    assert (one == other).tolist() == [True] * 20 + [False] * 42  # one ends after 20 parameters, and not after 31
    with pytest.raises(ConfigurationError, match=r"4 layers .* 5 fragments"):
        Simulator(StreamingDiLoCo(every=5, fragments=5, delay=0, by_layer=True), [x.clone(), x.clone()])


@pytest.mark.parametrize("strategy", [GossipStrategy, SimulatedStrategy])
def test_a_model_with_fewer_layers_than_fragments_is_refused(strategy: Callable[..., Strategy], tmp_path: Path) -> None:
    algorithm = StreamingDiLoCo(every=8, fragments=2, delay=0, by_layer=True)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "default_root_dir": tmp_path}
    trainer = Trainer(strategy=strategy(algorithm), logger=False, enable_progress_bar=False, **options)
    with pytest.raises(ConfigurationError, match=r"1 layers .* whole layers"):
        trainer.fit(BoringModel())
