"""Proved here: what the protocol allows gives the same values on real workers, over TCP and in shared memory, and in
the simulator, however many exchanges are under way; what it forbids is refused by real workers, the simulator, virtual
workers of Lightning and the planner, with words that name the method, the word and the step."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ports import free_port
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral import SimulatedStrategy, protocol
from lightning_decentral.averaging import neighbor_average, neighbor_exchange
from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ProtocolError
from lightning_decentral.flat import SizeOnlyVector, Vector
from lightning_decentral.planning.planner import plan
from lightning_decentral.protocol import (
    VOCABULARY,
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AbstractRequest,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    NeighborAverage,
    NeighborExchange,
    Start,
)
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import Complete, Ring
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings
from lightning_decentral.worker import Worker
from strategies.fits import Indices, Recorder, gossip, make_trainer

pytestmark = pytest.mark.usefixtures("kept_forks")

WORKERS, SIZE, STEPS = 3, 4, 4
Step = Callable[[Worker], Awaitable[None]]


class Climb(LightningModule):
    """Worker r's gradient is r + 1 in each coordinate, so its weights tell which updates and averages were made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum() * (1.0 + self.global_rank)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(Indices(4096), batch_size=1)


@dataclass(frozen=True)
class Script(AbstractAlgorithm):
    """A method that is one function; remembers one vector of its own and what it has seen."""

    function: Step

    def resolved(self, world_size: int) -> Script:
        return self

    def init(self, worker: Worker) -> None:
        other = worker.state["other"] = worker.x.zeros_like()
        if isinstance(other, Vector):
            other.buffers[0].fill_(float(worker.rank))
        worker.state["log"] = []

    async def step(self, worker: Worker) -> None:
        await self.function(worker)


@dataclass(frozen=True)
class Asynchronous(AbstractAsynchronousAlgorithm):
    """The same with calls to everybody."""

    function: Step

    def resolved(self, world_size: int) -> Asynchronous:
        return self

    def init(self, worker: Worker) -> None:
        worker.state["log"] = []
        worker.state["other"] = worker.x.zeros_like()

    def peers(self, rank: int) -> tuple[int, ...]:
        return (1, 2) if rank == 0 else ()

    async def on_call(self, worker: Worker, source: int, theirs: Any) -> Any:
        return theirs

    async def step(self, worker: Worker) -> None:
        await self.function(worker)


# -- what is allowed ---------------------------------------------------------------------------------------------------


def mean(worker: Worker, value: Any) -> NeighborAverage:
    return neighbor_average(worker, Complete(worker.world_size), value)


def others(worker: Worker) -> tuple[int, ...]:
    return tuple(rank for rank in range(worker.world_size) if rank != worker.rank)


def note(worker: Worker, *values: Any) -> None:
    """Keep the first number of each vector, if it has values."""
    worker.state["log"].append([float(value.buffers[0][0]) for value in values if isinstance(value, Vector)])


async def two_averages(worker: Worker) -> None:
    first = await Start(mean(worker, worker.state["other"]))
    second = await Start(mean(worker, worker.x))
    await Gradient()
    await first
    note(worker, worker.state["other"], worker.x)
    await second
    note(worker, worker.state["other"], worker.x)
    await LocalStep()
    worker.state["other"].add_(worker.x)


async def in_another_order(worker: Worker) -> None:
    third = worker.x.clone()
    tickets = [await Start(mean(worker, value)) for value in (worker.state["other"], worker.x, third)]
    await Gradient()
    for ticket in reversed(tickets):
        await ticket
        await ticket  # twice is once
        note(worker, worker.state["other"], worker.x, third)
    await LocalStep()
    worker.state["other"].add_(worker.x)


async def exchanges_are_kept(worker: Worker) -> None:
    """Three are begun; what they received stays what it was while there are more exchanges, of the step and others."""
    messages = [worker.x.clone().add_(worker.state["other"], alpha=k) for k in (1.0, 2.0, 3.0)]
    ring = Ring(worker.world_size)
    tickets = [await Start(neighbor_exchange(worker, ring, message)) for message in messages]
    at_once = await neighbor_exchange(worker, ring, worker.x)
    await Gradient()
    received = [await ticket for ticket in tickets]
    again = await neighbor_exchange(worker, ring, worker.x)
    for each in (*received, at_once, again):
        note(worker, *(each[rank] for rank in sorted(each)))
    await mean(worker, worker.state["other"])
    await LocalStep()
    for each in (*received, at_once, again):
        note(worker, *(each[rank] for rank in sorted(each)))
    worker.state["other"].add_(worker.x)


async def coroutines_beside_the_step(worker: Worker) -> None:
    async def swap(value: Any) -> Any:
        received = await neighbor_exchange(worker, Ring(worker.world_size), value)
        await mean(worker, value)
        return received

    first, second = worker.x.clone(), worker.state["other"]
    tickets = [await Start(swap(first)), await Start(swap(second)), await Start(mean(worker, worker.x))]
    await Gradient()
    answers = [await tickets[1], await tickets[0]]
    await tickets[2]
    note(worker, first, second, worker.x, *(answer[rank] for answer in answers for rank in sorted(answer)))
    await LocalStep()
    second.add_(worker.x)


async def tickets_over_several_steps(worker: Worker) -> None:
    """What was begun in a step is awaited two steps later; meanwhile others are begun, and ended."""
    state = worker.state
    if worker.step % 3 == 0:
        state["sum"] = worker.x.clone()
        state["sent"] = worker.x.clone()
        state["ticket"] = await Start(AllReduce(state["sum"]))
        state["exchange"] = await Start(neighbor_exchange(worker, Ring(worker.world_size), state["sent"]))
    average = await Start(mean(worker, worker.x))
    await Gradient()
    await average
    await LocalStep()
    if worker.step % 3 == 2:
        total = await state.pop("ticket")
        received = await state.pop("exchange")
        note(worker, total, *(received[rank] for rank in sorted(received)))


async def gradients_are_read_twice(worker: Worker) -> None:
    await Gradient()
    assert worker.gradient is worker.gradient
    worker.gradient.mul_(0.5)
    note(worker, worker.gradient)
    await LocalStep()
    note(worker, worker.gradient, worker.x)
    await mean(worker, worker.x.beside(worker.state["other"]))


async def no_update(worker: Worker) -> None:
    await Gradient()
    await mean(worker, worker.x)


ALLOWED = (
    two_averages,
    in_another_order,
    exchanges_are_kept,
    coroutines_beside_the_step,
    tickets_over_several_steps,
    gradients_are_read_twice,
    no_update,
)


def simulated(function: Step) -> tuple[list[Any], Tensor]:
    """What every worker notes, and its weights, in the simulator, where workers are of unequal speed."""
    start = [Vector([torch.zeros(SIZE, dtype=torch.float64)]) for _ in range(WORKERS)]
    cluster = Cluster(jitter="lognormal", bandwidth_bytes_per_second=100.0, latency_seconds=0.2, slowdown={1: 3.0})
    simulator = Simulator(algorithm_of(function), start, cluster)
    simulator.run(lambda worker: Vector([torch.full((SIZE,), 1.0 + worker.rank, dtype=torch.float64)]), 0.1, STEPS)
    weights = torch.stack([worker.x.buffers[0] for worker in simulator.workers])  # type: ignore[attr-defined]
    return [worker.state["log"] for worker in simulator.workers], weights


def algorithm_of(function: Step) -> AbstractAlgorithm:
    return Asynchronous(function) if function in OF_CALLS else Script(function)


def work(rank: int, port: int, folder: Path) -> None:
    """A real worker: what becomes of each script, in shared memory and over TCP."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS, timeout=timedelta(seconds=60))
    results: dict[tuple[str, bool], Any] = {}
    for near in (False, True):
        communicator = Communicator(
            ConnectionSettings(torch.device("cpu"), "127.0.0.1", 20.0, timedelta(seconds=60), shared_memory=near)
        )
        for function in (*ALLOWED, *FORBIDDEN, *OF_VALUES, *OF_CALLS):
            if near and function not in ALLOWED:
                continue
            results[function.__name__, near] = outcome(function, communicator)
            communicator.barrier()  # what a step that was refused has begun has come to its end
        communicator.barrier()
        communicator.close()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def outcome(function: Step, communicator: Communicator) -> Any:
    """The log and the weights of some steps; or the error."""
    weight = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    stepper = Stepper(algorithm_of(function), [weight], communicator, 0, seed=0)
    try:
        for _ in range(STEPS):
            stepper.begin()
            weight.grad = torch.full((SIZE,), 1.0 + communicator.rank, dtype=torch.float64)
            stepper.after_gradient()
            with stepper.updating() as wanted, torch.no_grad():
                if wanted:
                    weight.add_(weight.grad, alpha=-0.1)
            stepper.finish(wanted)
        return stepper.worker.state["log"], weight.detach().clone()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        stepper.flat.release()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, bool], Any]]:
    folder = tmp_path_factory.mktemp("real")
    port = free_port()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank, port, folder)) for rank in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORKERS)]


@pytest.mark.parametrize("near", [False, True], ids=["tcp", "shared memory"])
@pytest.mark.parametrize("function", ALLOWED)
def test_real_workers_do_what_the_simulator_does(
    function: Step, near: bool, real: list[dict[tuple[str, bool], Any]]
) -> None:
    logs, weights = simulated(function)
    for rank, results in enumerate(real):
        result = results[function.__name__, near]
        assert not isinstance(result, str), result
        log, weight = result
        assert len(log) == len(logs[rank])
        for mine, expected in zip(log, logs[rank], strict=True):
            assert mine == pytest.approx(expected, abs=1e-12)
        torch.testing.assert_close(weight, weights[rank], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("function", ALLOWED)
def test_virtual_workers_and_the_planner_take_what_is_allowed(function: Step, tmp_path: Path) -> None:
    virtual(function, tmp_path)
    planned(function)


# -- what is forbidden -------------------------------------------------------------------------------------------------


class Unknown(AbstractRequest[None]):
    """A word of somebody else's."""


async def gradient_twice(worker: Worker) -> None:
    await Gradient()
    await Gradient()


async def update_twice(worker: Worker) -> None:
    await Gradient()
    await LocalStep()
    await LocalStep()


async def update_first(worker: Worker) -> None:
    await LocalStep()
    await Gradient()


async def no_gradient(worker: Worker) -> None:
    await mean(worker, worker.x)


async def gradient_in_some_steps_only(worker: Worker) -> None:
    if worker.step < 2:
        await Gradient()


async def start_of_a_gradient(worker: Worker) -> None:
    await Start(Gradient())


async def start_of_an_update(worker: Worker) -> None:
    await Gradient()
    await (await Start(LocalStep()))


async def start_of_a_start(worker: Worker) -> None:
    await Start(Start(mean(worker, worker.x)))


async def start_of_a_function(worker: Worker) -> None:
    await Start(no_gradient)  # type: ignore[arg-type]


async def gradient_in_a_coroutine(worker: Worker) -> None:
    async def inside() -> None:
        await Gradient()

    ticket = await Start(inside())
    await Gradient()
    await ticket


async def start_in_a_coroutine(worker: Worker) -> None:
    async def inside() -> None:
        await Start(mean(worker, worker.x.clone()))

    ticket = await Start(inside())
    await Gradient()
    await ticket


async def ticket_in_a_coroutine(worker: Worker) -> None:
    first = await Start(mean(worker, worker.state["other"]))

    async def inside() -> None:
        await first

    ticket = await Start(inside())
    await Gradient()
    await ticket


async def unknown_word(worker: Worker) -> None:
    await Unknown()
    await Gradient()


async def unknown_word_in_a_coroutine(worker: Worker) -> None:
    async def inside() -> None:
        await Unknown()

    ticket = await Start(inside())
    await Gradient()
    await ticket


async def gradient_too_early(worker: Worker) -> None:
    _ = worker.gradient
    await Gradient()


async def gradient_of_the_last_step(worker: Worker) -> None:
    if worker.step > 1:
        _ = worker.gradient
    await Gradient()


async def two_averages_of_one(worker: Worker) -> None:
    first = await Start(mean(worker, worker.x))
    second = await Start(mean(worker, worker.x))
    await Gradient()
    await first
    await second


async def average_and_sum_of_one(worker: Worker) -> None:
    ticket = await Start(mean(worker, worker.state["other"]))
    await AllReduce(worker.state["other"])
    await Gradient()
    await ticket


async def sum_beside_the_gradient(worker: Worker) -> None:
    ticket = await Start(AllReduce(worker.x))
    await Gradient()
    await ticket


async def average_of_parameters_in_a_coroutine(worker: Worker) -> None:
    async def inside() -> None:
        await mean(worker, worker.x)

    ticket = await Start(inside())
    await Gradient()
    await ticket


async def average_is_awaited_while_its_vector_is_sent(worker: Worker) -> None:
    average = await Start(mean(worker, worker.x))
    exchange = await Start(neighbor_exchange(worker, Ring(worker.world_size), worker.x))
    await Gradient()
    await average
    await exchange


async def update_of_what_is_sent(worker: Worker) -> None:
    ticket = await Start(mean(worker, worker.x))
    await Gradient()
    await LocalStep()
    await ticket


async def ticket_is_let_go(worker: Worker) -> None:
    await Start(mean(worker, worker.state["other"]))
    await Gradient()
    await LocalStep()


async def coroutine_is_let_go(worker: Worker) -> None:
    async def inside() -> None:
        await mean(worker, worker.state["other"])

    await Start(inside())
    await Gradient()


async def update_at_a_vector_of_another_form(worker: Worker) -> None:
    await Gradient()
    await LocalStep(at=worker.x.beside(worker.state["other"]))


async def update_with_a_gradient_of_another_form(worker: Worker) -> None:
    await Gradient()
    await LocalStep(gradient=worker.x.beside(worker.state["other"]))


async def exchange_with_itself(worker: Worker) -> None:
    await NeighborExchange(worker.x, (worker.rank,), (worker.rank,))
    await Gradient()


async def exchange_with_nobody_there(worker: Worker) -> None:
    await NeighborExchange(worker.x, (worker.world_size,), ())
    await Gradient()


async def exchange_of_a_tensor(worker: Worker) -> None:
    await NeighborExchange(torch.zeros(SIZE), others(worker), others(worker))  # type: ignore[arg-type]
    await Gradient()


async def average_with_itself(worker: Worker) -> None:
    await NeighborAverage(worker.x, others(worker), 0.5, {worker.rank: 0.5})
    await Gradient()


async def call_of_a_synchronous_method(worker: Worker) -> None:
    await Call(others(worker)[0], worker.x)
    await Gradient()


FORBIDDEN: dict[Step, tuple[str, int]] = {  # what the message names, and the step
    gradient_twice: ("a second `Gradient`", 0),
    update_twice: ("a second `LocalStep`", 0),
    update_first: ("`LocalStep` before `Gradient`", 0),
    no_gradient: ("no `Gradient`", 0),
    gradient_in_some_steps_only: ("no `Gradient`", 2),
    start_of_a_gradient: ("`Start` of `Gradient`", 0),
    start_of_an_update: ("`Start` of `LocalStep`", 0),
    start_of_a_start: ("`Start` of `Start`", 0),
    start_of_a_function: ("`Start` of <function", 0),
    gradient_in_a_coroutine: ("`Gradient` in the started coroutine `inside`", 0),
    start_in_a_coroutine: ("`Start` in the started coroutine", 0),
    ticket_in_a_coroutine: ("Ticket` in the started coroutine", 0),
    unknown_word: ("the unknown word `Unknown`", 0),
    unknown_word_in_a_coroutine: ("the unknown word `Unknown`", 0),
    gradient_too_early: ("`worker.gradient` was read", 0),
    gradient_of_the_last_step: ("`worker.gradient` was read", 2),
    two_averages_of_one: ("`NeighborAverage` of a vector of which a `NeighborAverage` is under way", 0),
    average_and_sum_of_one: ("`AllReduce` of a vector of which a `NeighborAverage` is under way", 0),
    sum_beside_the_gradient: ("`AllReduce` of the parameters, begun before `Gradient`", 0),
    average_of_parameters_in_a_coroutine: ("`NeighborAverage` of the parameters, begun before `Gradient`", 0),
    average_is_awaited_while_its_vector_is_sent: ("while a `NeighborExchange` sends that vector", 0),
    update_of_what_is_sent: ("`LocalStep`, which changes its vector, while a `NeighborAverage`", 0),
    ticket_is_let_go: ("`NeighborAverage`, begun by `Start`, and no `await` of its ticket", 0),
    coroutine_is_let_go: ("`inside`, begun by `Start`, and no `await` of its ticket", 0),
    update_at_a_vector_of_another_form: ("`LocalStep` with `at=` a vector of", 0),
    update_with_a_gradient_of_another_form: ("`LocalStep` with `gradient=` a vector of", 0),
    exchange_with_itself: ("`NeighborExchange` with send_to=", 0),
    exchange_with_nobody_there: ("`NeighborExchange` with send_to=(3,)", 0),
    exchange_of_a_tensor: ("`NeighborExchange` of a Tensor", 0),
    average_with_itself: ("`NeighborAverage` with weights of=", 0),
    call_of_a_synchronous_method: ("`Call`", 0),
}


async def value_changes(worker: Worker) -> None:
    """Not by the planner, which knows no values."""
    ticket = await Start(mean(worker, worker.state["other"]))
    await Gradient()
    worker.state["other"].mul_(2.0)
    await ticket


async def part_is_under_way(worker: Worker) -> None:
    """Views of the same memory are the same vector."""
    both = worker.x.beside(worker.state["other"])
    first = await Start(mean(worker, both))
    second = await Start(mean(worker, worker.state["other"]))
    await Gradient()
    await first
    await second


OF_VALUES: dict[Step, tuple[str, int]] = {
    value_changes: ("`NeighborAverage` of a vector that has changed while it was under way", 0),
    part_is_under_way: ("`NeighborAverage` of a vector of which a `NeighborAverage` is under way", 0),
}


async def call_of_a_stranger(worker: Worker) -> None:
    if worker.rank == 0:
        await Call(0, worker.snapshot)
    await Gradient()


async def call_of_another_size(worker: Worker) -> None:
    if worker.rank == 0:
        await Call(1, worker.snapshot.beside(worker.snapshot))
    await Gradient()


OF_CALLS: dict[Step, tuple[str, int]] = {
    call_of_a_stranger: ("`Call` of worker 0", 0),
    call_of_another_size: ("`Call` with 64 bytes", 0),
}


ALL = FORBIDDEN | OF_VALUES | OF_CALLS


def check(message: str, function: Step) -> None:
    words, step = ALL[function]
    assert message.startswith("ProtocolError: ")
    assert words in message
    assert f"step {step} of worker" in message
    assert type(algorithm_of(function)).__name__ in message or "worker.gradient" in message
    assert "needs" in message


def planned(function: Step) -> None:
    plan(algorithm_of(function), WORKERS, SIZE * 8, Cluster(), element_bytes=8)


def virtual(function: Step, folder: Path) -> None:
    strategy = SimulatedStrategy(algorithm_of(function), workers=WORKERS)
    make_trainer(folder, strategy, 1, max_epochs=1, limit_train_batches=WORKERS * STEPS).fit(Climb())


@pytest.mark.parametrize("function", ALL)
def test_it_is_refused(function: Step, real: list[dict[tuple[str, bool], Any]], tmp_path: Path) -> None:
    with pytest.raises(ProtocolError) as simulator:
        simulated(function)
    check(f"ProtocolError: {simulator.value}", function)
    with pytest.raises(ProtocolError) as strategy:
        virtual(function, tmp_path)
    check(f"ProtocolError: {strategy.value}", function)
    if function not in OF_VALUES:  # the planner knows sizes only
        with pytest.raises(ProtocolError) as planner:
            planned(function)
        check(f"ProtocolError: {planner.value}", function)
    for rank, results in enumerate(real):
        if function not in OF_CALLS or rank == 0:
            check(results[function.__name__, False], function)


def test_the_trainer_gets_the_words(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gossip(Script(two_averages_of_one)), WORKERS, max_steps=STEPS)
    with pytest.raises(Exception, match=r"Script got, in step 0 of worker \d, `NeighborAverage` of a vector of which"):
        trainer.fit(Climb())


# -- the tables --------------------------------------------------------------------------------------------------------


def test_every_interpreter_answers_every_word() -> None:
    """And no other one."""
    here = vars(protocol).values()
    words = {word for word in here if isinstance(word, type) and AbstractRequest in word.__bases__}
    assert words == set(VOCABULARY)
    simulator = Simulator(Script(no_update), [SizeOnlyVector(8)])
    assert set(simulator._handlers) == words
    communicator = Communicator.__new__(Communicator)
    communicator.rank, communicator.world_size, communicator.device = 0, 1, torch.device("cpu")
    stepper = Stepper(Script(no_update), [nn.Parameter(torch.zeros(2))], communicator, 0, seed=0)
    assert set(stepper._program.handlers) == words


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_simulation_with_a_ticket_is_not_saved() -> None:
    start = [Vector([torch.zeros(SIZE)]) for _ in range(WORKERS)]
    simulator = Simulator(Script(tickets_over_several_steps), start)
    simulator.run(lambda worker: Vector([torch.ones(SIZE)]), 0.1, 3)
    simulator.state_dict()  # it was awaited in the last step
    simulator.run(lambda worker: Vector([torch.ones(SIZE)]), 0.1, 1)
    with pytest.raises(ProtocolError, match=r"Script got a ticket in `worker.state\['ticket'\]`.*step 4.*Await"):
        simulator.state_dict()


@pytest.mark.parametrize("steps", [3, 4])
def test_real_workers_with_a_ticket_are_not_saved(steps: int, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        gossip(Script(tickets_over_several_steps)),
        WORKERS,
        max_steps=steps,
        callbacks=[Saving(tmp_path)],
    )
    if steps == 3:
        trainer.fit(Climb())
        assert (tmp_path / "end.ckpt").exists()
    else:
        with pytest.raises(Exception, match=r"(?s)Script got a ticket in `worker.state\['ticket'\]`.*Await"):
            trainer.fit(Climb())


class Saving(Recorder):
    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "end.ckpt")
