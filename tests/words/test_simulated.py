"""Proved here: each word of the protocol means what it says, in the simulator and for the planner. Methods of a few
lines equal a stacked recursion step by step; bounds are never exceeded; whoever waits in vain is told so at the end of
a run, and named when all wait for each other; a lost worker is reported or survived; what a word may not do is refused
with the method, the word and the step; a run that stops and resumes goes on as if it had rested."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.names import told
from reference.quadratic import Quadratic
from reference.runs import JITTERED, equal_start, gradient_of, simulate, stacked
from torch import Tensor

from lightning_decentral.algorithms import D2, DPSGD, SyncSGD
from lightning_decentral.errors import ConfigurationError, DeadlockError, PeerLost, ProtocolError, TopologyError
from lightning_decentral.flat import AbstractVector, SizeOnlyVector, Vector
from lightning_decentral.planning.planner import plan
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    Receive,
    Send,
    Start,
    Until,
)
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import DirectedGraph, Ring
from lightning_decentral.worker import Worker
from words.methods import (
    APSGD,
    SERVER,
    AbstractMethod,
    AbstractServed,
    Anchored,
    BackupWorkers,
    DelayedAverage,
    FedAvg,
    OneWay,
    OwnRing,
    PushSum,
    QueuedAPSGD,
    Restless,
    Sites,
    StaleSynchronous,
    TolerantBackupWorkers,
    Tracking,
    directed,
)

WORKERS = 6
RATE = 0.05
SERVED = (APSGD(), QueuedAPSGD(), BackupWorkers(3), StaleSynchronous(2), FedAvg())
TOGETHER = (
    *(PushSum(directed(WORKERS)), DelayedAverage(), OwnRing(), OneWay(), Tracking(Ring(WORKERS)), Sites()),
    Anchored(),
)
EVERY = (*SERVED, *TOGETHER)
UNEVEN = Cluster(compute_seconds=1.0, slowdown={rank: 1 + 0.37 * rank for rank in range(WORKERS)})
every_method = pytest.mark.parametrize("method", EVERY, ids=lambda method: type(method).__name__)


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-12)  # a few roundings of values near 1, in each step


# -- equal to a stacked recursion --------------------------------------------------------------------------------------


def push_sum(problem: Quadratic, steps: int) -> Iterator[Tensor]:
    matrix, x, weight = directed(WORKERS).mixing_matrix(), problem.start.clone(), torch.ones(WORKERS, 1).double()
    for _ in range(steps):
        x = matrix @ (x - RATE * problem.gradient(x / weight))
        weight = matrix @ weight
        yield x


def delayed_average(problem: Quadratic, steps: int) -> Iterator[Tensor]:
    x, sent = problem.start.clone(), problem.start
    for made in range(1, steps + 1):
        x = x - RATE * problem.gradient(x)
        if made % 5 == 0:
            sent = x.clone()
        if made % 5 == 3 and made > 5:
            x = x + sent.mean(0) - sent
        yield x


def synchronous(problem: Quadratic, steps: int) -> Iterator[Tensor]:
    x = problem.start.clone()
    for _ in range(steps):
        x = x - RATE * problem.gradient(x).mean(0)
        yield x


def one_way(problem: Quadratic, steps: int) -> Iterator[Tensor]:
    x, before = problem.start.clone(), None
    for _ in range(steps):
        x = x - RATE * problem.gradient(x)
        sent = x.clone()
        if before is not None:
            x = (x + before.roll(1, 0)) / 2
        before = sent
        yield x


def gradient_tracking(problem: Quadratic, steps: int) -> Iterator[Tensor]:
    matrix, x = Ring(WORKERS).mixing_matrix(), problem.start.clone()
    tracker = last = torch.zeros_like(x)
    for _ in range(steps):
        gradient = problem.gradient(x)
        tracker, last = matrix @ tracker + gradient - last, gradient
        x = matrix @ x - RATE * tracker
        yield x


def sites(problem: Quadratic, steps: int) -> Iterator[Tensor]:
    x = problem.start.clone()
    weights = 1.0 + torch.arange(WORKERS).double().view(-1, 2, 1)
    for _ in range(steps):
        x = x - RATE * problem.gradient(x)
        pairs = x.view(-1, 2, x.shape[1])
        x = ((pairs * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)).expand_as(pairs).reshape(x.shape)
        yield x


def anchored(problem: Quadratic, steps: int) -> Iterator[Tensor]:
    x, inner = problem.start.clone(), problem.start.clone()
    for step in range(steps):
        if step % 2:
            x = x - RATE * (x - inner)
        else:
            inner = inner - RATE * problem.gradient(inner)
        yield x


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        (PushSum(directed(WORKERS)), push_sum),
        (DelayedAverage(), delayed_average),
        (OwnRing(), synchronous),
        (OneWay(), one_way),
        (Tracking(Ring(WORKERS)), gradient_tracking),
        (Sites(), sites),
        (Anchored(), anchored),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AbstractAlgorithm) else "",
)
def test_it_equals_its_stacked_recursion(
    method: AbstractAlgorithm, reference: Callable[[Quadratic, int], Iterator[Tensor]]
) -> None:
    problem = equal_start(WORKERS) if isinstance(method, OwnRing) else Quadratic(WORKERS)
    simulator = simulate(method, problem, JITTERED)
    for expected in reference(problem, 23):
        simulator.run(gradient_of(problem), RATE, 1)
        assert_equal(stacked(simulator), expected)


def test_all_reduces_of_some_workers_are_under_way_at_once() -> None:
    """Two sites and their heads: weights that are 0 do not count, and what was started second may end later."""
    problem = Quadratic(WORKERS)
    simulator = simulate(Sites(), problem, JITTERED)
    x, other = problem.start.clone(), problem.start.clone()
    heads = [0, 2, 4]
    for step, x in enumerate(sites(problem, 9)):
        simulator.run(gradient_of(problem), RATE, 1)
        if step % 3 == 0:
            other[heads] = (other[2] + other[4]) / 2 + x[heads]
        got = torch.stack([worker.state["other"].buffers[0] for worker in simulator.workers])
        assert_equal(got, other)


def test_gradient_tracking_comes_to_the_optimum_and_push_sum_to_its_bias() -> None:
    problem = Quadratic(WORKERS)
    runs = ((Tracking(Ring(WORKERS)), 0.1, 300, 1e-9), (PushSum(directed(WORKERS)), 0.05, 200, 0.3))
    for method, rate, steps, accuracy in runs:
        simulator = simulate(method, problem)
        simulator.run(gradient_of(problem), rate, steps)
        reached = simulator.consensus().buffers[0]
        assert float((reached - problem.optimum).abs().max()) <= accuracy


# -- a server ----------------------------------------------------------------------------------------------------------


def served(problem: Quadratic, cluster: Cluster, updates: int) -> Iterator[Tensor]:
    """Asynchronous parallel SGD, gradient by gradient as they arrive, where messages take no time."""
    server = problem.start[SERVER].clone()
    local = {rank: problem.start[rank].clone() for rank in range(1, WORKERS)}
    seconds = {rank: cluster.compute_seconds * cluster.slowdown.get(rank, 1.0) for rank in local}
    arrivals = [(seconds[rank], rank) for rank in local]
    for _ in range(updates):
        now, rank = heapq.heappop(arrivals)
        server = server - RATE * problem.gradient(local[rank], rank)
        local[rank] = server
        heapq.heappush(arrivals, (now + seconds[rank], rank))
        yield server


def server_after_each_update(method: AbstractAlgorithm, problem: Quadratic, cluster: Cluster) -> Iterator[Tensor]:
    simulator = simulate(method, problem, cluster)
    gradient, gradients = gradient_of(problem), {}
    for request, worker in simulator.demands(30):
        if isinstance(request, Gradient):
            gradients[worker.rank] = gradient(worker)
            worker.read_gradient = lambda rank=worker.rank: gradients[rank]  # type: ignore[misc]
        else:
            assert worker.rank == SERVER
            assert request.gradient is not None
            worker.x.add_(request.gradient, alpha=-RATE)
            assert isinstance(worker.x, Vector)
            yield worker.x.buffers[0].clone()


@pytest.mark.parametrize("method", [APSGD(), QueuedAPSGD()])
def test_a_server_applies_gradients_as_they_come(method: AbstractServed) -> None:
    """In `on_call`, or in a step of the server with an answer given later: the same."""
    problem = equal_start(WORKERS)
    got = list(server_after_each_update(method, problem, UNEVEN))
    assert len(got) == 30 * (WORKERS - 1)
    for mine, expected in zip(got[:40], served(problem, UNEVEN, 40), strict=True):
        assert_equal(mine, expected)


def test_backup_workers_use_the_first_gradients_of_each_round_only() -> None:
    """Workers 4 and 5 are slower than two rounds: all that they send is late, until the others have ended."""
    problem = equal_start(WORKERS)
    cluster = replace(UNEVEN, slowdown=UNEVEN.slowdown | {4: 9.0, 5: 13.0})
    got = list(server_after_each_update(BackupWorkers(3), problem, cluster))
    x = problem.start[SERVER].clone()
    for mine in got[:30]:
        x = x - RATE * torch.stack([problem.gradient(x, rank) for rank in (1, 2, 3)]).mean(0)
        assert_equal(mine, x)


def test_a_quorum_is_kept_until_too_few_are_left() -> None:
    problem = equal_start(WORKERS)
    simulator = simulate(BackupWorkers(3), problem, replace(JITTERED, slowdown={5: 20.0}))
    simulator.run(gradient_of(problem), RATE, 40)
    used = simulator.workers[SERVER].state["used"]
    full = used.index(next(each for each in used if each < 3)) if min(used) < 3 else len(used)
    assert set(used[:full]) == {3}
    assert full >= 40
    assert [worker.step for worker in simulator.workers[1:]] == [40] * (WORKERS - 1)
    assert simulator.workers[SERVER].step == len(used)  # a step that waited in vain and made nothing is none
    assert simulator.seconds < 20 * 40 * 10


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_nobody_is_further_ahead_of_the_slowest_than_the_bound(bound: int) -> None:
    problem = equal_start(WORKERS)
    simulator = simulate(StaleSynchronous(bound), problem, replace(UNEVEN, slowdown={3: 7.0}))
    simulator.run(gradient_of(problem), RATE, 30)
    assert simulator.workers[SERVER].state["lead"] == bound
    assert simulator.workers[SERVER].state["clocks"] == dict.fromkeys(range(1, WORKERS), 30)
    steps = [worker.step for worker in simulator.workers[1:]]
    assert steps == [30] * (WORKERS - 1)


def test_clients_sit_out_until_they_are_chosen() -> None:
    problem = equal_start(WORKERS)
    simulator = simulate(FedAvg(), problem, JITTERED)
    simulator.run(gradient_of(problem), RATE, 60)
    used = simulator.workers[SERVER].state["used"]
    assert set(used[:20]) == {2}  # later, few are left
    assert sum(used) == (WORKERS - 1) * (60 // 5 - 1)  # each one's rounds but the first, which brings nothing
    assert [worker.step for worker in simulator.workers[1:]] == [60] * (WORKERS - 1)


def test_the_model_is_that_of_its_keepers() -> None:
    problem = equal_start(WORKERS)
    simulator = simulate(APSGD(), problem, Cluster(compute_seconds=1.0, jitter="lognormal", jitter_scale=0.1))
    simulator.run(gradient_of(problem), 0.02, 400)
    (kept,) = simulator.consensus().buffers
    server = simulator.workers[SERVER].x
    assert isinstance(server, Vector)
    assert torch.equal(kept, server.buffers[0])
    assert simulator.consensus_distance() == 0.0
    trained = list(range(1, WORKERS))
    optimum = (problem.a * problem.b)[trained].sum(0) / problem.a[trained].sum(0)
    assert float((kept - optimum).abs().max()) < 0.3  # the last gradients weigh most


# -- contracts of all --------------------------------------------------------------------------------------------------


@every_method
def test_it_ends_under_heavy_tails_and_with_the_same_bits(method: AbstractAlgorithm) -> None:
    problem = Quadratic(WORKERS)
    runs = []
    for seed in (3, 3, 4):
        simulator = simulate(method, problem, replace(JITTERED, jitter_scale=0.8), seed)
        simulator.run(gradient_of(problem), RATE, 25)
        assert [w.step for w in simulator.workers if method.trains(w.rank)] == [25] * len(
            [w for w in simulator.workers if method.trains(w.rank)]
        )
        assert bool(stacked(simulator).isfinite().all())
        runs.append(simulator)
    assert torch.equal(stacked(runs[0]), stacked(runs[1]))
    assert runs[0].traffic == runs[1].traffic
    assert runs[0].seconds == runs[1].seconds != runs[2].seconds


@every_method
def test_stop_and_resume_equals_going_on(method: AbstractAlgorithm) -> None:
    """In the middle of what takes several steps, too: a checkpoint rests first."""
    problem = Quadratic(WORKERS)
    gradient = gradient_of(problem)
    paused = simulate(method, problem, JITTERED, seed=2)
    paused.run(gradient, RATE, 11)
    checkpoint = copy.deepcopy(paused.state_dict())
    paused.run(gradient, RATE, 14)
    resumed = simulate(method, problem, JITTERED, seed=99)
    resumed.run(gradient, 0.7, 3)
    resumed.load_state_dict(checkpoint)
    resumed.run(gradient, RATE, 14)
    assert torch.equal(stacked(resumed), stacked(paused))
    assert (resumed.seconds, resumed.traffic) == (paused.seconds, paused.traffic)


def test_a_rest_ends_what_is_under_way() -> None:
    problem = Quadratic(WORKERS)
    simulator = simulate(DelayedAverage(), problem)
    simulator.run(gradient_of(problem), RATE, 6)
    (before,) = (x for made, x in enumerate(delayed_average(problem, 6), 1) if made == 6)
    assert_equal(stacked(simulator), before)
    sent = next(x for made, x in enumerate(delayed_average(problem, 6), 1) if made == 5)
    simulator.rest()
    assert_equal(stacked(simulator), before + sent.mean(0) - sent)
    assert not any("ticket" in worker.state for worker in simulator.workers)


def test_a_checkpoint_of_a_method_that_does_not_rest_is_refused() -> None:
    problem = Quadratic(WORKERS)
    simulator = simulate(Restless(), problem)
    simulator.run(gradient_of(problem), RATE, 6)
    with pytest.raises(ProtocolError, match=r"Restless.*worker.state\['ticket'\].*step 6.*`rest`"):
        simulator.state_dict()

    class Unread(OneWay):
        async def rest(self, worker: Worker) -> None:
            pass

    simulator = simulate(Unread(), problem)
    simulator.run(gradient_of(problem), RATE, 3)
    with pytest.raises(ConfigurationError, match="sent by worker 5 with tag 0 that worker 0 has not received"):
        simulator.state_dict()


@every_method
def test_the_planner_counts_gradients_and_sends_the_same_bytes(method: AbstractAlgorithm) -> None:
    start = [Vector([torch.zeros(40)]) for _ in range(WORKERS)]
    planned = plan(method, WORKERS, start[0].num_bytes, UNEVEN, steps=10)
    period = method.period(WORKERS)
    steps = -(-2 // period) * period + -(-10 // period) * period
    simulator = Simulator(method, start, UNEVEN)
    for worker in simulator.workers:
        worker.read_gradient = worker.x.clone
    for _ in simulator.demands(steps):
        pass
    gradients = steps * sum(method.trains(rank) for rank in range(WORKERS))
    assert planned.bytes_per_step * gradients == pytest.approx(sum(each.bytes_sent for each in simulator.traffic))
    assert planned.seconds_per_step > 0
    if isinstance(method, APSGD | QueuedAPSGD):  # nobody waits for anybody
        assert planned.steps_per_second == pytest.approx(sum(1 / UNEVEN.slowdown[rank] for rank in range(1, WORKERS)))


def test_a_message_costs_what_its_links_say() -> None:
    """One way: header and what asks for it, then the message; the sender goes on when it has left."""

    class Once(AbstractMethod):
        async def step(self, worker: Worker) -> None:
            if worker.rank == 0:
                await Send(1, worker.x)
            else:
                await Receive(0, like=worker.x)
            await Gradient()

    cluster = Cluster(compute_seconds=0.0, bandwidth_bytes_per_second=1000.0, latency_seconds=0.25)
    simulator = Simulator(Once(), [SizeOnlyVector(1000)] * 2, cluster)
    for _ in simulator.demands(1):
        pass
    assert [each.exposed_seconds for each in simulator.traffic] == pytest.approx([1.5, 1.75])
    assert [(each.bytes_sent, each.messages) for each in simulator.traffic] == [(1000, 1), (0, 0)]


def test_an_all_reduce_of_some_workers_costs_a_ring_of_theirs() -> None:
    class Some(AbstractMethod):
        async def step(self, worker: Worker) -> None:
            if worker.rank in (1, 3, 4):
                await AllReduce(worker.x, among=(4, 1, 3))
            await Gradient()

    cluster = Cluster(compute_seconds=0.0, bandwidth_bytes_per_second=1000.0, slow_links={0: 9.0, 3: 2.0})
    simulator = Simulator(Some(), [SizeOnlyVector(900)] * 6, cluster)
    for _ in simulator.demands(1):
        pass
    assert [each.bytes_sent for each in simulator.traffic] == [0, 1200, 0, 1200, 1200, 0]
    assert simulator.seconds == pytest.approx(2 * 1.2)  # twice 2/3 of it, on a link that is half as fast


# -- ends and failures -------------------------------------------------------------------------------------------------


def test_whoever_waits_in_vain_is_told_at_the_end_of_a_run() -> None:
    told: list[tuple[int, bool]] = []

    class Waiting(AbstractMethod):
        async def step(self, worker: Worker) -> None:
            if worker.rank == 0 and worker.step == 2:
                told.append((worker.step, await Until(lambda: False)))
                return
            await Gradient()
            await LocalStep()

    simulator = simulate(Waiting(), Quadratic(3))
    simulator.run(gradient_of(Quadratic(3)), RATE, 5)
    assert told == [(2, False)]
    assert [worker.step for worker in simulator.workers] == [2, 5, 5]  # it has made two


def test_a_condition_that_can_never_hold_is_named() -> None:
    problem = Quadratic(WORKERS)
    with pytest.raises(DeadlockError) as error:
        simulate(BackupWorkers(WORKERS), problem).run(gradient_of(problem), RATE, 5)
    message = str(error.value)
    assert "worker 0, step 0, waits for its `Until`: `BackupWorkers.serve.<locals>.<lambda>`" in message
    assert "worker 0, in its answer to worker 3, waits for its `Until`: `BackupWorkers.on_call." in message
    assert "methods.py" in message
    assert "worker 3, step 0, waits for worker 0 to answer its call" in message


def test_a_condition_holds_when_it_is_answered() -> None:
    """Two answers wait for one thing, and the first takes it."""

    @dataclass(frozen=True)
    class Taken(AbstractServed):
        def init(self, worker: Worker) -> None:
            worker.state.update(heard=0, tokens=0)

        async def serve(self, worker: Worker) -> None:
            state = worker.state
            heard = state["heard"]
            await Until(lambda: state["heard"] > heard)
            state["tokens"] += 1

        async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
            state = worker.state
            state["heard"] += 1
            if await Until(lambda: state["tokens"] > 0):
                assert state["tokens"] > 0
                state["tokens"] -= 1
            return worker.x

    problem = equal_start(WORKERS)
    simulator = simulate(Taken(), problem)  # all gradients come at the same time
    simulator.run(gradient_of(problem), RATE, 6)
    assert [worker.step for worker in simulator.workers[1:]] == [6] * (WORKERS - 1)


def test_a_lost_worker_is_reported_or_survived() -> None:
    problem = equal_start(WORKERS)
    lost = replace(UNEVEN, failures={3: 7.3})
    for method in (BackupWorkers(5), StaleSynchronous(2)):
        with pytest.raises(PeerLost, match=r"wait in `Until`, and workers \[3\] died") as error:
            simulate(method, problem, lost).run(gradient_of(problem), RATE, 40)
        assert error.value.ranks == (3,)
    for method in (BackupWorkers(3), TolerantBackupWorkers(5)):
        simulator = simulate(method, problem, lost)
        if isinstance(method, TolerantBackupWorkers):
            simulator.run(gradient_of(problem), RATE, 40)
            assert [worker.step for worker in simulator.workers[1:] if worker.rank != 3] == [40] * (WORKERS - 2)
    with pytest.raises(PeerLost) as error:
        simulate(APSGD(), problem, replace(UNEVEN, failures={SERVER: 7.3})).run(gradient_of(problem), RATE, 40)
    assert error.value.ranks == (SERVER,)
    for together in (OwnRing(), OneWay(), Sites(), DelayedAverage()):
        with pytest.raises(PeerLost) as error:
            simulate(together, problem, lost).run(gradient_of(problem), RATE, 40)
        assert error.value.ranks == (3,)


def test_a_server_that_is_lost_while_its_answer_waits_is_reported() -> None:
    problem = equal_start(WORKERS)
    with pytest.raises(PeerLost) as error:
        simulate(BackupWorkers(5), problem, replace(UNEVEN, failures={SERVER: 1.5})).run(gradient_of(problem), RATE, 40)
    assert error.value.ranks == (SERVER,)


# -- what is refused ---------------------------------------------------------------------------------------------------

Step = Callable[[Worker], Any]


@dataclass(frozen=True)
class Script(AbstractMethod):
    """A step that is one function."""

    function: Step

    async def step(self, worker: Worker) -> None:
        await self.function(worker)


@dataclass(frozen=True)
class Server(AbstractServed):
    """A server whose step, or answer, is one function."""

    serving: Step | None = None
    answering: Step | None = None

    async def serve(self, worker: Worker) -> None:
        await (self.serving(worker) if self.serving else super().serve(worker))

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        answer = await self.answering(worker) if self.answering else None
        worker.state["heard"] += 1
        return worker.x if answer is None else answer


async def until_in_a_coroutine(worker: Worker) -> None:
    async def inside() -> None:
        await Until(lambda: True)

    await (await Start(inside()))
    await Gradient()


async def until_of_a_value(worker: Worker) -> None:
    await Until(True)  # type: ignore[arg-type]
    await Gradient()


async def send_to_itself(worker: Worker) -> None:
    await Send(worker.rank, worker.x)
    await Gradient()


async def receive_from_nobody(worker: Worker) -> None:
    await Receive(99, like=worker.x)
    await Gradient()


async def receive_of_another_form(worker: Worker) -> None:
    await Gradient()
    if worker.rank == 0:
        await Send(1, worker.x.beside(worker.x.new_numbers(1.0)), tag=4)
    elif worker.rank == 1:
        await Receive(0, like=worker.x, tag=4)


async def all_reduce_without_itself(worker: Worker) -> None:
    await AllReduce(worker.x, among=tuple(rank for rank in range(worker.world_size) if rank != worker.rank))
    await Gradient()


async def all_reduce_of_negative_weight(worker: Worker) -> None:
    await Gradient()
    await AllReduce(worker.x, weight=-1.0)


async def all_reduce_of_no_weight(worker: Worker) -> None:
    await Gradient()
    await AllReduce(worker.x, weight=0.0)


async def update_of_what_is_sent(worker: Worker) -> None:
    await Gradient()
    direction = worker.x.zeros_like()
    ticket = await Start(Send((worker.rank + 1) % worker.world_size, direction))
    await LocalStep(gradient=direction)
    await ticket


async def wait_again(worker: Worker) -> None:
    while not await Until(lambda: False):
        pass


async def wait_again_at_the_end(worker: Worker) -> None:
    if worker.state["heard"] > 3:
        await wait_again(worker)


async def gradient(worker: Worker) -> None:
    await Gradient()


async def nothing(worker: Worker) -> None:
    pass


async def always(worker: Worker) -> None:
    await Until(lambda: True)


async def update_of_nothing(worker: Worker) -> None:
    await LocalStep()


async def communicate(worker: Worker) -> None:
    await AllReduce(worker.x)


async def undeclared(worker: Worker) -> AbstractVector:
    return worker.x.beside(worker.x)


async def no_vector(worker: Worker) -> Any:
    return 3.0


@dataclass(frozen=True)
class UndeclaredCall(AbstractServed):
    async def step(self, worker: Worker) -> None:
        if worker.rank != SERVER:
            await Call(SERVER, worker.x.beside(worker.x.new_numbers(1.0)))
        await super().step(worker)


@dataclass(frozen=True)
class InParts(APSGD):
    answers_in_parts = True


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Script(until_in_a_coroutine), "Script got, in step 0 of worker 0, `Until` in the started coroutine `inside`"),
        (Script(until_of_a_value), "`Until` of True"),
        (Script(send_to_itself), "`Send` with to=(0,)"),
        (Script(receive_from_nobody), "`Receive` with source=(99,)"),
        (Script(receive_of_another_form), "in step 0 of worker 1, `Receive` of a vector of"),
        (Script(all_reduce_without_itself), "`AllReduce` with among=(1, 2, 3)"),
        (Script(all_reduce_of_negative_weight), "`AllReduce` with weight=-1.0"),
        (Script(all_reduce_of_no_weight), "with weight 0 on all of them"),
        (Script(update_of_what_is_sent), "which may clip its gradient, while a `Send` sends that vector"),
        (Server(serving=wait_again), "in step 0 of worker 0, `Until` again, after it was answered with False"),
        (Server(serving=gradient), "`Gradient`; it needs none of a worker for which `trains(0)` is False"),
        (Server(serving=nothing), "a step that waits for nothing, of a worker that does not train"),
        (Server(serving=always), "a condition that always holds"),
        (Server(serving=update_of_nothing), "`LocalStep` before `Gradient`"),
        (Server(answering=update_of_nothing), "`LocalStep` in its `on_call` of worker 1"),
        (Server(answering=communicate), "`AllReduce` in its `on_call` of worker 1"),
        (Server(answering=wait_again_at_the_end), "`Until` again"),
        (Server(answering=undeclared), "an answer to the `Call` of worker 1"),
        (Server(answering=no_vector), "a float as the answer to a `Call` of worker 1"),
        (UndeclaredCall(), "UndeclaredCall got, in step 0 of worker 1, `Call` with 40 bytes"),
        (InParts(), "`LocalStep` in its `on_call`, which answers worker 1 at once"),
    ],
    ids=lambda value: "" if isinstance(value, str) else told(value),
)
def test_what_a_word_may_not_do_is_refused(method: AbstractAlgorithm, words: str) -> None:
    with pytest.raises(ProtocolError) as error:
        simulate(method, Quadratic(4, 4), Cluster()).run(gradient_of(Quadratic(4, 4)), RATE, 2)
    assert words in str(error.value)
    assert type(method).__name__ in str(error.value)
    assert "step" in str(error.value)


def test_a_rest_that_updates_is_refused() -> None:
    class Updates(AbstractMethod):
        async def step(self, worker: Worker) -> None:
            await Gradient()

        async def rest(self, worker: Worker) -> None:
            await LocalStep(gradient=worker.x)

    with pytest.raises(ProtocolError, match="Updates got, in step 0 of worker 0, `LocalStep` in its `rest`"):
        simulate(Updates(), Quadratic(2)).rest()


def test_a_method_of_which_nobody_trains_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="APSGD got 1 workers, of which none trains"):
        simulate(APSGD(), Quadratic(1))


def test_who_needs_doubly_stochastic_weights_says_so_before_training() -> None:
    graph = directed(WORKERS)
    assert (graph.stochastic, Ring(WORKERS).stochastic) == ("column", "doubly")
    for make in (Tracking, DPSGD, D2):
        with pytest.raises(TopologyError, match=f"{make.__name__} needs a doubly stochastic topology, got Directed"):
            make(graph)
    for targets, words in (
        ([[1], [0, 3]], "targets from 0 to 1, got 3"),
        ([[1], []], "a way from every worker to all others, got 2 parts"),
        ([[]], "at least 2 workers, got 1"),
    ):
        with pytest.raises(TopologyError, match=words):
            DirectedGraph(targets)


def test_push_sum_agrees_as_fast_as_its_graph_says() -> None:
    graph = directed(WORKERS)
    values, weights = torch.arange(WORKERS).double(), torch.ones(WORKERS).double()
    rounds = graph.rounds_to_consensus(1e-6)
    assert isinstance(rounds, int)
    for _ in range(rounds):
        values, weights = graph.mixing_matrix() @ values, graph.mixing_matrix() @ weights
    assert float((values / weights - 2.5).abs().max()) < 1e-5


def test_synchronous_sgd_is_the_ring_of_ones_own() -> None:
    problem = equal_start(WORKERS)
    one, other = (simulate(method, problem, JITTERED) for method in (SyncSGD(), OwnRing()))
    for simulator in (one, other):
        simulator.run(gradient_of(problem), RATE, 20)
    assert_equal(stacked(one), stacked(other))


@dataclass(frozen=True)
class Asks(AbstractMethod, AbstractAsynchronousAlgorithm):
    """Worker 1 calls with its model, which its update changes while the call is under way."""

    may_change: bool

    def peers(self, rank: int) -> tuple[int, ...]:
        return (0,) if rank == 1 else ()

    def init(self, worker: Worker) -> None:
        worker.state["heard"] = []

    async def step(self, worker: Worker) -> None:
        call = await Start(Call(0, worker.x, may_change=self.may_change)) if worker.rank == 1 else None
        await Gradient()
        await LocalStep()
        if call is not None:
            await call

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        worker.state["heard"].append(theirs.clone())
        return theirs


def test_a_call_sends_what_may_change_as_it_was() -> None:
    def run(may_change: bool) -> list[Any]:
        start = [Vector([torch.tensor([1.0 + rank, 5.0])]) for rank in range(2)]
        slow = Cluster(compute_seconds=1.0, bandwidth_bytes_per_second=1.0)
        simulator = Simulator(Asks(may_change), start, slow)
        simulator.run(lambda worker: Vector([torch.ones(2)]), 1.0, 2)
        return [heard.buffers[0].tolist() for heard in simulator.workers[0].state["heard"]]

    assert run(may_change=True) == [[2.0, 5.0], [1.0, 4.0]]
    with pytest.raises(ProtocolError, match="`LocalStep`, which changes its vector, while a `Call` sends that vector"):
        run(may_change=False)
