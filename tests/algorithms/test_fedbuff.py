"""Proved here: FedBuff is its event-ordered reference message by message; with one worker, and with equal ones, it is
what it reduces to; what user code changes while all rest counts once; nothing waits but for its own message; and what
cannot work is refused."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from reference import servers
from reference.runs import buffer_of, equal_start, gradient_of, simulate, stacked
from reference.served import SECONDS, centres, served

from lightning_decentral.algorithms import FedBuff
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.planner import plan
from lightning_decentral.simulation.cluster import Cluster


@pytest.mark.parametrize(("every", "buffer", "rate"), [(1, 1, 1.0), (3, 4, 0.8)])
def test_it_is_the_reference_message_by_message(every: int, buffer: int, rate: float) -> None:
    problem = equal_start(6)
    reference = servers.fedbuff(problem.start[0], problem.gradient, 0.1, SECONDS, every, buffer, rate)
    simulator = served(FedBuff(every, buffer, rate), problem)
    for mine, theirs in islice(zip(centres(simulator, problem, 0.1), reference, strict=False), 60):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 60 messages of values around 1
    state = simulator.workers[0].state
    assert state["version"] == 60 // buffer
    assert sum(state["staleness"].values()) == sum(state["accepted"].values()) == 60


def test_one_worker_is_plain_sgd_in_the_middle_of_a_round_too() -> None:
    problem = equal_start(1)
    simulator = simulate(FedBuff(every=4), problem)
    x = problem.start[0].clone()
    for steps in (22, 3):
        simulator.run(gradient_of(problem), 0.1, steps)
        for _ in range(2):  # a rest after a rest changes nothing
            simulator.rest()
        for _ in range(steps):
            x -= 0.1 * problem.gradient(x, 0)
        torch.testing.assert_close(buffer_of(simulator.workers[0].x), x, rtol=0.0, atol=1e-14)  # type: ignore[arg-type]


def test_what_is_changed_while_all_rest_counts_once() -> None:
    """As a constraint that is put on before an evaluation, by all; nobody sends it as if training had made it."""
    problem = equal_start(4)
    simulator = simulate(FedBuff(every=3, buffer=2), problem)
    for expected in (0.0, 0.5):
        simulator.run(gradient_of(problem), 0.0, 10)
        simulator.rest()
        for worker in simulator.workers:
            x = buffer_of(worker.x)  # type: ignore[arg-type]
            torch.testing.assert_close(x, problem.start[0] + expected, rtol=0.0, atol=1e-15)
            x.add_(0.5)


def test_of_workers_that_come_and_go_it_is_the_same_while_all_are_there() -> None:
    problem, kept = equal_start(4), []
    for method in (FedBuff(every=3, by_speed=True), FedBuff(every=3, by_speed=True).opened()):
        simulator = simulate(method, problem, Cluster(slowdown={2: 2.5}, jitter="pareto"), seed=3)
        simulator.run(gradient_of(problem), 0.02, 30)
        server = simulator.workers[0]
        kept.append((buffer_of(server.state["centre"]), server.state["accepted"], stacked(simulator)))
    assert kept[0][1] == kept[1][1]
    torch.testing.assert_close(kept[0][0], kept[1][0], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(kept[0][2], kept[1][2], rtol=0.0, atol=1e-12)


def test_a_slow_worker_holds_up_nobody_and_makes_fewer_steps_by_speed() -> None:
    problem, stale = equal_start(4), []
    for by_speed in (False, True):
        simulator = served(FedBuff(every=8, buffer=1, by_speed=by_speed), problem, [1.0, 1.01, 1.02, 4.1])
        assert len(list(islice(centres(simulator, problem, 0.01), 100))) == 100
        state = simulator.workers[0].state
        stale.append(sum(count for staleness, count in state["staleness"].items() if staleness > 3))
        assert (state["accepted"][3] * 3 > state["accepted"][0]) == by_speed
        *fast, slow = (worker.state["due"] for worker in simulator.workers)
        assert min(fast) >= 7
        assert slow <= 2 if by_speed else slow == 8
    assert 1 == stale[1] < stale[0]  # the slow worker's first message


def test_the_planner_counts_a_model_each_way_in_a_round() -> None:
    cluster = Cluster(compute_seconds=1.0, bandwidth_bytes_per_second=1e6)
    planned = plan(FedBuff(every=5), 4, 1_000_000, cluster)
    assert planned.bytes_per_step == pytest.approx(1_000_000 * 2 * 3 / 4 / 5, rel=1e-12)


def test_what_cannot_work_is_refused() -> None:
    for options in ({"every": 0}, {"buffer": 0}, {"server_learning_rate": 0.0}):
        with pytest.raises(ConfigurationError, match=f"FedBuff\\({next(iter(options))}="):
            FedBuff(**options)  # type: ignore[arg-type]
