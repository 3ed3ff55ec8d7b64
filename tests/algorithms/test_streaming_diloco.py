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
    ("delay", "local_share", "published"),
    [
        (
            0,
            0.0,
            [-1, -1, -3, -3, -11, -5, -13, -7, -15, -9, -17, -23, -19, -25, -21, -27, -35, -29, -37, -31, -39, -33],
        ),
        (0, 0.5, [-1, -1, -3, -3, -8, -5, -10, -7, -12, -9, -14, -17, -16, -19, -18, -21, -24.5, -23, -26.5, -25]),
        (1, 0.0, [-1, -1, -3, -3, -7, -5, -9, -7, -11, -9, -13, -19, -15, -21, -17, -23, -27, -25, -29, -27, -31, -29]),
        (1, 0.5, [-1, -1, -3, -3, -6, -5, -8, -7, -10, -9, -12, -15, -14, -17, -16, -19, -21.5, -21, -23.5, -23]),
    ],
)
def test_it_follows_the_trajectories_that_torchft_publishes(
    delay: int, local_share: float, published: list[float]
) -> None:
    """Two workers, two fragments of one value, gradients of 2, outer SGD of rate 2: after each step of pytorch/torchft
    73dafea, ``test_fixtures``, ``test_diloco_mocked_updates_0``, ``_1``, ``_3`` and ``_4``."""
    outer = partial(torch.optim.SGD, lr=2.0)
    start = [Vector([torch.ones(2, dtype=torch.float64)]) for _ in range(2)]
    algorithm = StreamingDiLoCo(6, outer=outer, fragments=2, delay=delay, local_share=local_share, early=True)
    simulator = Simulator(algorithm, start)
    made: list[float] = []
    for _ in range(len(published) // 2):
        simulator.run(lambda _: Vector([torch.full((2,), 2.0, dtype=torch.float64)]), 1.0, 1)
        made += stacked(simulator)[0].tolist()
    assert made == published


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
