"""Proved here, for every algorithm of the package: it finishes under heavy-tailed compute times; the same seed gives
the same bits; it reaches the optimum of a heterogeneous-curvature quadratic to its stated accuracy; one worker is plain
SGD; at learning rate 0 the mean stays and disagreement shrinks as the spectral gap says; stop and resume equals
uninterrupted; the planner's bytes are the simulator's; a lost peer is reported or survived; a skipped update stops no
exchange. A new algorithm is one line in the table.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from reference.quadratic import Quadratic
from reference.runs import JITTERED, gradient_of, simulate, stacked

from lightning_decentral.algorithms import (
    ACPD,
    ADPSGD,
    APSGD,
    BMUF,
    CPSGD,
    D2,
    DCDPSGD,
    DPSGD,
    EASGD,
    ECDPSGD,
    EF21,
    SAEF,
    SCAFFOLD,
    SGP,
    SPARTA,
    ACiD,
    AsyncEASGD,
    BackupWorkers,
    ChocoSGD,
    CoCoA,
    CoCoAPlus,
    CoCoDSGD,
    DecentLaM,
    DeepSqueeze,
    DelayAdaptive,
    DelayedNesterov,
    DiLoCo,
    EagerDiLoCo,
    Extra,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBuff,
    FedMom,
    FedNova,
    FedProx,
    FedYogi,
    GossipPGA,
    GradientTracking,
    HierarchicalGossip,
    Hogwild,
    LocalSGD,
    Malenia,
    MomentumTracking,
    MoniquaSGD,
    NoLoCo,
    OverlapLocalSGD,
    QGDSGDm,
    RelaySGD,
    Rennala,
    Ringleader,
    Ringmaster,
    SlowMo,
    SparseLoCo,
    StalenessAware,
    StaleSynchronous,
    StreamingDiLoCo,
    Swarm,
    SyncSGD,
)
from lightning_decentral.averaging import Choco
from lightning_decentral.compression import FP4, Identity, RandomBlock, TopK
from lightning_decentral.errors import PeerLost
from lightning_decentral.flat import Vector
from lightning_decentral.methods import METHODS
from lightning_decentral.planning.planner import plan
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm, LocalStep
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import (
    AbstractTopology,
    BipartiteExponential,
    BipartiteRing,
    Complete,
    DirectedGraph,
    Exponential,
    HypercubeMatching,
    OnePeerExponential,
    Ring,
    Torus,
)

WORKERS = 8
DIRECTED = DirectedGraph([[(rank + 1) % WORKERS, *([4] if rank == 0 else [])] for rank in range(WORKERS)])


@dataclass(frozen=True)
class Line:
    """An algorithm, and what the contracts need to know of it.

    Args:
        algorithm: with its hyper-parameters. Its defaults must work alone, for one worker as for many: a topology is
            given as a function of their number, such as `ring_or_complete`.
        accuracy: how far from the optimum of `Quadratic(8)` its worst worker may rest, at the learning rate `rate`. Run
            the contract with 1e-5: where it fails, it says how far the worker was, and the method gets somewhat more;
            a method without a bias passes, and gets 1e-9. In the middle of a round of local steps, if it has them:
            there workers have drifted apart.
        averages: the graph on which ``x`` is averaged in each step; ``None``: it is not, or otherwise. The contract at
            learning rate 0 then compares the disagreement with the graph's spectral gap.
        remains: of a disagreement after 24 rounds without learning; ``None``: what the graph says. For methods whose
            compressed messages slow it down.
        outer: whether it makes outer steps: from equal models, and one worker alone makes them, too.
        momentum: whether one worker alone has a momentum.
        stays: whether the mean of the models stays at learning rate 0.
        served: whether there is one model, that of worker 0, and others have copies of it.
        missed: whether somebody waits for a worker that is lost and does not serve.
    """

    algorithm: AbstractAlgorithm
    accuracy: float
    averages: AbstractTopology | None
    remains: float | None = None
    outer: bool = False
    momentum: bool = False
    stays: bool = True
    served: bool = False
    missed: bool = True

    @property
    def rate(self) -> float:
        """The learning rate: one that leaves no bias of its order may be fast."""
        return 0.02 if self.accuracy > 1e-6 else 0.1 if self.served or self.momentum else 0.2

    @property
    def from_equal_models(self) -> bool:
        return self.outer or self.served


TABLE = [
    Line(SyncSGD(), 1e-9, None),
    Line(DPSGD(), 0.10, OnePeerExponential(WORKERS)),
    Line(DPSGD(Ring(WORKERS)), 0.12, Ring(WORKERS)),
    Line(DPSGD(Exponential(WORKERS)), 0.08, Exponential(WORKERS)),
    Line(DPSGD(HypercubeMatching(WORKERS)), 0.10, HypercubeMatching(WORKERS)),
    Line(GradientTracking(), 1e-9, OnePeerExponential(WORKERS)),
    Line(GradientTracking(Ring(WORKERS), order="atc"), 1e-9, Ring(WORKERS)),
    Line(D2(), 1e-9, Ring(WORKERS, lazy=True)),
    Line(D2(Torus(2, 4, lazy=True)), 1e-9, Torus(2, 4, lazy=True)),
    Line(D2(averager=Choco()), 1e-9, Ring(WORKERS, lazy=True), remains=0.3),
    Line(ChocoSGD(), 0.12, Ring(WORKERS), remains=0.01),  # D-PSGD on the same graph: 0.0055
    Line(ChocoSGD(compressor=Identity()), 0.12, Ring(WORKERS)),
    Line(ChocoSGD(Ring(WORKERS, lazy=True), TopK(0.4), 0.3), 0.6, Ring(WORKERS, lazy=True), remains=0.7),
    Line(MoniquaSGD(theta=8.0), 0.15, OnePeerExponential(WORKERS), remains=0.03),  # its lattice has the step 0.06
    Line(SAEF(TopK(0.4), averaging_period=3), 0.05, None),
    Line(SAEF(RandomBlock(0.4), averaging_period=3), 0.05, None),
    Line(SAEF(TopK(0.4), averaging_period=None, step_ahead=0.3), 0.05, None),
    Line(SAEF(TopK(0.4), averaging_period=None, step_ahead=0.0), 0.05, None),
    Line(EF21(TopK(0.4)), 1e-9, None),
    Line(LocalSGD(every=4), 0.01, Complete(WORKERS)),
    Line(LocalSGD(every=6, delay=2, fragments=2), 0.25, Complete(WORKERS)),
    Line(SlowMo(every=4), 0.01, None, outer=True),
    Line(DiLoCo(every=4), 0.01, None, outer=True),
    Line(StreamingDiLoCo(every=6, fragments=3, delay=1), 0.5, None, outer=True),
    Line(NoLoCo(every=4), 0.5, None, outer=True),
    Line(BMUF(every=4), 0.01, None, outer=True),
    Line(EagerDiLoCo(every=4), 0.2, None, outer=True),
    Line(SparseLoCo(every=4, compressor=TopK(0.4)), 0.1, None, outer=True),
    Line(DiLoCo(every=6, compressor=TopK(0.4)), 0.1, None, outer=True),
    Line(StreamingDiLoCo(every=6, fragments=3, delay=1, compressor=FP4(), error_feedback=0.0), 0.5, None, outer=True),
    Line(CoCoDSGD(every=4), 0.3, Complete(WORKERS)),
    Line(OverlapLocalSGD(every=4), 0.2, None, outer=True),
    Line(EASGD(every=4), 1.1, None, outer=True),
    Line(SPARTA(share=0.2), 0.2, None, outer=True),
    Line(CPSGD(), 1e-9, None),
    Line(DPSGD(Ring(WORKERS), order="atc"), 0.12, Ring(WORKERS)),
    Line(Extra(), 1e-9, Ring(WORKERS, lazy=True)),
    Line(MomentumTracking(), 1e-9, OnePeerExponential(WORKERS), momentum=True),
    Line(QGDSGDm(), 0.12, Ring(WORKERS), remains=0.3, momentum=True),
    Line(DecentLaM(), 0.12, Ring(WORKERS), remains=0.5, momentum=True),
    Line(SGP(), 0.05, OnePeerExponential(WORKERS)),
    Line(SGP(overlap=2), 0.25, OnePeerExponential(WORKERS), remains=0.3),
    Line(SGP(DIRECTED), 0.3, DIRECTED, stays=False),
    Line(RelaySGD(), 1e-3, None, stays=False),
    Line(GossipPGA(), 0.02, Complete(WORKERS)),
    Line(HierarchicalGossip(Ring, workers_per_host=2), 0.12, None, outer=True),
    Line(HierarchicalGossip(Ring, workers_per_host=2, order="atc", averager=Choco()), 0.12, None, outer=True),
    Line(DCDPSGD(), 0.15, Ring(WORKERS), outer=True),
    Line(ECDPSGD(), 0.15, Ring(WORKERS), outer=True, stays=False),
    Line(DeepSqueeze(), 0.12, Ring(WORKERS), remains=0.05),
    Line(FedAvg(every=4), 0.01, None, outer=True),
    Line(FedMom(every=4), 0.01, None, outer=True),
    Line(FedAvgM(every=4), 0.01, None, outer=True),
    Line(FedAdam(every=4), 0.01, None, outer=True),
    Line(FedYogi(every=4), 0.01, None, outer=True),
    Line(FedAdagrad(every=4), 0.1, None, outer=True),
    Line(FedProx(every=4), 0.01, None, outer=True),
    Line(SCAFFOLD(every=4), 1e-9, None, outer=True),
    Line(FedNova(every=4), 0.01, None, outer=True),
    Line(ADPSGD(), 0.15, BipartiteExponential(WORKERS)),
    Line(ADPSGD(Complete, "random", 1), 0.15, Complete(WORKERS)),
    Line(ADPSGD(BipartiteRing(WORKERS)), 0.35, BipartiteRing(WORKERS)),
    Line(ACiD(), 0.35, BipartiteRing(WORKERS), stays=False),
    Line(Swarm(), 0.3, None, outer=True),
    Line(Swarm(blocking=True, levels=None), 0.5, None, outer=True),
    Line(APSGD(), 0.5, None, served=True, missed=False),  # whoever comes last draws the model to its own optimum
    Line(APSGD(gradients=3), 0.3, None, served=True, missed=False),
    Line(StalenessAware(softness=4), 0.3, None, served=True, missed=False),
    Line(BackupWorkers(), 0.15, None, served=True, missed=False),  # seven of eight are enough
    Line(BackupWorkers(needed=WORKERS), 1e-9, None, served=True),
    Line(DelayAdaptive(), 0.3, None, served=True, missed=False),
    Line(StaleSynchronous(), 0.3, None, served=True),
    Line(Ringmaster(), 0.3, None, served=True, missed=False),
    Line(Ringleader(), 1e-9, None, served=True, missed=False),
    Line(Rennala(), 0.15, None, served=True, missed=False),
    Line(Malenia(), 1e-4, None, served=True, missed=False),
    Line(Rennala(compressor=RandomBlock(0.4), model_compressor=TopK(0.4)), 0.5, None, served=True, missed=False),
    Line(FedBuff(every=4), 0.5, None, outer=True, served=True, missed=False),
    Line(DelayedNesterov(4, outer_learning_rate=0.3, by_speed=False), 0.5, None, outer=True, served=True, missed=False),
    Line(AsyncEASGD(), 1.1, None, outer=True, served=True, missed=False),
    Line(Hogwild(), 0.5, None, served=True, missed=False),
    Line(CoCoA(), 1e-9, Complete(WORKERS)),
    Line(CoCoAPlus(), 1e-9, Complete(WORKERS)),
    Line(ACPD(group=WORKERS, ratio=1.0), 1e-9, None, served=True),
    Line(ACPD(ratio=0.4), 0.3, None, served=True),
]
every_line = pytest.mark.parametrize("line", TABLE, ids=[repr(line.algorithm) for line in TABLE])


def is_asynchronous(line: Line) -> bool:
    return isinstance(line.algorithm, AbstractAsynchronousAlgorithm)


def equal_start() -> Quadratic:
    problem = Quadratic(WORKERS)
    problem.start = problem.start[:1].expand(WORKERS, -1).clone()
    return problem


def test_the_table_has_every_algorithm() -> None:
    assert {type(line.algorithm) for line in TABLE} == {method.load() for method in METHODS.values()}


@every_line
def test_it_finishes_under_heavy_tails_and_the_same_seed_gives_the_same_bits(line: Line) -> None:
    problem = Quadratic(WORKERS)
    cluster = replace(JITTERED, jitter_scale=0.6)  # without even a mean

    def run(seed: int, steps: int) -> Simulator:
        simulator = simulate(line.algorithm, problem, cluster, seed)
        simulator.run(gradient_of(problem), 0.05, steps)
        assert [worker.step for worker in simulator.workers] == [steps] * WORKERS
        assert bool(stacked(simulator).isfinite().all())
        return simulator

    first, again = run(3, 13), run(3, 13)  # some rounds of each method
    assert torch.equal(stacked(first), stacked(again))
    assert first.traffic == again.traffic
    assert first.seconds == again.seconds
    assert run(4, 2).seconds != run(3, 2).seconds


@every_line
def test_it_reaches_the_optimum_to_its_stated_accuracy(line: Line) -> None:
    problem = equal_start()
    cluster = Cluster(compute_seconds=1.0, jitter="lognormal", jitter_scale=0.1)  # equal speeds on average
    simulator = simulate(line.algorithm, problem, cluster)
    for _ in range(50):
        simulator.run(gradient_of(problem), line.rate, 25)  # for some, in the middle of a round
        distance = float((stacked(simulator) - problem.optimum).abs().max())
        if distance <= line.accuracy:
            return
    pytest.fail(f"{distance} from the optimum")


@every_line
def test_one_worker_is_plain_sgd(line: Line) -> None:
    problem = Quadratic(1)
    alone = type(line.algorithm)()  # the topology of the table is for more workers
    simulator = simulate(alone, problem, replace(JITTERED, slowdown={}))
    simulator.run(gradient_of(problem), lambda step: 0.5 / (1 + step), 15)
    x = problem.start[0].clone()
    for step in range(15):
        x -= 0.5 / (1 + step) * problem.gradient(x, 0)
    (worker,) = simulator.workers
    result = worker.x.clone()
    if isinstance(line.algorithm, SAEF):  # x with what was left out
        result.add_(worker.state["error"], alpha=-1.0)
    # EF21's gradients are not what one worker alone would have.
    if not (line.outer or line.momentum or isinstance(line.algorithm, EF21)):
        assert isinstance(result, Vector)
        torch.testing.assert_close(result.buffers[0], x, rtol=0.0, atol=1e-15)  # a few roundings of values near 1
    assert simulator.traffic[0].bytes_sent == 0


@every_line
def test_at_learning_rate_0_the_mean_stays_and_disagreement_shrinks(line: Line) -> None:
    if not line.stays:
        return
    problem = Quadratic(WORKERS, parameters=200)
    if line.from_equal_models:  # they stay what they are
        problem.start = problem.start[:1].expand(WORKERS, -1).clone()
    cluster = Cluster(compute_seconds=1.0, slowdown={rank: 1 + 1e-6 * rank for rank in range(WORKERS)})
    simulator = simulate(line.algorithm, problem, cluster)
    before, mean = simulator.consensus_distance(), stacked(simulator).mean(0)
    steps = 24  # a multiple of the periods, 3 and 1
    simulator.run(gradient_of(problem), 0.0, steps)
    # Rounding; D2 is an integrator, which adds up its roundings linearly.
    torch.testing.assert_close(stacked(simulator).mean(0), mean, rtol=0.0, atol=1e-13)
    if line.from_equal_models:
        torch.testing.assert_close(stacked(simulator), problem.start, rtol=0.0, atol=1e-13)
        return
    shrunk = (simulator.consensus_distance() / before) ** 0.5
    if line.averages is None:
        assert shrunk == 1.0
        return
    if isinstance(line.algorithm, AbstractAsynchronousAlgorithm):  # its gap is of the mean square over random partners
        factor = 1 - simulator.algorithm.mixing(WORKERS).spectral_gap
        assert shrunk <= 10 * factor**steps
        return
    factor = 1 - line.averages.spectral_gap
    if line.remains is not None:
        least = 0.05 if isinstance(line.algorithm, D2 | Extra) else 0.5  # D2's disagreement swings
        assert least * factor**steps <= shrunk <= line.remains
        return
    if isinstance(line.algorithm, D2 | Extra):
        # Exact diffusion at rest: x(t+1) = W (2 x(t) - x(t-1)). A mode of W with eigenvalue w has two roots of
        # z^2 - 2 w z + w = 0, complex for w < 1, of modulus sqrt(w): it takes twice as long.
        factor = factor**0.5
    # Directed graphs are not normal but these are: the norm shrinks by the factor in every period. D2's pair of complex
    # roots adds a factor that grows at most linearly, and a constant.
    slack = 3.0 * steps if isinstance(line.algorithm, D2 | Extra) else 1.0 + 1e-9
    assert shrunk <= slack * factor**steps + 1e-15
    if factor > 0.1:  # and not by much faster: the random start has a part in the slowest mode
        assert shrunk >= 0.05 * factor**steps


@every_line
def test_stop_and_resume_equals_uninterrupted(line: Line) -> None:
    problem = Quadratic(WORKERS)
    gradient = gradient_of(problem)

    def rate(step: int) -> float:
        return 0.2 / (1 + step // 5)

    paused = simulate(line.algorithm, problem, JITTERED, seed=2)
    paused.run(gradient, rate, 7)  # within the rounds of 3, 4 and 6 steps
    checkpoint = copy.deepcopy(paused.state_dict())
    paused.run(gradient, rate, 8)  # must not change the checkpoint, nor be changed by it
    resumed = simulate(line.algorithm, problem, JITTERED, seed=99)
    resumed.run(gradient, 0.7, 3)  # whatever it did before is forgotten
    resumed.load_state_dict(checkpoint)
    resumed.run(gradient, rate, 8)
    assert torch.equal(stacked(resumed), stacked(paused))
    assert (resumed.seconds, resumed.traffic) == (paused.seconds, paused.traffic)
    if not is_asynchronous(line):  # their pause is a barrier: who meets whom changes
        uninterrupted = simulate(line.algorithm, problem, JITTERED, seed=2)
        uninterrupted.run(gradient, rate, 15)
        assert torch.equal(stacked(resumed), stacked(uninterrupted))


@every_line
def test_planner_bytes_are_simulator_bytes(line: Line) -> None:
    start = [Vector([torch.randn(10), torch.zeros(3, dtype=torch.float64)]) for _ in range(WORKERS)]
    compressed = any(word in repr(line.algorithm) for word in ("compressor=", "levels=", "Choco", "SPARTA", "ACPD"))
    if compressed:  # the planner knows no dtypes
        start = [Vector([torch.randn(700)]) for _ in range(WORKERS)]
    if line.from_equal_models:  # where some would find others too far away to be read
        start = [start[0].clone() for _ in range(WORKERS)]
    simulator = Simulator(line.algorithm, start, JITTERED)
    for worker in simulator.workers:
        worker.read_gradient = worker.x.clone
    for _ in simulator.demands(2 + 10):
        pass
    planned = plan(line.algorithm, WORKERS, start[0].num_bytes, JITTERED, steps=10)
    sent = sum(traffic.bytes_sent for traffic in simulator.traffic)
    assert planned.bytes_per_step * WORKERS * 12 == pytest.approx(sent, rel=1e-12)


@every_line
@pytest.mark.parametrize("lost", [0, 5])
def test_a_lost_peer_is_reported_or_survived(line: Line, lost: int) -> None:
    problem = Quadratic(WORKERS)
    simulator = simulate(line.algorithm, problem, replace(JITTERED, failures={lost: 7.3}))
    unmissed = False
    if isinstance(line.algorithm, ADPSGD | ACiD):  # nobody calls the active half
        graph = line.algorithm.resolved(WORKERS)
        unmissed = all(lost not in graph.peers(rank) for rank in range(WORKERS))
    if unmissed or isinstance(line.algorithm, Hogwild) or (lost and not line.missed):
        simulator.run(gradient_of(problem), 0.05, 40)
        assert all(worker.step == 40 for worker in simulator.workers if worker.rank != lost)
        return
    with pytest.raises(PeerLost) as error:
        simulator.run(gradient_of(problem), 0.05, 40)
    assert error.value.ranks == (lost,)


@every_line
def test_a_skipped_update_does_not_stop_the_exchanges(line: Line) -> None:
    """Mixed precision may skip an update on one worker only; its peers must not wait for it."""
    problem = Quadratic(WORKERS)
    simulator = simulate(line.algorithm, problem, JITTERED)
    gradient = gradient_of(problem)
    gradients: dict[int, Vector] = {}
    for worker in simulator.workers:
        worker.read_gradient = lambda rank=worker.rank: gradients[rank]
    demands = simulator.demands(12)
    answer: bool | None = None
    while True:
        try:
            request, worker = demands.send(answer)
        except StopIteration:
            break
        answer = None
        if type(request) is not LocalStep:
            gradients[worker.rank] = gradient(worker)
        elif (worker.rank + worker.step) % 3:
            direction = worker.gradient if request.gradient is None else request.gradient
            request.target(worker).add_(direction, alpha=-0.1)
        else:
            answer = False
    assert [worker.step for worker in simulator.workers] == [12] * WORKERS
