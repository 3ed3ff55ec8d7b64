"""Proved here: where every worker has an Adam of its own, gossip rests at the median of the workers' optima, however
small the learning rate is, and so does D2; gradient tracking with AdamW goes where AdamW on the mean gradient does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference.runs import buffer_of
from torch import Tensor

from lightning_decentral.algorithms import D2, DPSGD, GradientTracking, SyncSGD
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm, LocalStep
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import Complete, OnePeerExponential, Ring

CURVATURES = torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0], dtype=torch.float64)
OPTIMA = torch.tensor([0.0, 0.2, -0.3, 3.0, 5.0], dtype=torch.float64)
OPTIMUM = float((CURVATURES * OPTIMA).sum() / CURVATURES.sum())
MEDIAN = float(OPTIMA.median())


def rests(algorithm: AbstractAlgorithm, make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int) -> Tensor:
    """Where one parameter of each worker is in the end, from zero."""
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in OPTIMA]
    optimizers = [make([each]) for each in parameters]
    simulator = Simulator(algorithm, [Vector([each.data]) for each in parameters])
    for rank, worker in enumerate(simulator.workers):
        worker.read_gradient = lambda worker=worker, rank=rank: Vector(  # type: ignore[misc]
            [CURVATURES[rank] * (buffer_of(worker.snapshot) - OPTIMA[rank])]
        )
    for request, worker in simulator.demands(steps):
        if type(request) is LocalStep:
            parameters[worker.rank].grad = buffer_of(worker.gradient)
            optimizers[worker.rank].step()
    return torch.cat([buffer_of(worker.x) for worker in simulator.workers])


@pytest.mark.parametrize("algorithm", [DPSGD(Complete(5)), D2(Ring(5))], ids=repr)
@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_it_rests_at_the_median_of_the_workers_optima_at_any_rate(algorithm: AbstractAlgorithm, rate: float) -> None:
    mean = float(rests(algorithm, lambda each: torch.optim.Adam(each, rate), 300).mean())
    assert mean == pytest.approx(MEDIAN, abs=0.03)  # Adam's own swinging; the optimum is 1.02 away
    assert abs(mean - OPTIMUM) > 0.9


def test_with_a_tracker_it_goes_where_one_adamw_on_the_mean_gradient_does() -> None:
    def make(each: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(each, 0.05, weight_decay=1.0)

    tracked = rests(GradientTracking(OnePeerExponential(5)), make, 400)
    together = rests(SyncSGD(), make, 400)
    assert float(together.mean()) < 0.8 * OPTIMUM  # the decay pulls
    torch.testing.assert_close(tracked, together, rtol=0.0, atol=0.03)  # trackers swing on the way
