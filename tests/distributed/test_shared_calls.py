"""Proved here: a call between workers of one host, which its caller carries out in the other's memory, gives the bits
that it gives over TCP, for parameters of several types and for two optimizers; and the lock around that memory excludes
processes from each other, and names whoever ended or stopped with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import wait_until
from lightning.pytorch import LightningModule, Trainer
from strategies.fits import Indices, Recorder, asynchronous, make_trainer, saved
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral import AsyncStrategy
from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.transport.shared_calls import ModelLock

pytestmark = pytest.mark.usefixtures("kept_forks")

STEPS = 5


class OneLearns(LightningModule):
    """Parameters of four types, in several parts, of which only worker 1 computes gradients.

    Of two workers that one calls, so that everything that happens to the parameters happens in one order.
    """

    def __init__(self, optimizers: int) -> None:
        super().__init__()
        self.optimizers_made = optimizers
        self.automatic_optimization = optimizers == 1
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        sizes = (150_001, 300_007, 4_099, 1)
        self.weights = nn.ParameterList(torch.zeros(n, dtype=dtype) for n, dtype in zip(sizes, dtypes, strict=True))

    def loss(self, weights: list[Tensor]) -> Tensor:
        return sum((weight.double().square().sum() for weight in weights), torch.zeros(())) * self.global_rank

    def training_step(self, batch: Tensor) -> Tensor:
        weights = list(self.weights)
        if self.optimizers_made == 1:
            return self.loss(weights)
        for which, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type, union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(weights[which::2]))
            optimizer.step()
        return torch.zeros(())

    def configure_optimizers(self) -> Any:
        weights = list(self.weights)
        return [torch.optim.SGD(weights[which :: self.optimizers_made], 0.1) for which in range(self.optimizers_made)]

    def train_dataloader(self) -> Any:
        return DataLoader(Indices(4096), batch_size=1)


class Apart(Recorder):
    """Every worker and every element begins elsewhere; keeps the weights once no call is under way."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        generator = torch.Generator().manual_seed(trainer.global_rank)
        for parameter in pl_module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, AsyncStrategy)
        strategy.quiesce()
        for stepper in strategy._steppers:
            stepper.settle()
        self.kept["at rest"] = [buffer.clone() for stepper in strategy._steppers for buffer in stepper.x.buffers]


@pytest.mark.parametrize("optimizers", [1, 2])
def test_shared_memory_gives_the_bits_of_tcp(optimizers: int, tmp_path: Path) -> None:
    results = []
    for shared in (True, False):
        callbacks = [Apart(tmp_path, f"shared-{shared}")]
        strategy = asynchronous(ADPSGD(max_pending_steps=1), shared_memory=shared, average_at_end=False)
        make_trainer(tmp_path, strategy, 2, max_steps=STEPS * optimizers, callbacks=callbacks).fit(
            OneLearns(optimizers)
        )
        results.append(saved(tmp_path, 2, f"shared-{shared}"))
    for shared, tcp in zip(*results, strict=True):
        assert shared["traffic"] == tcp["traffic"]
        for one, other in zip(shared["at rest"], tcp["at rest"], strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    (caller, _), (responder, _) = ([worker["at rest"] for worker in run] for run in zip(*results, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(caller, responder, strict=True))


def shared_bytes(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8).share_memory_()


@contextmanager
def unnamed(waited_for: tuple[int, ...]) -> Iterator[None]:
    """In the place of the watch, which would look at heartbeats."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"{waited_for}: {error}") from error


def lock(header: Tensor, rank: int, timeout_seconds: float, check: Callable[[], None] = lambda: None) -> ModelLock:
    """Worker 0's, as worker ``rank`` sees it."""
    return ModelLock(header, 0, rank, timeout_seconds, unnamed, check)


@contextmanager
def processes(targets: list[Callable[[], None]]) -> Iterator[list[Any]]:
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=target) for target in targets]
    for process in running:
        process.start()
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.join(10.0)


def test_processes_exclude_each_other() -> None:
    header, number = shared_bytes(4096), torch.zeros(1, dtype=torch.int64).share_memory_()
    lock(header, 0, 60.0)

    def count(rank: int) -> None:
        mine = lock(header, rank, 60.0)
        for _ in range(300):
            with mine:
                before = number.item()
                time.sleep(1e-5)
                number.fill_(before + 1)

    with processes([lambda rank=rank: count(rank) for rank in (1, 2, 3)]) as running:  # type: ignore[misc]
        for process in running:
            process.join(60.0)
            assert process.exitcode == 0
    assert number.item() == 900


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_who_ends_or_stops_with_the_lock_is_named(end: signal.Signals) -> None:
    header = shared_bytes(4096)
    own = lock(header, 0, 1.0)

    def hold() -> None:
        with lock(header, 3, 60.0):
            os.kill(os.getpid(), end)

    with processes([hold]) as (process,):
        wait_until(lambda: own.numbers[0] == 3, "the other process holds it")
        if end == signal.SIGKILL:
            process.join(60.0)
        words = "Worker 3 ended while" if end == signal.SIGKILL else "Worker 3 did not give up"
        with pytest.raises(RuntimeError, match=rf"\(3,\): {words}.* the parameters of worker 0"), own:
            pass
    if end == signal.SIGKILL:
        with own:  # it works on, for whoever still has to end the run
            assert own.numbers[0] == 0


def test_a_wait_for_the_lock_ends_with_the_run() -> None:
    header = shared_bytes(4096)
    own = lock(header, 0, 60.0)

    def failed() -> None:
        raise RuntimeError("the run has failed elsewhere")

    def hold() -> None:
        with lock(header, 3, 60.0):
            time.sleep(60.0)

    with processes([hold]):
        wait_until(lambda: own.numbers[0] == 3, "the other process holds it")
        with pytest.raises(RuntimeError, match="failed elsewhere"), lock(header, 1, 60.0, failed):
            pass
