"""Proved here, in bfloat16 and float32 over many steps: what each method keeps exactly in real numbers is kept up to
rounding errors that do not add up faster than chance has it. The mean of the workers moves by the mean of what their
optimizers did (minus what is still to be sent, where a method remembers that); what all workers know of each other is
the same. D2 comes as near the optimum as synchronous SGD, and CHOCO's pulls cancel for every graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_decentral.algorithms import (
    ADPSGD,
    D2,
    DPSGD,
    EF21,
    SAEF,
    SGP,
    ChocoSGD,
    Extra,
    GradientTracking,
    MomentumTracking,
    MoniquaSGD,
    SyncSGD,
)
from lightning_decentral.compression import COMPRESSORS, ErrorFeedback, ScaledSign, TopK, compressor
from lightning_decentral.flat import Vector
from lightning_decentral.gradient_compression.scheme import helps_feedback
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import Complete, FromGraph, FromMatrix, Ring, Star
from lightning_decentral.worker import Worker

PARAMETERS = 200
UNEVEN = FromMatrix([[0.7, 0.2, 0.1, 0.0], [0.2, 0.5, 0.0, 0.3], [0.1, 0.0, 0.6, 0.3], [0.0, 0.3, 0.3, 0.4]])
METHODS: dict[str, Callable[[], AbstractAlgorithm]] = {
    "sync_sgd": SyncSGD,
    "dpsgd": DPSGD,
    "dpsgd on a ring": lambda: DPSGD(Ring(4)),
    "dpsgd with uneven weights": lambda: DPSGD(UNEVEN),
    "d2": D2,
    "d2 on a star": lambda: D2(Star(4)),
    "d2 with uneven weights": lambda: D2(UNEVEN),
    "extra": Extra,
    "extra with uneven weights": lambda: Extra(UNEVEN),
    "gradient tracking": GradientTracking,
    "momentum tracking": MomentumTracking,
    "sgp": SGP,
    "choco": ChocoSGD,
    "choco with signs": lambda: ChocoSGD(FromGraph([(0, 1), (1, 2), (2, 3), (1, 3)]), ScaledSign(), 0.3),
    "moniqua": lambda: MoniquaSGD(theta=2.0),
    "adpsgd": ADPSGD,
    "saef": lambda: SAEF(TopK(0.1)),
    "saef with a server": lambda: SAEF(TopK(0.1), averaging_period=7, server_compressor=TopK(0.2)),
}
TYPES = {torch.float32: 1e-4, torch.bfloat16: 0.01}  # with learning rates: the updates are some units in the last place


class Run:
    """Workers that are drawn to different places, by noisy gradients, and what their optimizers did in all."""

    def __init__(self, algorithm: AbstractAlgorithm, dtype: torch.dtype, noise: float, workers: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        self.noise, self.dtype, self.generator = noise, dtype, generator
        self.targets = torch.rand(workers, PARAMETERS, generator=generator).mul_(1.6).sub_(0.8).to(dtype)
        start = self.targets.double().mean(0).to(dtype)
        self.simulator = Simulator(algorithm, [Vector([start.clone()]) for _ in range(workers)])
        self.gradients: dict[int, Vector] = {}
        for worker in self.simulator.workers:
            worker.read_gradient = lambda rank=worker.rank: self.gradients[rank]
        self.moved = torch.zeros(PARAMETERS, dtype=torch.float64)  # the mean over the workers

    def steps(self, count: int, learning_rate: float) -> None:
        """All workers make so many steps more."""
        goal = self.simulator.workers[0].step + count
        for request, worker in self.simulator.demands(goal):
            if isinstance(request, Gradient):
                away = values(worker.snapshot) - self.targets[worker.rank]
                noise = torch.randn(PARAMETERS, generator=self.generator).to(self.dtype)
                self.gradients[worker.rank] = Vector([away.add_(noise, alpha=self.noise)])
            else:
                target = request.target(worker)
                before = values(target).double()
                target.add_(worker.gradient, alpha=-learning_rate)
                self.moved += (values(target).double() - before) / len(self.simulator.workers)

    def mean(self, name: str | None = None) -> Tensor:
        """Over the workers: of their parameters, or of what they remember under a name."""
        vectors = [worker.x if name is None else worker.state[name] for worker in self.simulator.workers]
        return torch.stack([values(vector).double() for vector in vectors]).mean(0)


def values(vector: Any) -> Tensor:
    (buffer,) = vector.buffers
    return buffer


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def chance(dtype: torch.dtype, roundings: int) -> float:
    """What so many roundings of values below 1 add up to if their signs are random: each is off by up to half a unit in
    the last place, `eps / 4`, on average a `sqrt(3)`-th of it."""
    return torch.finfo(dtype).eps / 4 / 3**0.5 * roundings**0.5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_mean_moves_by_what_the_optimizers_did(method: str, dtype: torch.dtype) -> None:
    run, steps = Run(METHODS[method](), dtype, noise=0.5), 150
    before = run.mean()
    run.steps(steps, TYPES[dtype])
    after = run.mean()
    for name in ("error", "server"):  # what was taken from the parameters, but not given to the others yet
        if name in run.simulator.workers[0].state:
            after -= run.mean(name)
    # Each step rounds a worker's parameters twice at most, or three times where messages are rounded too; four workers
    # that round alike (as synchronous ones do) are as one. A mean that is kept wrong adds up with the steps instead.
    assert rms(after - before - run.moved) < 2 * chance(dtype, 3 * steps)


@pytest.mark.parametrize("topology", [Ring(4, lazy=True), Ring(5), Star(4), UNEVEN, Complete(2)], ids=repr)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_corrections_of_d2_stay_without_a_mean(topology: Any, dtype: torch.dtype) -> None:
    run = Run(D2(topology), dtype, noise=0.5, workers=topology.size)
    run.steps(150, TYPES[dtype])
    corrections = [values(worker.state["correction"]) for worker in run.simulator.workers]
    assert all(correction.dtype == torch.float32 for correction in corrections)
    size = max(float(correction.abs().max()) for correction in corrections)
    assert rms(run.mean("correction")) < 4 * size * chance(torch.float32, 150)  # not of the size of the parameters


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "noise"), [(torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.02, 0.3)]
)
def test_d2_comes_as_near_the_optimum_as_synchronous_sgd(
    dtype: torch.dtype, learning_rate: float, noise: float
) -> None:
    """Both begin at the optimum, and are driven off by noise and by rounding."""
    away = []
    for algorithm in (SyncSGD(), D2()):
        run = Run(algorithm, dtype, noise)
        run.steps(250, learning_rate)
        away.append(rms(run.mean() - run.targets.double().mean(0)))
    assert away[1] < 1.5 * away[0]


@pytest.mark.parametrize("topology", [Ring(4), UNEVEN, FromGraph([(0, 1), (1, 2), (2, 3), (1, 3)])], ids=repr)
def test_the_pulls_of_choco_cancel(topology: Any) -> None:
    """Also for parameters far from zero, all of which is sent at first."""
    start = torch.full((PARAMETERS,), 100.0)
    simulator = Simulator(ChocoSGD(topology), [Vector([start + rank]) for rank in range(4)])
    simulator.run(lambda worker: Vector([torch.zeros(PARAMETERS)]), 0.0, 80)
    pulls = torch.stack([values(worker.state["pull"]).double() for worker in simulator.workers])
    assert float(pulls.mean(0).abs().max()) < 1e-7  # of 100, float32 resolves 8e-6


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_mean_of_ef21_is_that_of_the_estimates(dtype: torch.dtype) -> None:
    run = Run(EF21(TopK(0.1)), dtype, noise=0.1)
    run.steps(150, TYPES[dtype])
    means = [values(worker.state["mean"]) for worker in run.simulator.workers]
    assert all(torch.equal(mean, means[0]) for mean in means)
    assert rms(means[0].double() - run.mean("estimate")) < 4 * chance(torch.float32, 150)


FEEDBACK = [name for name in COMPRESSORS if name not in ("threshold", "lattice") and helps_feedback(compressor(name))]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", FEEDBACK)
def test_what_error_feedback_has_sent_and_remembers_is_what_it_was_given(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    feedback = ErrorFeedback(compressor(name), torch.zeros(PARAMETERS))
    given, sent = (torch.zeros(PARAMETERS, dtype=torch.float64) for _ in range(2))
    largest, steps = 0.0, 80
    for _ in range(steps):
        x = torch.randn(PARAMETERS, generator=generator).to(dtype)
        _, stands_for = feedback.compress(x, generator)
        feedback.commit()
        given += x.double()
        sent += stands_for.double()
        largest = max(largest, float(stands_for.abs().max()), float(feedback.memory.abs().max()))
    # Added and subtracted in float32: two roundings per step of what is at most twice the largest.
    assert rms(sent + feedback.memory.double() - given) < 4 * largest * chance(torch.float32, 2 * steps)


def test_a_worker_reads_what_rounding_left_out_from_its_checkpoint() -> None:
    runs = [Run(D2(), torch.bfloat16, noise=0.5) for _ in range(2)]
    for run in runs:
        run.steps(20, 0.01)
    worker: Worker = runs[0].simulator.workers[1]
    assert float(values(worker.state["rest"]).abs().max()) > 0.0
    runs[1].simulator.load_state_dict(runs[0].simulator.state_dict())
    for run in runs:
        run.steps(5, 0.01)
    for one, other in zip(*(run.simulator.workers for run in runs), strict=True):
        assert torch.equal(values(one.x), values(other.x))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_mean_of_the_trackers_is_that_of_the_gradients(dtype: torch.dtype) -> None:
    """So that the workers' common direction is that of synchronous SGD for as long as training lasts."""
    run = Run(GradientTracking(), dtype, noise=0.5)
    run.steps(150, TYPES[dtype])
    gradients = torch.stack([values(run.gradients[rank]).double() for rank in range(4)]).mean(0)
    assert rms(run.mean("tracker") - gradients) < 4 * chance(dtype, 3 * 150)
