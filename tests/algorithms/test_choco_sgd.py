"""Proved here: CHOCO-SGD is its stacked reference step by step under jitter, for a sparse, a random and a one-bit
compressor; with a lossless one and step size 1 it is D-PSGD; the mean moves by the mean gradient whatever is lost; the
pulls add up to zero and are those of the public copies; gossip with a fifth of the values reaches consensus; messages
are as small as the compressor says; half precision is compressed in float32; graphs, compressors and step sizes that
cannot work are refused, and non-finite models are reported.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import JITTERED, gradient_of, largest, simulate, stacked, states
from torch import Tensor

from lightning_decentral.algorithms import DPSGD, ChocoSGD
from lightning_decentral.compression import (
    AbstractCompressor,
    Identity,
    Int8,
    Lattice,
    RandomK,
    ScaledSign,
    SignSGD,
    Threshold,
    TopK,
)
from lightning_decentral.errors import CompressionError, ConfigurationError, TopologyError
from lightning_decentral.flat import Vector
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import (
    AbstractTopology,
    Complete,
    Exponential,
    HypercubeMatching,
    OnePeerExponential,
    RandomMatching,
    Ring,
    Star,
)

GRAPHS = [Ring(8), Star(5), Exponential(6)]
ROUNDING = {"rtol": 0.0, "atol": 1e-13}  # float64, values around 1, 40 steps


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


def sign(x: Tensor) -> Tensor:
    """Signs times the mean magnitude, which travels in float32."""
    return torch.where(x >= 0, 1.0, -1.0) * x.float().abs().double().mean(1, keepdim=True).float().double()


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
@pytest.mark.parametrize(
    ("compressor", "compress", "tolerance"),
    [
        (TopK(0.4), largest, 1e-13),
        (ScaledSign(), sign, 1e-5),  # means are rounded to float32, in another order
        (Identity(), lambda x: x, 1e-13),
    ],
    ids=["topk", "sign", "identity"],
)
def test_it_is_the_reference_step_by_step_under_jitter(
    topology: AbstractTopology, compressor: AbstractCompressor, compress: Callable[[Tensor], Tensor], tolerance: float
) -> None:
    problem = Quadratic(topology.size)
    reference = methods.choco_sgd(problem.start, problem.gradient, rate, topology.mixing_matrix, 0.3, compress)
    simulator = simulate(ChocoSGD(topology, compressor, 0.3), problem, JITTERED)
    for state in states(simulator, problem, rate, 40):
        torch.testing.assert_close(state, next(reference), rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("topology", GRAPHS, ids=repr)
def test_without_loss_it_is_dpsgd(topology: AbstractTopology) -> None:
    """Adapt while combine: the gradient is taken before the averaging."""
    problem = Quadratic(topology.size)
    ours = states(simulate(ChocoSGD(topology, Identity()), problem), problem, rate, 40)
    dpsgd = states(simulate(DPSGD(topology), problem), problem, rate, 40)
    for state, expected in zip(ours, dpsgd, strict=True):
        torch.testing.assert_close(state, expected, **ROUNDING)


@pytest.mark.parametrize(
    ("compressor", "step_size"),
    [(Int8(), 1.0), (Int8(stochastic=True), 1.0), (ScaledSign(), 0.4), (TopK(0.2), 0.2), (RandomK(0.2), 0.2)],
    ids=repr,
)
def test_the_mean_moves_by_the_mean_gradient_whatever_is_lost(compressor: AbstractCompressor, step_size: float) -> None:
    problem = Quadratic(8)
    simulator = simulate(ChocoSGD(Ring(8), compressor, step_size), problem, JITTERED)
    before = problem.start
    for step, state in enumerate(states(simulator, problem, rate, 30)):
        expected = before.mean(0) - rate(step) * problem.gradient(before).mean(0)
        torch.testing.assert_close(state.mean(0), expected, **ROUNDING)
        before = state
        public, pull = remembered(simulator)
        torch.testing.assert_close(pull.sum(0), torch.zeros(5, dtype=torch.float64), **ROUNDING)
        torch.testing.assert_close(pull, Ring(8).mixing_matrix() @ public - public, **ROUNDING)


def remembered(simulator: Simulator) -> tuple[Tensor, Tensor]:
    """Public copies and pulls, [workers, parameters]."""
    public, pull = (torch.stack([w.state[key].buffers[0] for w in simulator.workers]) for key in ("public", "pull"))
    return public, pull


@pytest.mark.parametrize(
    ("compressor", "step_size", "steps", "remains"),
    [(TopK(0.2), 0.2, 400, 1e-3), (Int8(), 1.0, 60, 1e-9)],
    ids=repr,
)
def test_gossip_reaches_consensus_however_coarse_the_messages(
    compressor: AbstractCompressor, step_size: float, steps: int, remains: float
) -> None:
    problem = Quadratic(5, parameters=50)
    simulator = simulate(ChocoSGD(Ring(5), compressor, step_size), problem)
    before, mean = simulator.consensus_distance(), problem.start.mean(0)
    simulator.run(gradient_of(problem), 0.0, steps)
    assert simulator.consensus_distance() < remains**2 * before  # squared distances
    torch.testing.assert_close(stacked(simulator).mean(0), mean, rtol=0.0, atol=1e-12)


def test_sending_compressed_models_instead_would_not() -> None:
    """What the public copies are for: x <- x + gamma (W - I) C(x) stalls at the error of C."""
    problem = Quadratic(5, parameters=50)
    x, mixing = problem.start.clone(), Ring(5).mixing_matrix()
    before = float((x - x.mean(0)).square().sum())
    for _ in range(400):
        keep = x.abs().topk(10, 1).indices
        coarse = torch.zeros_like(x).scatter(1, keep, x.gather(1, keep))
        x = x + 0.2 * (mixing @ coarse - coarse)
    assert float((x - x.mean(0)).square().sum()) > 0.1**2 * before


def test_a_message_has_the_bytes_of_the_compressor() -> None:
    start = [Vector([torch.randn(1000), torch.randn(300, dtype=torch.bfloat16)]) for _ in range(8)]
    for compressor, step_size in ((Int8(), 1.0), (ScaledSign(), 0.4), (TopK(0.01), 0.05)):
        simulator = Simulator(ChocoSGD(Ring(8), compressor, step_size), start)
        simulator.run(lambda worker: worker.x.clone(), 0.0, 3)
        expected = 3 * 2 * (compressor.num_bits(1000) + compressor.num_bits(300)) // 8
        assert [traffic.bytes_sent for traffic in simulator.traffic] == [expected] * 8


def test_half_precision_is_compressed_and_remembered_in_float32() -> None:
    torch.manual_seed(0)
    start = [Vector([torch.randn(600).bfloat16()]) for _ in range(4)]
    simulator = Simulator(ChocoSGD(Ring(4)), start)
    before = simulator.consensus_distance()
    simulator.run(lambda worker: worker.x.clone(), 0.0, 40)
    for worker in simulator.workers:
        assert [b.dtype for key in ("public", "pull") for b in worker.state[key].buffers] == [torch.float32] * 2
        assert worker.x.buffers[0].dtype == torch.bfloat16  # type: ignore[attr-defined]
    # A model is rounded to 8 bits once per step: 2^-9 of values around 0.5.
    assert simulator.consensus_distance() < (2**-8) ** 2 * before


def test_it_refuses_graphs_that_change() -> None:
    for topology in (OnePeerExponential(8), HypercubeMatching(8), RandomMatching(8)):
        with pytest.raises(TopologyError, match=r"stays the same, got .*, changing with the step: a neighbour knows"):
            ChocoSGD(topology)


def test_it_refuses_what_is_no_contraction() -> None:
    with pytest.raises(ConfigurationError, match=r"Threshold\(threshold=1.0\), whose messages have no fixed size"):
        ChocoSGD(compressor=Threshold(1.0))
    start = [Vector([torch.zeros(1000)]) for _ in range(4)]
    for compressor in (SignSGD(), RandomK(0.01, scaled=True), Lattice(0.1)):
        with pytest.raises(ConfigurationError, match=r"needs a contraction, below 1. Use Int8"):
            Simulator(ChocoSGD(compressor=compressor, consensus_step_size=0.1), start)


def test_a_coarse_compressor_needs_a_step_size() -> None:
    with pytest.raises(ConfigurationError, match=r"TopK.* without a consensus_step_size, needs one .* Begin with"):
        ChocoSGD(compressor=TopK(0.01))
    for step_size in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigurationError, match=r"needs a number in \(0, 1\]"):
            ChocoSGD(consensus_step_size=step_size)


def test_its_defaults_fit_the_number_of_workers() -> None:
    assert ChocoSGD().resolved(2) == ChocoSGD(Complete(2), Int8(), 1.0)
    assert ChocoSGD().resolved(8) == ChocoSGD(Ring(8), Int8(), 1.0)
    with pytest.raises(ConfigurationError, match="for 5 workers, but 6 take part"):
        ChocoSGD(Ring(5)).resolved(6)


def test_a_model_that_is_not_finite_is_reported() -> None:
    start = [Vector([torch.full((4,), float("nan"))]) for _ in range(3)]
    with pytest.raises(CompressionError, match="got 4 NaN"):
        Simulator(ChocoSGD(), start).run(lambda worker: worker.x.clone(), 0.0, 1)
