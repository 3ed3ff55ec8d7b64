"""Proved here: what a run of workers that come and go makes of local updates and of D-PSGD is, as long as all stay,
what they are where workers stay; who has made no step of its own in a round of local updates counts nothing; and a
worker that joins begins where the others are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.workers import kept_workers
from reference.runs import equal_start

from lightning_decentral.algorithms import BMUF, DPSGD, DiLoCo, LocalSGD, SlowMo
from lightning_decentral.flat import Vector, pack, unpack
from lightning_decentral.protocol import AbstractOpenRounds
from lightning_decentral.topology import Ring
from lightning_decentral.worker import Worker

from .real import Loop, connected

WORKERS, STEPS = 3, 12


def trained(rank: int, method: Any, opened: bool) -> torch.Tensor:
    """A worker's model after some steps, and the average that follows them."""
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    communicator = connected(rank, hosts=0)
    algorithm = method.opened().among(range(WORKERS), WORKERS) if opened else method.resolved(WORKERS)
    loop = Loop(algorithm, equal_start(WORKERS), communicator)
    for _ in range(STEPS):
        if isinstance(algorithm, AbstractOpenRounds) and algorithm.is_due(loop.stepper.worker):
            loop.stepper.end_round()
        loop.step()
    if isinstance(algorithm, AbstractOpenRounds) and algorithm.ends_with_epoch:
        loop.stepper.end_round()
    communicator.close()
    return loop.x


@pytest.mark.parametrize(
    "method",
    [
        DiLoCo(every=4),
        SlowMo(every=3),
        BMUF(every=6),
        LocalSGD(every={0: 1, 4: 2, 8: 4}),
        LocalSGD(every=4, warm_up_steps=4),
        DPSGD(),  # on a graph that changes with the step
        DPSGD(Ring, order="atc"),
    ],
    ids=repr,
)
def test_it_is_what_it_is_where_workers_stay(method: Any) -> None:
    made = [kept_workers(WORKERS).run(trained, method, opened) for opened in (True, False)]
    torch.testing.assert_close(*made, rtol=0.0, atol=1e-14)
    assert isinstance(method, DPSGD) or len({tuple(x.tolist()) for x in made[0]}) == 1


def worker_at(value: float) -> Worker:
    x = Vector([torch.full((3,), value, dtype=torch.float64)])
    return Worker(0, WORKERS, x, x)


def test_who_joins_begins_at_the_common_model_and_counts_after_its_first_step() -> None:
    algorithm = DiLoCo(every=4).opened()
    assert isinstance(algorithm, AbstractOpenRounds)
    donor, joins = worker_at(1.0), worker_at(5.0)
    algorithm.init(donor)
    donor.x.add_(donor.x, alpha=1.0)  # its steps so far
    donor.step = 3
    algorithm.init(joins)
    joins.x.copy_(donor.x)
    joins.step = donor.step
    algorithm.join(joins, unpack(pack(algorithm.handed_over(donor)), torch.device("cpu")))  # type: ignore[arg-type]
    assert joins.x.buffers[0].tolist() == [1.0] * 3  # type: ignore[attr-defined]
    assert not algorithm.is_due(joins)
    joins.step += 1
    assert algorithm.is_due(joins)
    request: Any = algorithm.end_round(joins).send(None)  # type: ignore[attr-defined]
    assert request.weight == 0.0
    steps = algorithm.step(joins)
    for _ in range(2):
        steps.send(None)  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        steps.send(True)  # type: ignore[attr-defined]
    assert algorithm.end_round(joins).send(None).weight == 1.0  # type: ignore[attr-defined]
