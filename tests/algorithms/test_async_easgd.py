"""Proved here: asynchronous EASGD is its event-ordered reference exchange by exchange; an exchange conserves the sum of
the workers and the centre; it is hidden behind a gradient; and what cannot work is refused."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import servers
from reference.runs import JITTERED, buffer_of, equal_start, gradient_of, simulate
from reference.served import SECONDS, centres, served

from lightning_decentral.algorithms import AsyncEASGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.planner import plan
from lightning_decentral.simulation.cluster import Cluster


@pytest.mark.parametrize("every", [1, 4])
def test_it_is_the_reference_exchange_by_exchange(every: int) -> None:
    problem = equal_start(6)
    reference = servers.async_easgd(problem.start[0], problem.gradient, 0.1, SECONDS, every, 0.8)
    got = centres(served(AsyncEASGD(every, 0.8), problem), problem, 0.1)
    next(got)  # all begin with an exchange, of equal models
    for mine, theirs in islice(zip(got, islice(reference, 6, None), strict=False), 60):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 60 exchanges of values around 1


def test_exchanges_conserve_the_sum_of_workers_and_centre() -> None:
    problem = equal_start(4)
    simulator = simulate(AsyncEASGD(2), problem, JITTERED)
    simulator.run(gradient_of(problem), 0.2, 6)

    def total() -> torch.Tensor:
        simulator.rest()
        state = simulator.workers[0].state
        others = [buffer_of(worker.x) for worker in simulator.workers[1:]]  # type: ignore[arg-type]
        return torch.stack([*others, buffer_of(state["aside"]), buffer_of(state["centre"])]).sum(0)

    before = total()
    centre = buffer_of(simulator.workers[0].x).clone()  # type: ignore[arg-type]
    simulator.run(gradient_of(problem), 0.0, 6)
    torch.testing.assert_close(total(), before, rtol=0.0, atol=1e-13)
    assert float((buffer_of(simulator.workers[0].x) - centre).abs().max()) > 0.01  # type: ignore[arg-type]


def test_of_workers_that_come_and_go_it_is_the_same_while_all_are_there() -> None:
    kept = []
    for method in (AsyncEASGD(2), AsyncEASGD(2).opened()):
        simulator = simulate(method, equal_start(4), JITTERED)
        simulator.run(gradient_of(equal_start(4)), 0.1, 20)
        simulator.rest()
        centre = simulator.workers[0].state["centre"]
        kept.append(torch.stack([*map(buffer_of, (centre, *(worker.x for worker in simulator.workers)))]))  # type: ignore[arg-type]
    torch.testing.assert_close(*kept, rtol=0.0, atol=1e-13)


def test_an_exchange_is_hidden_behind_a_gradient() -> None:
    cluster = Cluster(compute_seconds=1.0, bandwidth_bytes_per_second=250e6)  # 0.4 s each way
    assert plan(AsyncEASGD(1), 2, 100_000_000, cluster).seconds_per_step == pytest.approx(1.0, rel=1e-3)


def test_what_cannot_work_is_refused() -> None:
    for options in ({"moving_rate": 1.0}, {"moving_rate": 0.0}, {"every": 0}):
        with pytest.raises(ConfigurationError, match=f"AsyncEASGD\\({next(iter(options))}="):
            AsyncEASGD(**options)  # type: ignore[arg-type]
