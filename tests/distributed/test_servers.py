"""Proved here: on real workers, over gloo, a server makes exactly the updates that its rule says for the order in which
the gradients came, whichever that was: below Lightning, and in the `Trainer` with momentum, weight decay and clipping
by the user's optimizer; where the order does not matter it equals the simulator and synchronous SGD, with compression
both ways too, byte for byte, and a run that was resumed equals one that was not; a centre follows its rule as well; a
gradient that is given up between micro-batches leaves no trace but a count, and the next one has all of its own; the
model that is evaluated, saved and left is the server's; Hogwild's processes have one model."""

from __future__ import annotations

import copy
import os
import threading
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import wait_until
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from reference import servers
from reference.quadratic import Quadratic
from reference.runs import buffer_of, equal_start, gradient_of, simulate
from reference.shards import replayed as shards_replayed
from strategies.fits import Indices, QuadraticModule, Recorder, Regression, asynchronous, make_trainer, saved
from torch import Tensor
from torch.utils.data import DataLoader
from words.real import RATE, Loop, connected, run_workers

from lightning_decentral.algorithms import (
    APSGD,
    AsyncEASGD,
    BackupWorkers,
    DelayedNesterov,
    FedBuff,
    Hogwild,
    Ringmaster,
    StalenessAware,
)
from lightning_decentral.compression import TopK
from lightning_decentral.engine.rest import come_to_rest
from lightning_decentral.errors import PeerLost
from lightning_decentral.flat import Vector

pytestmark = pytest.mark.usefixtures("kept_forks")

WORKERS, STEPS = 3, 12


@dataclass(frozen=True)
class Logged:
    """Notes who has sent a gradient, and how stale it was, in the order of the server."""

    def weight(self, state: Any, source: int, staleness: int) -> float | None:
        weight = super().weight(state, source, staleness)  # type: ignore[misc]
        state.setdefault("log", []).append((source, staleness, weight))
        return weight  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LoggedAPSGD(Logged, APSGD): ...


@dataclass(frozen=True)
class LoggedStalenessAware(Logged, StalenessAware): ...


@dataclass(frozen=True)
class LoggedBackupWorkers(Logged, BackupWorkers): ...


@dataclass(frozen=True, repr=False)
class LoggedRingmaster(Logged, Ringmaster): ...


@dataclass(frozen=True)
class LoggedMessages:
    """Notes who has sent something, and of how many local steps, in the order of the server."""

    def note(self, worker: Any, source: int) -> int:
        steps = worker.state["dues"][source] if "dues" in worker.state else self.steps_between  # type: ignore[attr-defined]
        worker.state.setdefault("log", []).append((source, steps))
        return super().note(worker, source)  # type: ignore[misc, no-any-return]


@dataclass(frozen=True)
class LoggedFedBuff(LoggedMessages, FedBuff): ...


@dataclass(frozen=True)
class LoggedDelayedNesterov(LoggedMessages, DelayedNesterov): ...


@dataclass(frozen=True)
class LoggedAsyncEASGD(LoggedMessages, AsyncEASGD): ...


CENTRES = {
    "fedbuff": (LoggedFedBuff(every=2, buffer=2), lambda *given: servers.fedbuff(*given, 2, 2)),
    "delayed Nesterov": (
        LoggedDelayedNesterov(every=3, buffer=2),
        lambda *given: servers.delayed_nesterov(*given, 3, 2, 0.0),
    ),
    "easgd": (LoggedAsyncEASGD(every=2), lambda *given: servers.async_easgd(*given, 2, 0.9)),
    "compressed fedbuff": (
        LoggedFedBuff(every=2, buffer=2, compressor=TopK(0.4), model_compressor=TopK(0.4)),
        lambda *given: servers.fedbuff_compressed(*given, 2, 2, 2),
    ),
    "compressed easgd": (
        LoggedAsyncEASGD(every=2, compressor=TopK(0.4), model_compressor=TopK(0.4)),
        lambda *given: servers.async_easgd_compressed(*given, 2, 0.9, 2),
    ),
}
SHARDED = {
    "apsgd in shards": (LoggedAPSGD(shards=2), 1),
    "backup workers in shards": (LoggedBackupWorkers(2, shards=3), 2),
    "compressed in shards": (
        BackupWorkers(WORKERS, shards=2, compressor=TopK(0.5), model_compressor=TopK(0.5)),
        WORKERS,
    ),
}
SIZES = [2, 1, 2]  # of the parameters
METHODS = {
    "apsgd": (LoggedAPSGD(), 1),
    "apsgd of two": (LoggedAPSGD(2), 2),
    "staleness-aware": (LoggedStalenessAware(), 1),
    "backup workers": (LoggedBackupWorkers(2), 2),
    "no backup": (LoggedBackupWorkers(WORKERS), WORKERS),
    "compressed": (BackupWorkers(WORKERS, compressor=TopK(0.5), model_compressor=TopK(0.3)), WORKERS),
}


def replayed(problem: Quadratic, log: list[tuple[int, int, float | None]], needed: int, update: Any) -> list[Tensor]:
    """The server's models, by its rule, when gradients come in this order. ``update`` makes one from a direction."""
    models, heard = [problem.start[0].clone()], []
    for source, staleness, weight in log:
        if weight is not None:
            heard.append(weight * problem.gradient(models[-1 - staleness], source))
        if len(heard) == needed:
            models.append(update(models[-1], torch.stack(heard).sum(0) / needed))
            heard = []
    return models


# -- below Lightning ---------------------------------------------------------------------------------------------------


def train(rank: int, workers: int) -> dict[tuple[str, int], Any]:
    results = {}
    for hosts in (0, 1):
        for name, (method, _) in (METHODS | SHARDED | CENTRES).items():
            communicator = connected(rank, hosts)
            loop = Loop(method.resolved(workers), equal_start(workers), communicator, SIZES)
            loop.stepper.callee.update_beside = loop.update_beside
            communicator.barrier()
            for _ in range(STEPS):
                assert loop.step()
            come_to_rest(communicator, [loop.stepper], "the end")
            state = copy.deepcopy(loop.stepper.worker.state) | {"bytes": communicator.traffic.bytes_sent}
            results[name, hosts] = loop.x, state, loop.stepper.mean().buffers[0]
            communicator.barrier()
            communicator.close()
    return results


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    return run_workers(WORKERS, train, tmp_path_factory.mktemp("servers"))


@pytest.mark.parametrize("hosts", [0, 1], ids=["each on its own", "one host"])
@pytest.mark.parametrize("name", METHODS)
def test_a_server_follows_its_rule_in_whatever_order_gradients_come(
    name: str, hosts: int, real: list[dict[tuple[str, int], Any]]
) -> None:
    method, needed = METHODS[name]
    problem, (x, state, mean) = equal_start(WORKERS), real[0][name, hosts]
    if name != "compressed":
        models = replayed(problem, state["log"], needed, lambda x, direction: x - RATE * direction)
        assert len(state["log"]) == WORKERS * STEPS
        assert len(models) - 1 == state["version"]
        torch.testing.assert_close(x, models[-1], rtol=0.0, atol=1e-12)
    for result in real:  # the model is the server's, on all
        assert torch.equal(result[name, hosts][2], mean)
    torch.testing.assert_close(mean, x, rtol=0.0, atol=1e-15)
    if name in ("no backup", "compressed"):
        simulator = simulate(method, problem)
        simulator.run(gradient_of(problem), RATE, STEPS)
        for result, worker, traffic in zip(real, simulator.workers, simulator.traffic, strict=True):
            got, simulated = result[name, hosts], buffer_of(worker.x)
            torch.testing.assert_close(got[0], simulated, rtol=0.0, atol=1e-12)  # sums in another order
            assert got[1]["bytes"] == traffic.bytes_sent > 0


@pytest.mark.parametrize("name", SHARDED)
def test_servers_of_shards_follow_their_rules_in_whatever_order_gradients_come(
    name: str, real: list[dict[tuple[str, int], Any]]
) -> None:
    method, needed = SHARDED[name]
    problem, sizes = equal_start(WORKERS), [2, 3] if method.shards == 2 else SIZES
    for hosts in (0, 1):
        model = real[0][name, hosts][2]
        if needed == WORKERS:  # in the order of a simulation
            simulator = simulate(method, problem)
            simulator.run(gradient_of(problem), RATE, STEPS)
            for result, worker, traffic in zip(real, simulator.workers, simulator.traffic, strict=True):
                torch.testing.assert_close(result[name, hosts][0], buffer_of(worker.x), rtol=0.0, atol=1e-12)
                assert result[name, hosts][1]["bytes"] == traffic.bytes_sent > 0
            continue
        logs = [result[name, hosts][1]["log"] for result in real[: method.shards]]
        assert {len(log) for log in logs} == {WORKERS * STEPS}
        shards = shards_replayed(
            problem.start[0].split(sizes), problem.gradient, logs, needed, lambda server, x, way: x - RATE * way
        )
        torch.testing.assert_close(model, torch.cat(shards), rtol=0.0, atol=1e-12)
        for result in real:
            assert torch.equal(result[name, hosts][2], model)
        for server, result in enumerate(real[: method.shards]):
            assert torch.equal(result[name, hosts][0].split(sizes)[server], model.split(sizes)[server])


@pytest.mark.parametrize("name", CENTRES)
def test_a_centre_follows_its_rule_in_whatever_order_messages_come(
    name: str, real: list[dict[tuple[str, int], Any]]
) -> None:
    problem = equal_start(WORKERS)
    for hosts in (0, 1):
        x, state, mean = real[0][name, hosts]
        log, begun, ranks = state["log"], set(), []
        for source, steps in log:
            first = "easgd" in name and source not in begun  # which begins with an exchange
            begun.add(source)
            ranks += [source] * (1 if first else steps)
        order = servers.InOrder(WORKERS, ranks)
        reference = CENTRES[name][1](problem.start[0], problem.gradient, RATE, order)
        centre = list(islice(reference, len(log)))[-1]
        torch.testing.assert_close(state["centre"].buffers[0], centre, rtol=0.0, atol=1e-12)
        shown = centre.clone()
        if "easgd" not in name:  # with what all have made since, and what messages have left out
            models = [state["aside"].buffers[0], *(result[name, hosts][0] for result in real[1:])]
            began = [result[name, hosts][1]["anchor"].buffers[0] for result in real]
            shown += torch.stack([model - start for model, start in zip(models, began, strict=True)]).mean(0)
            states = [result[name, hosts][1] for result in real[1:]]
            shown += sum(buffer_of(each["left out"]) for each in states if "left out" in each) / WORKERS
        if "buffered" in state:
            shown += state["buffered"].buffers[0]
        torch.testing.assert_close(x, shown, rtol=0.0, atol=1e-12)
        assert begun == set(range(WORKERS))
        assert all(torch.equal(result[name, hosts][2], mean) for result in real)


# -- in the Trainer ----------------------------------------------------------------------------------------------------


class Momentum(QuadraticModule):
    def __init__(self, quadratic: Quadratic, validates: bool = False) -> None:
        super().__init__(quadratic, lambda step: 1.0)
        self.validates = validates

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5, weight_decay=0.1)

    def validation_step(self, batch: Tensor) -> None:
        self.log("distance", (self.x.detach() - self.quadratic.optimum).abs().max(), sync_dist=True)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices(WORKERS * STEPS), batch_size=1)

    def val_dataloader(self) -> DataLoader[int] | list[Any]:
        return DataLoader(Indices(WORKERS), batch_size=1) if self.validates else []


class AtTheEnd(Recorder):
    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.quiesce()  # type: ignore[attr-defined]
        (stepper,) = trainer.strategy._steppers  # type: ignore[attr-defined]
        self.kept |= {"server": copy.deepcopy(stepper.worker.state), "x": stepper.x.buffers[0].clone()}
        self.kept["epoch"] = trainer.current_epoch
        self.kept["report"] = dict(trainer.strategy.report)  # type: ignore[attr-defined]


class Replaces(torch.optim.SGD):
    """Puts new tensors in the place of the parameters, as optimizers do that are written with ``p.data = ...``."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data.clone()
        super().step()
        return loss


class Replaced(Momentum):
    def configure_optimizers(self) -> Any:
        return Replaces(self.parameters(), lr=0.05, momentum=0.5, weight_decay=0.1)


class ClipsByHand(Replaced):
    """Clips what it finds at its own parameters, as most examples do."""

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        self.norm = torch.nn.utils.clip_grad_norm_(self.parameters(), 0.6)
        self.log("norm", self.norm)


class ClipsBefore(Callback):
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_value_(pl_module.parameters(), 0.6)


@pytest.mark.parametrize(
    ("name", "way"), [("apsgd", "by hand"), ("staleness-aware", "value"), ("backup workers", "before")]
)
def test_the_users_optimizer_makes_all_updates(name: str, way: str, tmp_path: Path) -> None:
    """With clipping of whichever kind: a worker that sends its gradient away has none to clip."""
    method, needed = METHODS[name]
    problem = equal_start(WORKERS)
    options: dict[str, Any] = {"max_epochs": 2, "callbacks": [AtTheEnd(tmp_path)]}
    options |= {"gradient_clip_val": 0.6, "gradient_clip_algorithm": "value"} if way == "value" else {}
    options["callbacks"] += [ClipsBefore()] if way == "before" else []
    trainer = make_trainer(tmp_path, asynchronous(method), WORKERS, **options)
    module = (ClipsByHand if way == "by hand" else Momentum)(problem)
    trainer.fit(module)
    results = saved(tmp_path, WORKERS)
    state = results[0]["server"]
    weight = torch.nn.Parameter(problem.start[0].clone())
    optimizer = torch.optim.SGD([weight], lr=0.05, momentum=0.5, weight_decay=0.1)

    def update(x: Tensor, direction: Tensor) -> Tensor:
        weight.grad = direction.clone()
        (torch.nn.utils.clip_grad_norm_ if way == "by hand" else torch.nn.utils.clip_grad_value_)([weight], 0.6)
        optimizer.step()
        return weight.detach().clone()

    models = replayed(problem, state["log"], needed, update)
    torch.testing.assert_close(results[0]["x"], models[-1], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(module.x.detach(), models[-1], rtol=0.0, atol=1e-12)
    assert sum(state["accepted"].values()) + sum(state["dropped"].values()) == len(state["log"])
    assert len(state["log"]) == 2 * WORKERS * STEPS  # the shared epochs' batches
    assert results[0]["report"]["version"] == state["version"] == len(models) - 1
    assert results[1]["report"] == {}


class TakesTurns(QuadraticModule):
    """Worker 1 computes its first micro-batch while worker 0 makes two updates; each makes one beside the other's next.

    Nothing is too stale but what worker 1 has begun first.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(equal_start(2), lambda step: 0.05)
        self.folder, self.own = folder, 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
        (self.folder / f"batch-{self.global_rank}-{batch_idx}").touch()
        after = {(1, 0): "batch-0-6", (0, 6): "batch-1-1", (1, 4): "own-3"}.get((self.global_rank, batch_idx))
        if after is not None:
            wait_until((self.folder / after).exists, f"the other worker's {after}")
        return super().training_step(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_rank == 0 and threading.current_thread() is threading.main_thread():  # it is not for an answer
            self.own += 1
            (self.folder / f"own-{self.own}").touch()

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices(18), batch_size=1)


def test_a_gradient_that_is_too_stale_is_given_up_between_micro_batches(tmp_path: Path) -> None:
    problem, options = equal_start(2), {"max_epochs": 1, "accumulate_grad_batches": 3, "callbacks": AtTheEnd(tmp_path)}
    strategy = asynchronous(LoggedRingmaster(2), share_epoch=False)
    make_trainer(tmp_path, strategy, 2, **options).fit(TakesTurns(tmp_path))
    server, other = saved(tmp_path, 2)
    state = server["server"]
    assert [state["cancelled"], state["accepted"]] == [{0: 0, 1: 1}, {0: 3, 1: 3}]
    assert server["report"]["cancelled"] == {0: 0, 1: 1}
    assert sum(state["staleness"].values()) == 7
    # Of nine batches of worker 1 the first is lost, two gradients have three, and the last one the two that are left.
    assert [server["global_step"], other["global_step"]] == [3, 3]
    (last,) = [number for number, (source, _, _) in enumerate(state["log"]) if source == 1][2:]
    log = [(source, stale, 2 / 3 if number == last else 1.0) for number, (source, stale, _) in enumerate(state["log"])]
    models = replayed(problem, log, 1, lambda x, direction: x - 0.05 * direction)
    torch.testing.assert_close(server["x"], models[-1], rtol=0.0, atol=1e-12)


def test_a_resumed_run_equals_one_that_was_not(tmp_path: Path) -> None:
    """With no backup the order of the gradients does not matter, but for the roundings of a sum."""
    ends, method = [], BackupWorkers(WORKERS, compressor=TopK(0.5), model_compressor=TopK(0.5))
    for epochs, path in ((4, None), (2, None), (4, tmp_path / "half.ckpt")):
        strategy = asynchronous(method, share_epoch=False)
        options: dict[str, Any] = {"callbacks": [AtTheEnd(tmp_path)], "max_epochs": epochs}
        if epochs == 2:
            options["callbacks"] += [ModelCheckpoint(tmp_path, "half")]
            options["enable_checkpointing"] = True
        trainer = make_trainer(tmp_path, strategy, WORKERS, **options)
        module = Momentum(equal_start(WORKERS))
        trainer.fit(module, ckpt_path=path)
        ends.append((module.x.detach().clone(), [each["server"] for each in saved(tmp_path, WORKERS)]))
    (whole, states), _, (resumed, again) = ends
    torch.testing.assert_close(resumed, whole, rtol=0.0, atol=1e-13)
    for mine, theirs in zip(again, states, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, Vector):
                torch.testing.assert_close(mine[name].buffers[0], value.buffers[0], rtol=0.0, atol=1e-13)
            else:
                assert mine[name] == value
    assert states[0]["version"] == 4 * STEPS
    assert {"left out", "known"} < states[1].keys()


@pytest.mark.parametrize("strategy", ["apsgd_fork", "hogwild_fork"])
def test_evaluation_checkpoints_and_early_stopping_are_of_the_servers_model(strategy: str, tmp_path: Path) -> None:
    stops = EarlyStopping("distance", patience=2)
    last_one = ModelCheckpoint(tmp_path, "last")
    options: dict[str, Any] = {
        "max_epochs": 40,
        "enable_checkpointing": True,
        "callbacks": [stops, last_one, AtTheEnd(tmp_path)],
    }
    trainer = make_trainer(tmp_path, strategy, WORKERS, **options)
    module = Momentum(equal_start(WORKERS), validates=True)
    trainer.fit(module)
    (epoch,) = {each["epoch"] for each in saved(tmp_path, WORKERS)}
    assert 1 < epoch < 39
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["x"]
    torch.testing.assert_close(module.x.detach(), last, rtol=0.0, atol=1e-15)
    distance = (last - module.quadratic.optimum).abs().max()
    torch.testing.assert_close(trainer.callback_metrics["distance"].double(), distance, rtol=0.0, atol=1e-6)


class Twice(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Wraps(torch.optim.SGD):
    """Makes its updates by another optimizer, as a Lookahead does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.inner = {"of all": [torch.optim.SGD(self.param_groups)]}


class Wrapped(Regression):
    def configure_optimizers(self) -> Any:
        return Wraps(self.parameters())


class Again(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (Twice, {}, "APSGD got automatic_optimization=False"),
        (Again, {}, "APSGD got LBFGS, which evaluates the loss again"),
        (Wrapped, {}, "APSGD got Wraps, which keeps parameters or another optimizer in `inner`"),
    ],
)
def test_what_no_server_can_apply_is_refused(module: Any, options: Any, words: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, asynchronous(APSGD()), 1, max_steps=2, **options)
    with pytest.raises(Exception, match=words):
        trainer.fit(module())


def test_hogwild_is_refused_where_memory_is_not_shared(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, asynchronous(Hogwild(), shared_memory=False), 2, max_steps=2)
    with pytest.raises(Exception, match=r"Hogwild got 2 workers of which worker \d shares memory with \[\]"):
        trainer.fit(Regression())


def test_hogwild_is_refused_with_an_optimizer_that_replaces_what_is_shared(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, asynchronous(Hogwild()), 2, max_epochs=1)
    with pytest.raises(Exception, match=r"Hogwild got, in step 0 of worker ., new data for parameter 0 in an update"):
        trainer.fit(Replaced(equal_start(2)))


def test_what_is_raised_in_an_answer_is_shown_on_all_workers(tmp_path: Path) -> None:
    def run(rank: int, workers: int) -> str:
        communicator = connected(rank, 0)
        loop = Loop(APSGD().resolved(workers), equal_start(workers), communicator)  # nothing makes its updates
        communicator.barrier()
        try:
            if rank == 1:
                loop.step()
            communicator.barrier()
        except Exception as error:
            communicator.close(failed=True)
            return f"{type(error).__name__}: {error}"
        return "nothing"

    for text in run_workers(2, run, tmp_path):
        assert text.startswith("WorkerFailed: Worker 0"), text
        assert "updates beside its gradients. Set `stepper.callee.update_beside`" in text


def test_answers_that_wait_keep_no_gradient_and_share_one_copy_of_the_model(tmp_path: Path) -> None:
    workers = 4

    def run(rank: int, _: int) -> tuple[int, int, bool]:
        communicator, start = connected(rank, 0), equal_start(workers)
        loop = Loop(BackupWorkers(workers).resolved(workers), start, communicator)
        callee = loop.stepper.callee
        callee.update_beside = loop.update_beside
        communicator.barrier()
        for _ in range(3):
            loop.step()
        communicator.barrier()
        kept = communicator.leases.free_bytes // callee.x.num_bytes
        copies = [callee._as_it_is_now(callee.x) for _ in range(2)]
        callee.x.add_(callee.x.clone())
        copies.append(callee._as_it_is_now(callee.x))
        shared = copies[0] is copies[1] and copies[1] is not copies[2]
        snapshots = int(loop.stepper.snapshot is not loop.stepper.x)
        communicator.close()
        return kept, snapshots, shared

    received, *others = run_workers(workers, run, tmp_path)
    assert 1 <= received[0] <= 3  # of three that have come and waited: what two receive at a time, and their answer
    assert received[1] == 1  # calls change the server's model beside its gradient
    assert [(kept, snapshots) for kept, snapshots, _ in others] == [(0, 0)] * 3  # answers come to the gradients' memory
    assert all(shared for *_, shared in (received, *others))


def test_a_lost_server_of_a_shard_is_named(tmp_path: Path) -> None:
    def run(rank: int, workers: int) -> str:
        communicator = connected(rank, 0)
        loop = Loop(APSGD(shards=2).resolved(workers), equal_start(workers), communicator, SIZES)
        loop.stepper.callee.update_beside = loop.update_beside
        communicator.barrier()
        try:
            for step in range(10_000):
                if rank == 1 and step == 3:
                    os._exit(1)
                loop.step()
        except PeerLost as error:
            communicator.close(failed=True)
            return str(error)
        return "nothing"

    texts = run_workers(WORKERS, run, tmp_path, dies=[1])
    assert all("orker 1" in texts[rank] for rank in (0, 2)), texts
