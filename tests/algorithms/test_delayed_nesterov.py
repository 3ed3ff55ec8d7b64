"""Proved here: delayed Nesterov with local steps by speed is its event-ordered reference message by message; one worker
with a buffer of one is DiLoCo; and what cannot work is refused."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import servers
from reference.runs import JITTERED, buffer_of, equal_start, gradient_of, simulate
from reference.served import SECONDS, centres, served

from lightning_decentral.algorithms import DelayedNesterov, DiLoCo
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.planning.planner import plan
from lightning_decentral.simulation.simulator import Simulator


@pytest.mark.parametrize(("every", "buffer", "spread"), [(1, 1, 0.0), (6, 4, 0.0), (6, 4, 0.1)])
def test_it_is_the_reference_message_by_message(every: int, buffer: int, spread: float) -> None:
    problem = equal_start(6)
    reference = servers.delayed_nesterov(problem.start[0], problem.gradient, 0.02, SECONDS, every, buffer, spread)
    simulator = served(DelayedNesterov(every, buffer, spread=spread), problem)
    for mine, theirs in islice(zip(centres(simulator, problem, 0.02), reference, strict=False), 60):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-12)  # 60 messages of values around 1, with momentum
    dues = simulator.workers[0].state["dues"]
    assert every == 1 or dues[4] < dues[2] < dues[3] == every  # the slowest, and the fastest


def test_one_worker_with_a_buffer_of_one_is_diloco() -> None:
    problem = equal_start(1)
    ends = []
    for method in (DelayedNesterov(every=4, buffer=1), DiLoCo(every=4)):
        simulator = simulate(method, problem)
        simulator.run(gradient_of(problem), 0.05, 20)
        simulator.rest()
        ends.append(buffer_of(simulator.workers[0].x))  # type: ignore[arg-type]
    torch.testing.assert_close(ends[0], ends[1], rtol=0.0, atol=1e-14)


def test_the_planner_counts_local_steps_by_speed_as_they_are_made() -> None:
    start = [Vector([torch.zeros(50)]) for _ in range(4)]
    simulator = Simulator(DelayedNesterov(every=4), start, JITTERED)
    for worker in simulator.workers:
        worker.read_gradient = worker.x.zeros_like
    for _ in simulator.demands(16):
        pass
    planned = plan(DelayedNesterov(every=4), 4, start[0].num_bytes, JITTERED, steps=12)  # after a round
    sent = sum(traffic.bytes_sent for traffic in simulator.traffic)
    assert planned.bytes_per_step * 4 * 16 == pytest.approx(sent, rel=1e-12)
    assert min(worker.state["due"] for worker in simulator.workers) < 4


def test_what_cannot_work_is_refused() -> None:
    for options in ({"outer_learning_rate": 0.0}, {"outer_momentum": 1.0}, {"spread": 0.3, "buffer": 4}, {"every": 0}):
        with pytest.raises(ConfigurationError, match="DelayedNesterov"):
            DelayedNesterov(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"spread=0\.3"):
        DelayedNesterov(spread=0.3).resolved(4)
