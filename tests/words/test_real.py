"""Proved here: each word of the protocol means on real workers, over gloo, what it means in the simulator: methods of a
few lines have the same values step by step, on one host, on two, and each worker on its own; who waits in vain is told
so when the others have come to their end; a worker that is killed while others wait is named within seconds."""

from __future__ import annotations

import copy
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.quadratic import Quadratic
from reference.runs import equal_start, gradient_of, simulate, stacked

from lightning_decentral.engine.rest import come_to_rest
from lightning_decentral.engine.serving import serve
from lightning_decentral.errors import PeerLost
from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, Receive, Send, Until
from lightning_decentral.topology import Ring
from lightning_decentral.worker import Worker
from words.methods import (
    APSGD,
    SERVER,
    AbstractMethod,
    Anchored,
    BackupWorkers,
    DelayedAverage,
    OneWay,
    OwnRing,
    PushSum,
    QueuedAPSGD,
    Sites,
    StaleSynchronous,
    Tracking,
    directed,
)
from words.real import RATE, Loop, connected, run_workers

pytestmark = pytest.mark.early

WORKERS, STEPS = 4, 13
HOSTS = (0, 1, 2)
TOGETHER = (
    *(PushSum(directed(WORKERS)), DelayedAverage(), OwnRing(), OneWay(), Tracking(Ring(WORKERS)), Sites()),
    Anchored(),
)
SERVED = (APSGD(), QueuedAPSGD(), BackupWorkers(2), StaleSynchronous(2))


def name_of(method: AbstractAlgorithm) -> str:
    return type(method).__name__


# -- together ----------------------------------------------------------------------------------------------------------


def together(rank: int, workers: int) -> dict[tuple[str, int], Any]:
    results = {}
    for hosts in HOSTS:
        for method in TOGETHER:
            communicator = connected(rank, hosts)
            loop = Loop(method, Quadratic(workers), communicator)
            xs = []
            for _ in range(STEPS):
                assert loop.step()
                xs.append(loop.x)
            come_to_rest(communicator, [loop.stepper], "the end")
            results[name_of(method), hosts] = (torch.stack(xs), loop.x, communicator.traffic.bytes_sent)
            communicator.barrier()
            communicator.close()
    return results


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    return run_workers(WORKERS, together, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("hosts", HOSTS, ids=["each on its own", "one host", "two hosts"])
@pytest.mark.parametrize("method", TOGETHER, ids=name_of)
def test_real_workers_have_the_values_of_the_simulator(
    method: AbstractAlgorithm, hosts: int, real: list[dict[tuple[str, int], Any]]
) -> None:
    problem = Quadratic(WORKERS)
    simulator = simulate(method, problem)
    got = [result[name_of(method), hosts] for result in real]
    for step in range(STEPS):
        simulator.run(gradient_of(problem), RATE, 1)
        torch.testing.assert_close(torch.stack([xs[step] for xs, _, _ in got]), stacked(simulator), rtol=0, atol=1e-12)
    simulator.rest()
    torch.testing.assert_close(torch.stack([x for _, x, _ in got]), stacked(simulator), rtol=0, atol=1e-12)
    assert [sent for _, _, sent in got] == [traffic.bytes_sent for traffic in simulator.traffic]


# -- a server ----------------------------------------------------------------------------------------------------------


def served(rank: int, workers: int) -> dict[tuple[str, int], Any]:
    results = {}
    for hosts in (0, 1):
        for method in SERVED:
            communicator = connected(rank, hosts)
            loop = Loop(method, equal_start(workers), communicator)
            epochs = []
            for _ in range(2):
                if rank == SERVER:
                    serve(loop.stepper, loop.update)
                else:
                    for _ in range(STEPS if rank < workers - 1 else STEPS + 3):
                        assert loop.step()
                come_to_rest(communicator, [loop.stepper], "the end of an epoch")
                state = copy.deepcopy({k: value for k, value in loop.stepper.worker.state.items() if k != "total"})
                epochs.append((loop.x, loop.stepper.worker.step, state))
                communicator.barrier()  # the calls of the next epoch come after this
            results[name_of(method), hosts] = epochs, communicator.traffic.calls_answered
            communicator.close()
    return results


@pytest.fixture(scope="module")
def real_served(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    return run_workers(WORKERS, served, tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("hosts", [0, 1], ids=["each on its own", "one host"])
@pytest.mark.parametrize("method", SERVED, ids=name_of)
def test_a_server_answers_now_or_later_until_all_have_come_to_their_end(
    method: AbstractAlgorithm, hosts: int, real_served: list[dict[tuple[str, int], Any]]
) -> None:
    results = [result[name_of(method), hosts] for result in real_served]
    calls = 3 * STEPS + 3
    for epoch in (0, 1):
        steps = [epochs[epoch][1] for epochs, _ in results]
        states = [epochs[epoch][2] for epochs, _ in results]
        assert steps[1:] == [STEPS * (epoch + 1)] * 2 + [(STEPS + 3) * (epoch + 1)]
        server = states[SERVER]
        if isinstance(method, BackupWorkers):
            full = server["used"]
            assert sum(full) + server["dropped"] == calls * (epoch + 1)
            assert len(full) == steps[SERVER] == server["round"]
            assert set(full) <= {1, 2}
        else:
            assert steps[SERVER] == calls * (epoch + 1)
        if isinstance(method, StaleSynchronous):
            assert server["lead"] <= max(method.bound, 3 * (epoch + 1))  # of the one that makes more steps, at the end
    assert results[SERVER][1] == 2 * calls


# -- failures ----------------------------------------------------------------------------------------------------------

LOST = 3
WITHIN_SECONDS = 45.0  # of the killing: below the time-out; 3 until a heart is taken for lost, and 2 until it is named


async def in_until(worker: Worker) -> None:
    await Until(lambda: False)


async def in_receive(worker: Worker) -> None:
    await Receive(LOST, like=worker.x)


async def in_all_reduce(worker: Worker) -> None:
    await AllReduce(worker.x, among=(0, 1, 2, LOST) if worker.rank else (0, LOST))


@dataclass(frozen=True)
class Waits(AbstractMethod):
    """Workers that wait for something at the third step; one is killed there."""

    function: Any

    async def step(self, worker: Worker) -> None:
        if worker.step == 2:
            if worker.rank == LOST:
                os.kill(os.getpid(), signal.SIGKILL)
            await self.function(worker)
        await Gradient()


@dataclass(frozen=True)
class LostTrainer(BackupWorkers):
    """A server that waits for all three, of whom one is killed: answers wait, and calls."""

    quorum: int = 3

    async def step(self, worker: Worker) -> None:
        if worker.rank == LOST and worker.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        await super().step(worker)


@dataclass(frozen=True)
class LostServer(BackupWorkers):
    """A server that is killed while it holds all calls."""

    quorum: int = 4

    async def serve(self, worker: Worker) -> None:
        if worker.state["heard"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        await Until(lambda: worker.state["heard"] == 3)


def lose(method: AbstractAlgorithm, rank: int, workers: int) -> tuple[str, tuple[int, ...], float]:
    communicator = connected(rank, 1)
    began = time.monotonic()
    try:
        loop = Loop(method, equal_start(workers), communicator)
        if method.trains(rank):
            for _ in range(5):
                loop.step()
        else:
            serve(loop.stepper, loop.update)
        communicator.barrier()
        return "nothing", (), 0.0
    except PeerLost as error:
        ends = str(error), error.ranks, time.monotonic() - began
    communicator.close(failed=True)
    return ends


@pytest.mark.parametrize(
    ("method", "lost"),
    [
        *((Waits(function), LOST) for function in (in_until, in_receive, in_all_reduce)),
        (LostTrainer(), LOST),
        (LostServer(), SERVER),
    ],
    ids=["until", "receive", "all-reduce", "a trainer", "a server"],
)
def test_a_worker_that_is_killed_while_others_wait_is_named(
    method: AbstractAlgorithm, lost: int, tmp_path: Path
) -> None:
    ends = run_workers(WORKERS, partial(lose, method), tmp_path, dies=[lost], seconds=150.0)
    for end in (end for rank, end in enumerate(ends) if rank != lost):
        message, ranks, seconds = end
        assert message.startswith(f"Lost worker {lost} on"), message
        assert ranks == (lost,)
        assert seconds < WITHIN_SECONDS


@dataclass(frozen=True)
class WaitsForAll(Waits):
    """Each waits for a condition that never holds."""

    async def step(self, worker: Worker) -> None:
        await Gradient()
        if worker.step == 2:
            await Until(lambda: False)


def wait_for_ever(rank: int, workers: int) -> str:
    communicator = connected(rank, 1)
    loop = Loop(WaitsForAll(None), equal_start(workers), communicator)
    try:
        for _ in range(5):
            loop.step()
        text = "nothing"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    communicator.close(failed=True)
    return text


def test_who_waits_for_each_other_for_ever_is_told_so(tmp_path: Path) -> None:
    for message in run_workers(WORKERS, wait_for_ever, tmp_path, seconds=150.0):
        assert "DeadlockError: Nobody can go on:" in message
        for rank in range(WORKERS):
            assert f"worker {rank}, step 2, waits for its `Until`: `WaitsForAll.step.<locals>.<lambda>`" in message


# -- what is refused ---------------------------------------------------------------------------------------------------


async def receive_of_another_form(worker: Worker) -> None:
    if worker.rank == 0:
        await Send(1, worker.x.beside(worker.x.new_numbers(1.0)), tag=4)
    else:
        await Receive(0, like=worker.x, tag=4)


async def no_weight(worker: Worker) -> None:
    await AllReduce(worker.x, weight=0.0)


async def what_nobody_receives(worker: Worker) -> None:
    if worker.rank == 0:
        await Send(1, worker.x, tag=7)


REFUSED = {
    receive_of_another_form: "ProtocolError: Script got, in step 0 of worker 1, `Receive` of a vector of",
    no_weight: "ProtocolError: `AllReduce` got weight 0 on all workers",
    what_nobody_receives: "ProtocolError: Script got, in step 1 of worker 0, a vector sent with tag 7 that worker 1",
}


@dataclass(frozen=True)
class Script(AbstractMethod):
    """A step that is one function."""

    function: Any

    async def step(self, worker: Worker) -> None:
        await self.function(worker)
        await Gradient()


def refuse(rank: int, workers: int) -> list[str]:
    texts = []
    for function in REFUSED:
        communicator = connected(rank, 1)
        try:
            loop = Loop(Script(function), equal_start(workers), communicator)
            loop.step()
            come_to_rest(communicator, [loop.stepper], "the end")
            communicator.barrier()  # the other one tells what it has refused
            texts.append("nothing")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
            assert communicator.watch is not None
            communicator.watch.publish(error)
        communicator.close(failed=True)
    return texts


def test_what_a_word_may_not_do_is_refused(tmp_path: Path) -> None:
    results = run_workers(2, refuse, tmp_path, seconds=150.0)
    for each, words in zip(zip(*results, strict=True), REFUSED.values(), strict=True):
        assert any(text.startswith(words) for text in each), each
