"""Proved here: under the Trainer, on a real process group, methods of every kind make, step by step, the iterates of
their stacked reference and of the simulator, under a changing learning rate, and send the bytes that the simulator
counts (`test_fabric` has every method); synchronous SGD is Lightning's own ``ddp``, with clipping, accumulation and
momentum; AD-PSGD keeps the sum over the workers and contracts, for an even and an odd number of workers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.names import told
from lightning.pytorch import LightningModule, Trainer
from reference import federated, methods
from reference.quadratic import Quadratic
from reference.runs import largest
from strategies.fits import (
    Abreast,
    Indices,
    QuadraticModule,
    Recorder,
    Regression,
    fit_kept,
    saved,
    trajectories,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral.algorithms import (
    ADPSGD,
    D2,
    DPSGD,
    EF21,
    SAEF,
    SCAFFOLD,
    ACiD,
    ChocoSGD,
    DiLoCo,
    FedMom,
    LocalSGD,
    MomentumTracking,
    MoniquaSGD,
    NoLoCo,
    SlowMo,
    StreamingDiLoCo,
    Swarm,
    SyncSGD,
)
from lightning_decentral.averaging import neighbor_average
from lightning_decentral.compression import TopK
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep, NeighborAverage, Start
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.strategies import AsyncStrategy, GossipStrategy
from lightning_decentral.topology import (
    AbstractTopology,
    BipartiteRing,
    Complete,
    Placed,
    RandomMatching,
    Ring,
    Sites,
    Star,
)
from lightning_decentral.worker import Worker

WORKERS = 4
STEPS = 12
# The order of the additions differs (a ring, a mean, a matrix product): a few roundings of 1e-16 per step.
ROUNDING = 1e-12


def rate(step: int) -> float:
    return 0.4 / (1.0 + 0.3 * step)


def no_rate(step: int) -> float:
    return 0.0


def small_rate(step: int) -> float:
    return 0.05


def shift(step: int) -> float:
    """Of a lattice with theta 8 and 256 levels: what all workers draw from the step's number."""
    seed = int(torch.randint(1, 2**62, (), generator=torch.Generator().manual_seed(step)))
    return 16 / 255 * random.Random(seed).random()


@dataclass(frozen=True)
class AveragingACopy(AbstractAlgorithm):
    """D-PSGD that averages a vector of its own, which can neither be exchanged for memory of the transport's."""

    within: str  # "the gradient", "a coroutine" or "no time"
    topology: AbstractTopology

    def resolved(self, world_size: int) -> AveragingACopy:
        return self

    def init(self, worker: Worker) -> None:
        worker.state["copy"] = worker.x.clone()

    async def step(self, worker: Worker) -> None:
        average = neighbor_average(worker, self.topology, worker.state["copy"].copy_(worker.x))
        if self.within == "no time":
            await average
            await Gradient()
        else:
            ticket = await Start(average if self.within == "the gradient" else self._coroutine(average))
            await Gradient()
            await ticket
            await ticket
        worker.x.copy_(worker.state["copy"])
        await LocalStep()

    async def _coroutine(self, average: NeighborAverage) -> None:
        await average


SYNCHRONOUS: list[tuple[AbstractAlgorithm, Any]] = [
    (SyncSGD(), methods.sync_sgd),
    (DPSGD(), methods.dpsgd),
    (DPSGD(Ring(4)), methods.dpsgd),
    (DPSGD(Complete(4)), methods.dpsgd),
    (DPSGD(Star(4)), methods.dpsgd),
    (DPSGD(RandomMatching(4)), methods.dpsgd),
    (DPSGD(Placed(Sites(4), (0, 2, 1, 3))), methods.dpsgd),
    (AveragingACopy("the gradient", Ring(4)), methods.dpsgd),
    (AveragingACopy("a coroutine", Ring(4)), methods.dpsgd),
    (AveragingACopy("no time", Ring(4)), methods.dpsgd),
    (D2(), methods.d2),
    (MomentumTracking(Ring(4), momentum=0.5), partial(methods.momentum_tracking, momentum=0.5)),
    (
        MomentumTracking(Ring(4), momentum=0.5, order="awc"),
        partial(methods.momentum_tracking, momentum=0.5, order="awc"),
    ),
    (
        ChocoSGD(Ring(4), TopK(0.4), 0.3),
        partial(methods.choco_sgd, consensus_step_size=0.3, compress=largest),
    ),
    (SAEF(TopK(0.4), 3), partial(methods.saef, compress=largest, period=3)),
    (SAEF(TopK(0.4), None, 0.3), partial(methods.saef, compress=largest, period=None, step_ahead=0.3)),
    (EF21(TopK(0.4)), partial(methods.ef21, compress=largest)),
    (LocalSGD(every=3), partial(methods.local_sgd, every=3)),
    (LocalSGD(every=5, delay=2, local_share=0.25), partial(methods.local_sgd, every=5, delay=2, local_share=0.25)),
    (SlowMo(every=3), partial(methods.slowmo, every=3, momentum=0.5)),
    (FedMom(every=3), partial(federated.fedmom, every=3)),
    (SCAFFOLD(every=3), partial(federated.scaffold, every=3)),
    (DiLoCo(every=3), partial(methods.diloco, every=3, outer_rate=0.7, momentum=0.9)),
    (
        StreamingDiLoCo(every=4, fragments=2, delay=1),
        partial(methods.streaming_diloco, every=4, fragments=2, delay=1),
    ),
    (NoLoCo(every=3), partial(methods.noloco, every=3)),
    (MoniquaSGD(theta=8.0), partial(methods.moniqua_sgd, theta=8.0, levels=256, shift=shift)),
    (MoniquaSGD(Ring(4), theta=8.0), partial(methods.moniqua_sgd, theta=8.0, levels=256, shift=shift)),
]


# On one host and on four, where each exchange goes one way only: one of each that differs in words and buffers.
ONE_WAY: list[AbstractAlgorithm] = [
    *(DPSGD(), AveragingACopy("the gradient", Ring(4)), ChocoSGD(Ring(4), TopK(0.4), 0.3), SAEF(TopK(0.4), 3)),
    LocalSGD(every=5, delay=2, local_share=0.25),
]


@pytest.mark.parametrize(
    ("algorithm", "reference", "hosts"),
    [
        pytest.param(algorithm, reference, hosts, id=f"{algorithm!r}-{hosts}")
        for algorithm, reference in SYNCHRONOUS
        for hosts in ((1, 2, 4) if algorithm in ONE_WAY else (2,))
    ],
)
def test_every_step_equals_the_reference_and_the_simulator(
    algorithm: AbstractAlgorithm, reference: Any, hosts: int, tmp_path: Path
) -> None:
    """Workers of the same host share memory, the others use TCP; with 2 hosts a worker does both."""
    quadratic = Quadratic(WORKERS)
    measured = equal_to_the_simulator(algorithm, quadratic, hosts, tmp_path)
    start = quadratic.start[0].expand(WORKERS, -1)
    topology = getattr(algorithm.resolved(WORKERS), "topology", None)
    expected = torch.stack(
        list(islice(reference(start, quadratic.gradient, rate, topology and topology.mixing_matrix), STEPS))
    )
    assert isinstance(algorithm, SyncSGD | SAEF | EF21) or len(torch.unique(expected[1], dim=0)) == WORKERS
    # Lattice points are computed in float32: some 1e-7 each, of models of size 1.
    near = 1e-5 if isinstance(algorithm, MoniquaSGD) else ROUNDING
    torch.testing.assert_close(measured, expected, rtol=0.0, atol=near)


def equal_to_the_simulator(algorithm: AbstractAlgorithm, quadratic: Quadratic, hosts: int, folder: Path) -> Tensor:
    """What real workers make, [steps, workers, parameters]; that it is what virtual workers make, for as many bytes."""
    strategy = GossipStrategy(algorithm, exchange_timeout_seconds=60.0)
    options: dict[str, Any] = {"max_steps": STEPS, "callbacks": [Recorder(folder)]}
    fit_kept(folder, strategy, WORKERS, QuadraticModule(quadratic, rate), hosts, **options)
    measured = trajectories(folder, WORKERS)
    simulator = Simulator(algorithm, [Vector([quadratic.start[0].clone()]) for _ in range(WORKERS)])
    for step in range(STEPS):
        simulator.run(lambda worker: own_gradient(quadratic, worker), rate, 1)
        simulated = torch.stack([worker.x.buffers[0] for worker in simulator.workers])  # type: ignore[attr-defined]
        torch.testing.assert_close(measured[step], simulated, rtol=0.0, atol=ROUNDING)
    for worker, traffic in zip(saved(folder, WORKERS), simulator.traffic, strict=True):
        assert worker["traffic"] == (traffic.bytes_sent, traffic.messages, traffic.exchanges)
        assert traffic.bytes_sent > 0
    return measured


class Places(Recorder):
    """Where a worker's parameters were after each batch, and how much the transport has kept to receive into."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.kept.setdefault("places", []).append(next(pl_module.parameters()).data_ptr())

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, GossipStrategy)
        assert strategy._communicator is not None
        self.kept["received"] = strategy._communicator.leases.free_bytes


@pytest.mark.parametrize(("hosts", "models"), [(1, 0), (4, 1)])
def test_averages_change_places_with_the_parameters(hosts: int, models: int, tmp_path: Path) -> None:
    """There are two places for the model and no third: on one host both in the memory that the others read."""
    strategy, module = GossipStrategy(exchange_timeout_seconds=60.0), QuadraticModule(Quadratic(WORKERS), rate)
    fit_kept(tmp_path, strategy, WORKERS, module, hosts, max_steps=STEPS, callbacks=[Places(tmp_path)])
    for worker in saved(tmp_path, WORKERS):
        places = worker["places"]
        assert places == places[:2] * (STEPS // 2)
        assert places[0] != places[1]
        assert worker["received"] == models * module.x.numel() * module.x.element_size()


def own_gradient(quadratic: Quadratic, worker: Worker) -> Vector:
    assert isinstance(worker.snapshot, Vector)
    return Vector([quadratic.gradient(worker.snapshot.buffers[0], worker.rank)])


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped by norm": {"gradient_clip_val": 0.05},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulating 2": {"accumulate_grad_batches": 2},
    "accumulating 3 of 8 batches": {"accumulate_grad_batches": 3},
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 2) for name in OPTIONS), ("clipped by norm", 4), ("accumulating 3 of 8 batches", 4)]
)
def test_synchronous_sgd_is_ddp(name: str, workers: int, tmp_path: Path) -> None:
    """With momentum. The mean of 4 gradients may be summed in another order: the last digit."""
    for whose, strategy in (("ddp", "ddp"), ("ours", "sync_sgd")):
        module, options = Regression(size=8 * 4 * workers), OPTIONS[name] | {"max_epochs": 2}
        fit_kept(tmp_path, strategy, workers, module, callbacks=[Recorder(tmp_path, whose)], **options)
    ddp, ours = trajectories(tmp_path, workers, "ddp"), trajectories(tmp_path, workers, "ours")
    assert len(ddp) == 16
    assert not torch.equal(ddp[0], ddp[-1])
    if workers == 2:
        assert torch.equal(ours, ddp)
    torch.testing.assert_close(ours, ddp, rtol=1e-14, atol=1e-15)


def test_clipping_is_what_the_test_above_says_it_is(tmp_path: Path) -> None:
    """The clipped runs really differ from the plain one."""
    for name, options in (("plain", {}), ("clipped", OPTIONS["clipped by norm"])):
        fit_kept(tmp_path, "sync_sgd", 2, Regression(), callbacks=[Recorder(tmp_path, name)], max_steps=3, **options)
    plain, clipped = trajectories(tmp_path, 2, "plain"), trajectories(tmp_path, 2, "clipped")
    assert (plain[1] - plain[0]).norm() > 2 * (clipped[1] - clipped[0]).norm() > 0


class OwnStart(Recorder):
    """Sets every worker apart before the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.x.data.copy_(pl_module.quadratic.start[trainer.global_rank])
        self.kept["start"] = pl_module.x.detach().clone()


@dataclass(frozen=True)
class AnsweredAtOnce(ADPSGD):
    """A call is answered when all of it is there."""

    answers_in_parts = False


@pytest.mark.parametrize(
    ("algorithm", "workers"),
    [
        (ADPSGD(max_pending_steps=1), 2),
        (AnsweredAtOnce(Complete, "random", 1), 4),
        (ADPSGD(Complete, "random", 1), 4),
        (ADPSGD(), 4),
        (ADPSGD(), 5),
        (ADPSGD(Ring(5)), 5),
        (ADPSGD(BipartiteRing(4), max_pending_steps=1), 4),
    ],
    ids=told,
)
def test_adpsgd_without_learning_keeps_the_sum_and_contracts(algorithm: ADPSGD, workers: int, tmp_path: Path) -> None:
    steps = 60
    # On a bipartite ring of 4 two workers call: if one of them came late, what it averages would not reach the other.
    callbacks = [Abreast(5), AtRest(tmp_path)]
    strategy, module = (
        AsyncStrategy(algorithm, exchange_timeout_seconds=60.0),
        QuadraticModule(Quadratic(workers), no_rate),
    )
    fit_kept(tmp_path, strategy, workers, module, max_steps=steps, callbacks=callbacks)
    results = saved(tmp_path, workers)
    before = torch.stack([each["start"] for each in results])
    after = torch.stack([each["at rest"] for each in results])
    torch.testing.assert_close(after.sum(0), before.sum(0), rtol=0.0, atol=ROUNDING)
    assert distance(after) < 1e-6 * distance(before)
    initiators = range(workers) if algorithm.resolved(workers).peers(0) else range(1, workers, 2)
    least = steps if algorithm.max_pending_steps == 1 else 1
    for rank, each in enumerate(results):
        calls = each["exchanges"]
        assert least <= calls <= steps if rank in initiators else calls == 0
        assert each["bytes"] == (calls + each["answered"]) * 5 * 8
    assert sum(each["answered"] for each in results) == sum(each["exchanges"] for each in results)


@pytest.mark.parametrize("algorithm", [ACiD(max_pending_steps=1), ACiD(Ring, max_pending_steps=4)], ids=told)
def test_acid_without_learning_keeps_what_all_have_and_contracts(algorithm: ACiD, tmp_path: Path) -> None:
    strategy, callbacks = AsyncStrategy(algorithm, exchange_timeout_seconds=60.0), [Abreast(5), AtRest(tmp_path)]
    fit_kept(tmp_path, strategy, 4, QuadraticModule(Quadratic(4), no_rate), max_steps=60, callbacks=callbacks)
    results = saved(tmp_path, 4)
    before, after = (torch.stack([each[key] for each in results]) for key in ("start", "at rest"))
    halves = torch.stack([each["beyond"].buffers[0] for each in results]) / 2
    torch.testing.assert_close((after + halves).sum(0), before.sum(0), rtol=0.0, atol=ROUNDING)
    assert distance(after) < 1e-4 * distance(before)
    assert sum(each["answered"] for each in results) == sum(each["exchanges"] for each in results)


@pytest.mark.parametrize(
    ("algorithm", "workers"), [(Swarm(every=2), 4), (Swarm(every=2, blocking=True, levels=None), 3)], ids=told
)
def test_swarm_without_learning_keeps_the_sum_and_contracts(algorithm: Swarm, workers: int, tmp_path: Path) -> None:
    """From models apart, so that what is quantized is refused and repaired at first."""
    strategy, callbacks = AsyncStrategy(algorithm, exchange_timeout_seconds=60.0), [Abreast(10), AtRest(tmp_path)]
    module = QuadraticModule(Quadratic(workers), no_rate)
    fit_kept(tmp_path, strategy, workers, module, max_steps=80, callbacks=callbacks)
    results = saved(tmp_path, workers)
    before = torch.stack([each["start"] for each in results])
    after = torch.stack([each["at rest"] for each in results])
    torch.testing.assert_close(after.sum(0), before.sum(0), rtol=0.0, atol=ROUNDING)
    assert distance(after) < 1e-6 * distance(before)
    sent = sum(each["bytes"] for each in results)
    calls, answers = (sum(each[key] for each in results) for key in ("exchanges", "answered"))
    assert calls == answers
    if algorithm.levels is None:
        assert calls == workers * 40
        assert sent == 2 * calls * 5 * 8
    else:  # digits, a check sum, the lattice; refusals have 8 bytes, and models 40 each way
        repaired = calls - workers * 40
        assert 0 <= repaired < 40  # as the meetings fall; that some are is seen in the simulator
        assert sent == 2 * (workers * 40) * (5 + 4 + 16) + repaired * (80 + 8 - (5 + 4 + 16))


class AtRest(OwnStart):
    """Writes a worker's weights once no call is under way."""

    def keep(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.quiesce()
        self.kept["at rest"] = pl_module.x.detach().clone()
        self.kept["beyond"] = trainer.strategy._steppers[0].worker.state.get("beyond")
        traffic = trainer.strategy.traffic
        self.kept |= {"answered": traffic.calls_answered, "exchanges": traffic.exchanges, "bytes": traffic.bytes_sent}


def distance(stacked: Tensor) -> float:
    return float((stacked - stacked.mean(0)).square().sum(1).mean())


class Large(LightningModule):
    """Two types of parameters, in more than one part each; no learning."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(100_001, dtype=torch.float64))  # 800 kB
        self.narrow = nn.Parameter(torch.zeros(130_003))  # 520 kB

    def training_step(self, batch: Tensor) -> Tensor:
        return self.wide.sum() + self.narrow.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> Any:
        return DataLoader(Indices(4096), batch_size=1)


class Apart(Recorder):
    """Every worker and every element begins elsewhere: an element that lands in another one's place would show."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(trainer.global_rank)
        for parameter in pl_module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.kept["start"] = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def keep(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.quiesce()
        self.kept["at rest"] = [parameter.detach().clone() for parameter in pl_module.parameters()]


@pytest.mark.parametrize(
    ("algorithm", "hosts"),
    [
        (ADPSGD(max_pending_steps=8), 1),
        (ADPSGD(Complete, "random", 1), 2),
        (AnsweredAtOnce(max_pending_steps=8), 1),
        (ADPSGD(BipartiteRing(4), max_pending_steps=1), 4),
    ],
)
def test_calls_in_parts_keep_every_element_in_its_place(algorithm: ADPSGD, hosts: int, tmp_path: Path) -> None:
    strategy, callbacks = AsyncStrategy(algorithm, exchange_timeout_seconds=60.0), [Abreast(5), Apart(tmp_path)]
    fit_kept(tmp_path, strategy, 4, Large(), hosts, max_steps=40, callbacks=callbacks)
    results = saved(tmp_path, 4)
    for index, rounding in ((0, 1e-12), (1, 1e-4)):
        before = torch.stack([each["start"][index] for each in results])
        after = torch.stack([each["at rest"][index] for each in results])
        torch.testing.assert_close(after.sum(0), before.sum(0), rtol=0.0, atol=rounding)
        assert distance(after) < 1e-3 * distance(before)
    sent = sum(each["traffic"][0] for each in results)
    answered = sum(each["traffic"][1] for each in results)
    assert sent == answered * (100_001 * 8 + 130_003 * 4)


def test_adpsgd_learns_a_quadratic_whose_workers_differ(tmp_path: Path) -> None:
    """The mean ends where it belongs up to a bias of the order of the learning rate, if all workers are equally fast:
    one that made its last steps alone would draw it towards its own optimum."""
    quadratic = Quadratic(4)
    strategy, module = AsyncStrategy(exchange_timeout_seconds=60.0), QuadraticModule(quadratic, small_rate)
    fit_kept(tmp_path, strategy, 4, module, max_steps=100, callbacks=[Abreast(5)])
    assert float((module.x.detach() - quadratic.optimum).norm()) < 0.2 * float(
        (quadratic.start[0] - quadratic.optimum).norm()
    )
