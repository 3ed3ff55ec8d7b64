"""Proved here, with the one loop of all servers: A-PSGD is its event-ordered reference update by update, beside the
server's training and with a server that only serves; a constant delay is stable exactly below its closed form; it rests
where the losses are weighted with the workers' speeds. With compression both ways it is its reference too, and whatever
the compressor, nothing that was computed is lost, and both ends of a link know the same."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from reference import servers
from reference.quadratic import Quadratic
from reference.runs import JITTERED, buffer_of, equal_start, gradient_of, simulate
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import (
    APSGD,
    BackupWorkers,
    DelayAdaptive,
    Malenia,
    Rennala,
    Ringleader,
    Ringmaster,
    StalenessAware,
    StaleSynchronous,
)
from lightning_decentral.compression import AbstractCompressor, Int8, RandomK, ScaledSign, TopK
from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.flat import Vector
from lightning_decentral.planning.planner import plan
from lightning_decentral.protocol import Gradient, LocalStep
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.worker import Worker


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("number", [1, 4])
def test_it_is_the_reference_update_by_update(number: int, opened: bool) -> None:
    """As workers that come and go make it, too, while nobody does."""
    problem = equal_start(6)
    reference = servers.apsgd(problem.start[0], problem.gradient, 0.1, SECONDS, number)
    method = APSGD(number).opened() if opened else APSGD(number)
    simulator = served(method, problem)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
    report = simulator.algorithm.report(simulator.workers[0])
    used = sum(report["accepted"].values())
    assert report["version"] * number <= used < (report["version"] + 2) * number
    assert sum(report["staleness"].values()) == used
    assert sum(report["dropped"].values()) == 0
    if opened:
        assert simulator.algorithm.report(simulator.workers[1])["unanswered"] in (0, 1)  # its call is under way


@pytest.mark.parametrize(
    "method",
    [
        *(StalenessAware(2), DelayAdaptive(), Ringmaster(3), Rennala(4), BackupWorkers(4), BackupWorkers(6)),
        *(StaleSynchronous(0), StaleSynchronous(2), Malenia(20), Ringleader()),
    ],
    ids=repr,
)
def test_all_servers_are_the_same_with_workers_that_come_and_go_while_nobody_does(method: Any) -> None:
    problem = equal_start(6)
    plain, opened = (served(each, problem) for each in (method, method.opened()))
    both = (updates(each, problem, 0.1) for each in (plain, opened))
    assert all(torch.equal(mine, theirs) for mine, theirs in islice(zip(*both, strict=False), 80))
    assert opened.algorithm.report(opened.workers[0]) == plain.algorithm.report(plain.workers[0])


@pytest.mark.parametrize("number", [1, 3])
def test_a_server_that_only_serves_is_the_same_without_its_gradients(number: int) -> None:
    problem = equal_start(6)
    others = Quadratic(6)
    others.a, others.b = problem.a[1:], problem.b[1:]
    reference = servers.apsgd(problem.start[0], others.gradient, 0.1, SECONDS[1:], number)
    simulator = served(APSGD(number, server="dedicated"), problem)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 60):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)
    assert simulator.workers[0].step in (60 - 1, 60)  # one step for each update


@pytest.mark.parametrize("delay", [0, 1, 4, 16])
def test_a_constant_delay_is_stable_below_its_closed_form(delay: int) -> None:
    """``delay + 1`` equal workers, one after the other: each gradient is ``delay`` updates old."""
    problem, made = Quadratic(delay + 1, parameters=1), 400 * (delay + 1)
    problem.a, problem.b = torch.full_like(problem.a, 1.7), torch.zeros_like(problem.b)
    problem.start = torch.ones_like(problem.start)
    bound = 2 * math.sin(math.pi / (2 * (2 * delay + 1))) / 1.7
    in_turn = [1 + 1e-9 * rank for rank in range(delay + 1)]

    def grows(rate: float) -> float:
        """The largest distance in the last quarter over that in the second one."""
        simulator = served(APSGD(), problem, in_turn)
        sizes = [abs(float(x)) for x in islice(updates(simulator, problem, rate), made)]
        assert max(simulator.workers[0].state["staleness"]) == delay
        return max(sizes[3 * made // 4 :]) / max(sizes[made // 4 : made // 2])

    assert grows(0.99 * bound) < 0.9
    assert grows(1.01 * bound) > 1.1


def test_it_rests_where_the_losses_are_weighted_with_the_workers_speeds() -> None:
    problem, seconds = equal_start(6), [1.0, 1.37, 2.11, 0.83, 5.03, 9.71]
    last = list(islice(updates(served(APSGD(), problem, seconds), problem, 0.002), 5000))[-1]
    speeds = 1 / torch.tensor(seconds, dtype=torch.float64)[:, None]
    weighted = (speeds * problem.a * problem.b).sum(0) / (speeds * problem.a).sum(0)
    # Off by O(learning rate): 0.002 times curvatures up to 2 times staleness of order 10.
    assert float((last - weighted).abs().max()) < 0.02
    assert float((weighted - problem.optimum).abs().max()) > 0.2


def test_compressed_both_ways_it_is_the_reference_update_by_update() -> None:
    problem, topk = equal_start(6), TopK(0.4)
    kept = max(1, round(0.4 * problem.start.shape[1]))
    reference = servers.apsgd_compressed(problem.start[0], problem.gradient, 0.05, SECONDS, kept)
    got = updates(served(APSGD(compressor=topk, model_compressor=topk), problem), problem, 0.05)
    for mine, theirs in islice(zip(got, reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize(
    "compressors",
    [(TopK(0.3), None), (None, ScaledSign()), (RandomK(0.3), Int8(stochastic=True)), (ScaledSign(), RandomK(0.3))],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_that_was_computed_is_lost_by_compression(
    compressors: tuple[AbstractCompressor | None, AbstractCompressor | None], dtype: torch.dtype
) -> None:
    workers, numbers = 4, 40
    draw, total = torch.Generator().manual_seed(3), torch.zeros(numbers, dtype=torch.float64)
    start = torch.zeros(numbers, dtype=dtype)
    simulator = Simulator(
        APSGD(compressor=compressors[0], model_compressor=compressors[1]),
        [Vector([start.clone()]) for _ in range(workers)],
        replace(JITTERED, latency_seconds=0.3),
    )

    def gradient(worker: Worker) -> Vector:
        values = torch.randn(numbers, generator=draw).mul_(2.0**-3).to(dtype)
        total.add_(values)
        return Vector([values])

    applied = torch.zeros_like(total)
    given: dict[int, Vector] = {}
    for worker in simulator.workers:
        worker.read_gradient = lambda rank=worker.rank: given[rank].clone()  # type: ignore[misc]
    for request, worker in simulator.demands(20):
        if type(request) is Gradient:
            given[worker.rank] = gradient(worker)
            continue
        applied += buffer_of(request.gradient)  # type: ignore[union-attr, arg-type]
        worker.x.add_(request.gradient, alpha=-1.0)  # type: ignore[union-attr]
    for worker in simulator.workers[1:]:
        if compressors[0] is not None:
            applied += buffer_of(worker.state["left out"])
        if compressors[1] is not None:
            known = buffer_of(simulator.workers[0].state[f"known: {worker.rank}"])
            assert torch.equal(known, buffer_of(worker.state["known"]))
            assert torch.equal(known, buffer_of(worker.x))  # type: ignore[arg-type]
            assert bool(known.any())
    torch.testing.assert_close(applied, total, rtol=0.0, atol=1e-4)  # 80 sums of values below 1, in float32
    sizes = (numbers * dtype.itemsize if each is None else each.num_bits(numbers, dtype) // 8 for each in compressors)
    up, down = (20 * each for each in sizes)
    assert [traffic.bytes_sent for traffic in simulator.traffic] == [(workers - 1) * down, *[up] * (workers - 1)]


def test_a_lost_server_is_named_and_a_lost_worker_is_not_missed() -> None:
    problem = equal_start(3)
    simulator = simulate(APSGD(), problem, Cluster(compute_seconds=1.0, failures={0: 5.5}))
    with pytest.raises(PeerLost, match="waits for worker 0"):
        simulator.run(gradient_of(problem), 0.1, 20)
    simulator = simulate(APSGD(), problem, Cluster(compute_seconds=1.0, failures={2: 5.5}))
    simulator.run(gradient_of(problem), 0.1, 20)
    assert [worker.step for worker in simulator.workers[:2]] == [20, 20]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"APSGD\(gradients=0\): needs a whole number"):
        APSGD(0)
    with pytest.raises(ConfigurationError, match=r"server='somewhere'\): needs 'beside' or 'dedicated'"):
        APSGD(server="somewhere")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="got 1 worker, which would serve and have nobody"):
        APSGD(server="dedicated").resolved(1)


def test_a_skipped_update_is_a_version_all_the_same() -> None:
    problem = equal_start(3)
    simulator = simulate(BackupWorkers(2), problem)
    for worker in simulator.workers:
        worker.read_gradient = worker.x.clone
    demands, answer = simulator.demands(6), None
    for _ in range(10_000):
        try:
            request, _ = demands.send(answer)
        except StopIteration:
            break
        answer = False if type(request) is LocalStep else None
    assert [worker.step for worker in simulator.workers] == [6, 6, 6]


def test_the_planner_knows_that_the_servers_link_is_the_limit() -> None:
    """A model takes 0.2 s and a gradient 0.25 s: the link carries 5 gradients per second, and worker 0 needs none."""
    cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=25e6)
    two, eight = (plan(APSGD(), workers, 5_000_000, cluster) for workers in (2, 8))
    assert two.steps_per_second == pytest.approx(4 + 1 / 0.65)
    assert eight.limit_steps_per_second == pytest.approx(
        4 + 5, rel=0.1
    )  # the link rests while the first gradients come
    assert 0.9 < eight.steps_per_second / eight.limit_steps_per_second <= 1.01


@pytest.mark.parametrize("method", [APSGD(), APSGD(server="dedicated"), APSGD(shards=2)], ids=repr)
def test_the_planner_says_from_how_many_workers_on_the_servers_link_is_the_limit(method: APSGD) -> None:
    cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=25e6)
    plans = [plan(method, workers, 2_000_000, cluster) for workers in range(2, 9)]
    (begins,) = {each.server_limits_from for each in plans}
    assert begins is not None
    for each in plans:
        assert (each.limit_seconds > 0.25) == (each.workers >= begins)
