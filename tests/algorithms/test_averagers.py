"""Proved here: method and averager are a product. D-PSGD with CHOCO's messages is CHOCO-SGD and with Moniqua's it is
Moniqua, bit for bit; D2 with CHOCO's is its stacked reference and reaches the optimum on every worker whatever is lost,
with Moniqua's it comes as near as its lattice allows; what D2 keeps without a mean stays so in float32 over a long run;
messages have the compressor's bytes; what cannot work is refused; what a worker remembers has the names that it had
before averagers were exchangeable, and methods are printed as in the checkpoints of that time; messages decoded
piece by piece add what they stand for, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.names import told
from reference.quadratic import Quadratic
from reference.runs import JITTERED, equal_start, gradient_of, settled, simulate, stacked, states
from torch import Tensor

from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, ChocoSGD, MoniquaSGD
from lightning_decentral.averaging import AbstractAverager, Choco, Gossip, Moniqua
from lightning_decentral.averaging.messages import compressed, compressed_in_pieces
from lightning_decentral.compression import AbstractCompressor, Identity, Int8, RandomK, ScaledSign, TopK
from lightning_decentral.errors import CompressionError, ConfigurationError, TopologyError
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import Complete, FromGraph, OnePeerExponential, Ring, Star
from lightning_decentral.worker import Worker

LAZY = partial(Ring, lazy=True)


def rate(step: int) -> float:
    return 0.4 / (1 + step // 7)


SAME: list[tuple[AbstractAlgorithm, AbstractAlgorithm]] = [
    (DPSGD(Ring, Choco()), ChocoSGD()),
    (DPSGD(Ring, Choco(TopK(0.4), 0.3)), ChocoSGD(Ring(6), TopK(0.4), 0.3)),
    (DPSGD(Star, Choco(RandomK(0.4), 0.2)), ChocoSGD(Star(6), RandomK(0.4), 0.2)),
    (DPSGD(averager=Moniqua(8.0)), MoniquaSGD(theta=8.0)),
    (DPSGD(Ring, Moniqua(8.0, 16, 0.7)), MoniquaSGD(Ring(6), 8.0, 16, 0.7)),
    (DPSGD(averager=Gossip()), DPSGD()),
    (D2(averager=Gossip()), D2()),
]


@pytest.mark.parametrize(("product", "named"), SAME, ids=repr)
def test_the_named_methods_are_products(product: AbstractAlgorithm, named: AbstractAlgorithm) -> None:
    problem = Quadratic(6)
    ours, theirs = (simulate(algorithm, problem, JITTERED) for algorithm in (product, named))
    for state, expected in zip(states(ours, problem, rate, 30), states(theirs, problem, rate, 30), strict=True):
        assert torch.equal(state, expected)
    for worker, other in zip(ours.workers, theirs.workers, strict=True):
        assert worker.state.keys() == other.state.keys()
        for name, value in worker.state.items():
            assert torch.equal(value.buffers[0], other.state[name].buffers[0])
    assert ours.traffic == theirs.traffic


@pytest.mark.parametrize("graph", [LAZY, Ring, Star], ids=["lazy", "ring", "star"])
def test_d2_with_choco_is_its_reference_step_by_step(graph: Any) -> None:
    problem, step_size = Quadratic(5), 0.7
    mixing, x = graph(5).mixing_matrix(), problem.start.clone()
    correction, public = torch.zeros_like(x), torch.zeros_like(x)
    simulator = simulate(D2(graph, Choco(TopK(0.8), step_size)), problem, JITTERED)
    for step, state in enumerate(states(simulator, problem, rate, 40)):
        sent = x - rate(step) * problem.gradient(x) + correction
        public += four_largest(sent - public)
        pull = step_size * (mixing @ public - public)
        correction, x = correction + pull, sent + pull
        torch.testing.assert_close(state, x, rtol=0.0, atol=1e-12)  # D2 is an integrator: it remembers its rounding


@pytest.mark.parametrize(
    ("graph", "averager"),
    [(LAZY, Choco()), (Ring, Choco(TopK(0.8), 0.7))],
    ids=repr,
)
def test_d2_with_choco_reaches_the_optimum_whatever_is_lost(graph: Any, averager: Choco) -> None:
    """Workers of other curvature and other data; two learning rates, of which D-PSGD has two fixed points."""
    problem = equal_start(5)
    simulator = simulate(D2(graph, averager), problem)
    for learning_rate in (0.3, 0.15):
        assert float((settled(simulator, problem, learning_rate, 250) - problem.optimum).abs().max()) < 1e-9
    simulator = simulate(DPSGD(graph, averager), problem)
    simulator.run(gradient_of(problem), 0.15, 100)
    assert float((stacked(simulator) - problem.optimum).abs().max()) > 0.1


def test_d2_with_moniqua_comes_as_near_as_its_lattice() -> None:
    problem, averager = equal_start(8), Moniqua(theta=4.0)
    simulator = simulate(D2(averager=averager), problem)
    simulator.run(gradient_of(problem), 0.15, 150)
    assert float((stacked(simulator) - problem.optimum).abs().max()) < 2 * averager.lattice.step
    correction = torch.stack([worker.state["correction"].buffers[0] for worker in simulator.workers])
    assert float(correction.mean(0).abs().max()) < 1e-12  # float64: a difference of two lattice points is added twice


@pytest.mark.parametrize(
    ("averager", "dtype"), [(Choco(), torch.float32), (Choco(TopK(0.8), 0.5), torch.bfloat16)], ids=told
)
def test_what_d2_keeps_without_a_mean_stays_so_over_a_long_run(averager: Choco, dtype: torch.dtype) -> None:
    """Sums of sums: in float32 the errors of the pulls, added up, would be 100 times what is allowed here."""
    generator, steps, count = torch.Generator().manual_seed(0), 300, 50
    targets = torch.randn(4, count, generator=generator)
    simulator = Simulator(D2(LAZY, averager), [Vector([row.to(dtype)]) for row in targets])

    def gradient(worker: Any) -> Vector:
        noise = torch.randn(count, generator=generator)
        return Vector([(worker.x.buffers[0].float() - targets[worker.rank] + noise).to(dtype)])

    simulator.run(gradient, 0.02, steps)
    correction, pull = (
        torch.stack([worker.state[name].buffers[0] for worker in simulator.workers]) for name in ("correction", "pull")
    )
    assert (correction.dtype, pull.dtype) == (torch.float32, torch.float64)
    # Roundings of the corrections, of half a unit in the last place at most, with random signs.
    chance = torch.finfo(torch.float32).eps / 4 / 3**0.5 * steps**0.5
    assert rms(correction.double().mean(0)) < 4 * float(correction.abs().max()) * chance
    assert rms(pull.mean(0)) < 1e-13 * float(pull.abs().max()) * steps**0.5


def four_largest(x: Tensor) -> Tensor:
    """All but the smallest of each worker's 5 values."""
    return x.scatter(1, x.abs().argmin(1, keepdim=True), 0.0)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_messages_of_d2_are_as_small_as_the_compressor_says() -> None:
    start = [Vector([torch.randn(1000)]) for _ in range(4)]
    for compressor, step_size in ((Int8(), 1.0), (TopK(0.8), 0.5)):
        simulator = Simulator(D2(averager=Choco(compressor, step_size)), start)
        simulator.run(lambda worker: worker.x.clone(), 0.0, 3)
        expected = 3 * 2 * compressor.num_bits(1000) // 8
        assert [traffic.bytes_sent for traffic in simulator.traffic] == [expected] * 4


def test_d2_refuses_messages_that_come_late() -> None:
    averagers = [Choco(ScaledSign(), 0.1), Choco(TopK(0.2), 0.1), Choco(TopK(0.7), 0.5), Choco(RandomK(0.5), 0.1)]
    for averager in averagers:
        with pytest.raises(ConfigurationError, match=r"D2 got averager=.*steps late, needs less than 1: .* Int8\(\)"):
            D2(averager=averager)
    D2(averager=Choco(TopK(0.76), 0.5))


@pytest.mark.parametrize("step_size", [0.02, 0.1, 0.3])
def test_what_it_refuses_would_diverge_at_every_step_size(step_size: float) -> None:
    """Signs: smaller steps swing more slowly, and as far."""
    problem, mixing, sizes = equal_start(8, parameters=50), Ring(8, lazy=True).mixing_matrix(), []
    x, correction, public = problem.start.clone(), torch.zeros(8, 50).double(), torch.zeros(8, 50).double()
    for _ in range(4000):
        sent = x - 0.002 * problem.gradient(x) + correction
        change = sent - public
        public += change.sign() * change.abs().mean(1, keepdim=True)
        pull = step_size * (mixing @ public - public)
        correction, x = correction + pull, sent + pull
        sizes.append(float((x - x.mean(0)).abs().max()))
    assert not max(sizes[2000:]) < 10 * max(sizes[:100])


def test_one_worker_hears_nobody() -> None:
    averagers: list[AbstractAverager] = [Gossip(), Choco(), Moniqua()]
    for averager in averagers:
        problem = Quadratic(1)
        for algorithm in (DPSGD(averager=averager), D2(averager=averager)):
            simulator = simulate(algorithm, problem)
            simulator.run(gradient_of(problem), 0.1, 5)
            x = problem.start[0].clone()
            for _ in range(5):
                x -= 0.1 * problem.gradient(x, 0)
            torch.testing.assert_close(stacked(simulator)[0], x, rtol=0.0, atol=1e-15)
            assert simulator.traffic[0].bytes_sent == 0


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"CHOCO needs a graph that stays the same, got OnePeer.* Use Ring"):
        DPSGD(averager=Choco()).resolved(8)  # D-PSGD's default graph
    with pytest.raises(TopologyError, match=r"D2 needs a symmetric .* changing with the step"):
        D2(OnePeerExponential(8), Choco())
    with pytest.raises(
        TopologyError, match=r"above -1/3, got Ring\(size=8, lazy=False\) with -0.333333: .* lazy graph"
    ):
        D2(Ring, Choco()).resolved(8)
    assert D2(Ring, Choco(Int8(), 0.9)).resolved(8)  # smaller steps have no eigenvalue below 1 - 0.9 * 4 / 3
    with pytest.raises(ConfigurationError, match=r"got compressor=Ring\(size=4.*needs a compressor.* Write Int8\(\)"):
        Choco(Ring(4))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"TopK.* without a consensus_step_size, needs one .* Begin with"):
        Choco(TopK(0.01))
    with pytest.raises(ConfigurationError, match=r"DPSGD got averager=.*Choco.*, needs an averager.* Write Choco\(\)"):
        DPSGD(averager=Choco)  # type: ignore[arg-type]


# What the checkpoints of the first releases have: a change here leaves their users without a way to go on.
CHECKPOINTS: list[tuple[AbstractAlgorithm, str, set[str]]] = [
    (DPSGD(), "DPSGD(topology=OnePeerExponential(size=4))", set()),
    (D2(), "D2(topology=Ring(size=4, lazy=True))", {"correction", "rest"}),
    (
        ChocoSGD(),
        "ChocoSGD(topology=Ring(size=4, lazy=False), compressor=Int8(bucket=512, stochastic=False), "
        "consensus_step_size=1.0)",
        {"public", "pull"},
    ),
    (
        MoniquaSGD(),
        "MoniquaSGD(topology=OnePeerExponential(size=4), theta=1.0, levels=256, consensus_step_size=1.0)",
        set(),
    ),
    (ADPSGD(Complete), "ADPSGD(topology=Complete(size=4))", set()),
]


@pytest.mark.parametrize(("algorithm", "printed", "names"), CHECKPOINTS, ids=lambda value: told(value)[:8])
def test_old_checkpoints_fit(algorithm: AbstractAlgorithm, printed: str, names: set[str]) -> None:
    """A checkpoint has the algorithm as it is printed, and is refused for another; and the state by its names."""
    simulator = Simulator(algorithm, [Vector([torch.zeros(3)]) for _ in range(4)])
    assert repr(simulator.algorithm) == printed
    for worker in simulator.workers:
        assert worker.state.keys() == names
        assert all(state.buffers[0].dtype in (torch.float32, torch.bfloat16) for state in worker.state.values())


def test_choco_goes_on_from_the_state_of_an_old_checkpoint() -> None:
    """Public copies and pulls as they were kept, put together by hand."""
    problem, graph = Quadratic(4), FromGraph([(0, 1), (1, 2), (2, 3), (1, 3)])
    whole = simulate(ChocoSGD(graph, TopK(0.4), 0.3), problem)
    expected = list(states(whole, problem, rate, 12))[-1]
    old = simulate(ChocoSGD(graph, TopK(0.4), 0.3), problem)
    old.run(gradient_of(problem), rate, 7)
    resumed = simulate(DPSGD(graph, Choco(TopK(0.4), 0.3)), problem)
    for worker, saved in zip(resumed.workers, old.workers, strict=True):
        worker.x.copy_(saved.x)
        worker.step = saved.step
        worker.state.update({name: Vector([saved.state[name].buffers[0].clone()]) for name in ("public", "pull")})
    resumed.run(gradient_of(problem), rate, 5)
    assert torch.equal(stacked(resumed), expected)


def test_it_prints_the_averager_where_it_is_not_the_default() -> None:
    assert repr(DPSGD(Ring(4), Choco())).startswith(
        "DPSGD(topology=Ring(size=4, lazy=False), averager=Choco(compressor="
    )
    assert repr(D2(averager=Gossip())) == "D2(topology=lazy_ring_or_complete)"
    assert DPSGD(Ring(4), Choco()) == DPSGD(Ring(4), Choco()) != DPSGD(Ring(4))


@pytest.mark.parametrize("compressor", [Int8(), Int8(bucket=None), ScaledSign(), TopK(0.1)], ids=repr)
def test_decoding_piece_by_piece_adds_what_a_message_stands_for(compressor: AbstractCompressor) -> None:
    size = 300_007  # of some pieces, the last of them odd
    values = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    worker = Worker(0, 3, Vector([values[0]]), Vector([values[0]]))
    own, *others = (compressed(compressor, Vector([each]), worker) for each in values)
    whole = [compressor.decompress(message.payloads[0]) for message in (own, *others)]
    for wide in (torch.float32, torch.float64):  # the second vector is another one, and wider
        vectors = Vector([values[0].clone()]), Vector([values[1].to(wide)])
        for (first, second), mine, theirs in own.in_pieces(vectors, [each.vector for each in others]):
            first.add_(mine)
            for each in theirs:
                second.add_(each.sub_(mine), alpha=0.3)
        expected = values[1].to(wide)
        for each in whole[1:]:
            expected.add_(each - whole[0], alpha=0.3)
        torch.testing.assert_close(vectors[0].buffers[0], values[0] + whole[0], rtol=0.0, atol=0.0)
        torch.testing.assert_close(vectors[1].buffers[0], expected, rtol=0.0, atol=0.0)
    piecewise, expected = Vector([values[1].clone()]), values[1].add(whole[2], alpha=0.7)
    own.add_decoded_(own.read(others[1].vector), piecewise, 0.7)
    torch.testing.assert_close(piecewise.buffers[0], expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "compressor", [Int8(), Int8(stochastic=True), Int8(bucket=None), ScaledSign(), TopK(0.1), Identity()], ids=repr
)
def test_compressing_piece_by_piece_makes_the_message_of_the_whole(compressor: AbstractCompressor) -> None:
    size = 300_007  # of some pieces, the last of them odd
    x, y = (Vector([torch.randn(size, generator=torch.Generator().manual_seed(seed))]) for seed in (0, 1))
    workers = [Worker(0, 3, x, x) for _ in range(2)]  # with random numbers of their own
    for worker in workers:
        worker.seed(7)
    whole = compressed(compressor, x.zeros_like().add_difference_(x, y, 1.0), workers[0])
    piecewise = compressed_in_pieces(compressor, workers[1], y, (x, y), lambda out, a, b: torch.sub(a, b, out=out))
    assert torch.equal(whole.vector.buffers[0], piecewise.vector.buffers[0])
    for one, other in zip(whole.payloads[0].tensors, piecewise.payloads[0].tensors, strict=True):
        assert torch.equal(one, other)
    x.buffers[0][-1] = torch.nan
    with pytest.raises(CompressionError, match=r"Worker 0 in step 0: .*1 NaN"):
        compressed_in_pieces(compressor, workers[1], y, (x, y), lambda out, a, b: torch.sub(a, b, out=out))
