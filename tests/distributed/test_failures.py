"""Proved here: when a worker raises, all raise its error; when a worker is killed, stopped or terminated, the others
name it, end within seconds with a failure, and leave no thread behind. Nobody is restarted and nobody hangs.

Four workers are started by hand, without a launcher that would kill the rest (the environment says who they are).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch.distributed as dist
from helpers.ports import free_port
from helpers.threads import threads_besides
from lightning.pytorch import LightningModule, Trainer
from strategies.fits import QUIET, Regression, loader
from torch import nn

from lightning_decentral import AsyncStrategy, GossipStrategy, PipelineStrategy
from lightning_decentral.algorithms import ADPSGD, APSGD, DPSGD, ChocoSGD, Hogwild, MoniquaSGD, SyncSGD
from lightning_decentral.flat import AbstractVector
from lightning_decentral.topology import Complete, Ring
from lightning_decentral.transport import shared_memory
from lightning_decentral.worker import Worker

WORKERS = 4
HOST = socket.gethostname()
CALLS: list[int] = []  # whom this process has called, if it is worker 2 and shall die of it
_START_SECONDS = 120.0  # until the trouble: two seconds on idle cores
WITHIN_SECONDS = 50.0  # of the trouble: below the time-out of an exchange, and far above what it takes on idle cores


Place = Literal["step", "validation", "start"]


class Troubled(Regression):
    """Something happens on one worker in its 6th step, in the validation after it, or as training begins."""

    def __init__(self, folder: Path, rank: int, action: Callable[[], None], place: Place) -> None:
        layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 1)]  # one for each stage of a pipeline
        super().__init__(nn.Sequential(*layers).double(), size=4 * 4 * 2000)
        self.folder, self.troubled, self.action, self.place = folder, rank, action, place

    def happen(self) -> None:
        if self.global_rank == self.troubled and (self.global_step >= 5 or self.place == "start"):
            (self.folder / "when").write_text(str(time.time()))
            self.action()

    def on_train_start(self) -> None:
        if self.place == "start":
            self.happen()

    def training_step(self, batch: Any) -> Any:
        time.sleep(0.01)  # asynchronous workers go on until the trouble is noticed
        if self.place == "step":
            self.happen()
        return self.loss(batch)

    def validation_step(self, batch: Any) -> None:
        if self.place == "validation":
            self.happen()
        super().validation_step(batch)

    def train_dataloader(self) -> Any:
        return loader(4096)

    def val_dataloader(self) -> Any:
        return loader(64)


def work(rank: int, port: int, folder: Path, strategy: Any, module: LightningModule, options: dict[str, Any]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORKERS),
    }
    with open(folder / f"output-{rank}", "w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        error: BaseException | None = None
        try:
            Trainer(**QUIET, devices=WORKERS, strategy=strategy, max_epochs=9, default_root_dir=folder, **options).fit(
                module
            )
        except BaseException as caught:
            error = caught
        ended = time.time()
        deadline = time.monotonic() + 20.0
        while (left := threads_besides([threading.main_thread()])) and time.monotonic() < deadline:
            time.sleep(0.05)
        end = {"kind": type(error).__name__, "message": str(error), "ended": ended, "threads": left}
        (folder / f"end-{rank}").write_text(json.dumps(end))
        sys.exit(0 if error is None else 1)


@dataclass
class End:
    code: int | None
    kind: str = ""
    message: str = ""
    seconds: float = 0.0


def run(
    folder: Path,
    strategy: Any,
    rank: int,
    action: Callable[[], None],
    within: float,
    place: Place = "step",
    silent: tuple[int, ...] = (),
    **options: Any,
) -> list[End]:
    """Run until all but the ``silent`` workers have ended; how each ended, and how long after the trouble."""
    port = free_port()
    module = Troubled(folder, rank, action, place)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=work, args=(each, port, folder, strategy, module, options)) for each in range(WORKERS)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + within + _START_SECONDS
        for each, process in enumerate(processes):
            if each not in silent:
                process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join(10.0)
    when = float((folder / "when").read_text())
    ends = []
    for each, code in enumerate(codes):
        file = folder / f"end-{each}"
        if each in silent:
            ends.append(End(code))
            continue
        assert file.exists(), f"worker {each} did not end:\n" + (folder / f"output-{each}").read_text()[-3000:]
        end = json.loads(file.read_text())
        assert end["threads"] == [], f"worker {each} left {end['threads']}"
        assert end["ended"] - when < within, f"worker {each} took {end['ended'] - when} seconds: {end}"
        ends.append(End(code, end["kind"], end["message"], end["ended"] - when))
    return ends


STRATEGIES = {
    "sync_sgd": lambda seconds=60.0: GossipStrategy(SyncSGD(), exchange_timeout_seconds=seconds),
    "dpsgd": lambda seconds=60.0: GossipStrategy(DPSGD(Ring(4)), exchange_timeout_seconds=seconds),
    "choco_sgd": lambda seconds=60.0: GossipStrategy(ChocoSGD(), exchange_timeout_seconds=seconds),
    "adpsgd": lambda seconds=60.0: AsyncStrategy(ADPSGD(), exchange_timeout_seconds=seconds),
    "apsgd": lambda seconds=60.0: AsyncStrategy(APSGD(), exchange_timeout_seconds=seconds),
    "hogwild": lambda seconds=60.0: AsyncStrategy(Hogwild(), exchange_timeout_seconds=seconds),
    "dsp": lambda seconds=60.0: PipelineStrategy("dsp", exchange_timeout_seconds=seconds),
}


def mistake() -> None:
    raise ValueError("a mistake in the user's own code")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_soon() -> None:
    threading.Timer(0.5, kill).start()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("strategy", "rank"),
    [("dpsgd", 0), ("adpsgd", 1), ("sync_sgd", 1), ("choco_sgd", 2)],
)
def test_an_exception_is_shown_on_all_workers(strategy: str, rank: int, tmp_path: Path) -> None:
    ends = run(tmp_path, STRATEGIES[strategy](), rank, mistake, within=WITHIN_SECONDS)
    for each, end in enumerate(ends):
        assert end.code == 1
        assert "a mistake in the user's own code" in end.message
        assert end.kind == ("ValueError" if each == rank else "WorkerFailed"), (each, end)
        if each != rank:
            assert f"Worker {rank} on {HOST} raised ValueError: a mistake" in end.message
            assert "in mistake" in end.message  # the traceback


def test_models_too_far_apart_for_moniqua_end_all_workers(tmp_path: Path) -> None:
    """They differ by more than theta after their first update; each notices by itself, or hears of it."""
    (tmp_path / "when").write_text(str(time.time()))
    ends = run(tmp_path, GossipStrategy(MoniquaSGD(theta=1e-4)), -1, mistake, within=WITHIN_SECONDS)
    for each, end in enumerate(ends):
        assert end.code == 1
        assert end.kind in ("DecodingError", "WorkerFailed"), (each, end)
        assert "differs from its own by more than theta=0.0001" in end.message
        assert "larger theta" in end.message


@pytest.mark.parametrize(("strategy", "rank"), [("dpsgd", 0), ("adpsgd", 2)])
def test_an_exception_in_a_validation(strategy: str, rank: int, tmp_path: Path) -> None:
    """The others wait for a mean over all workers, which Lightning takes."""
    ends = run(
        tmp_path,
        STRATEGIES[strategy](),
        rank,
        mistake,
        within=WITHIN_SECONDS,
        place="validation",
        limit_train_batches=8,
    )
    for each, end in enumerate(ends):
        assert end.code == 1
        assert end.kind == ("ValueError" if each == rank else "WorkerFailed"), (each, end)
        assert "a mistake in the user's own code" in end.message


@pytest.mark.parametrize(
    ("strategy", "rank"),
    [
        *(("dpsgd", 0), ("dpsgd", 2), ("adpsgd", 0), ("adpsgd", 2), ("sync_sgd", 0), ("choco_sgd", 2)),
        *(("apsgd", 0), ("apsgd", 2), ("hogwild", 1)),  # worker 0 serves
    ],
)
def test_a_killed_worker_is_named_by_all_others(strategy: str, rank: int, tmp_path: Path) -> None:
    ends = run(tmp_path, STRATEGIES[strategy](), rank, kill, within=WITHIN_SECONDS, silent=(rank,))
    assert ends[rank].code == -signal.SIGKILL
    for each, end in enumerate(ends):
        if each != rank:
            assert (end.code, end.kind) == (1, "PeerLost"), (each, end)
            assert f"worker {rank} on {HOST}" in end.message
            assert "Start the run again from its last checkpoint" in end.message
            if strategy == "hogwild":  # nobody waits for it within the epoch
                assert "its process has ended" in end.message


def test_a_killed_server_that_only_serves_is_named_by_all_others(tmp_path: Path) -> None:
    strategy = AsyncStrategy(APSGD(server="dedicated"), exchange_timeout_seconds=60.0)
    ends = run(tmp_path, strategy, 0, kill_soon, within=WITHIN_SECONDS, place="start", silent=(0,))
    assert ends[0].code == -signal.SIGKILL
    for end in ends[1:]:
        assert (end.code, end.kind) == (1, "PeerLost"), end
        assert f"worker 0 on {HOST}" in end.message


@dataclass(frozen=True)
class DyingCaller(ADPSGD):
    """Worker 2 is killed within a call, when it has changed so many of the two workers' parameters."""

    folder: str = ""
    changed: int = 0

    async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
        if source == 2:
            CALLS.append(worker.rank)
        if len(CALLS) == 5:
            (Path(self.folder) / "when").write_text(str(time.time()))
            if self.changed == 0:
                kill()
        answer = await super().on_call(worker, source, theirs)
        if len(CALLS) == 5:
            kill()
        return answer


@pytest.mark.parametrize("changed", [0, 1])
def test_a_worker_killed_within_its_call_is_named(changed: int, tmp_path: Path) -> None:
    """It has the locks of both workers."""
    strategy = AsyncStrategy(DyingCaller(Complete, "random", 1, str(tmp_path), changed), exchange_timeout_seconds=60.0)
    ends = run(tmp_path, strategy, -1, mistake, within=WITHIN_SECONDS, silent=(2,))
    assert ends[2].code == -signal.SIGKILL
    for each in (0, 1, 3):
        assert (ends[each].code, ends[each].kind) == (1, "PeerLost"), (each, ends[each])
        assert f"worker 2 on {HOST}" in ends[each].message


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_worker_of_another_host_is_named(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that do not share memory: what is sent is handed over as soon as a step begins."""
    monkeypatch.setattr(shared_memory, "host_name", lambda: f"host {dist.get_rank()}")
    ends = run(tmp_path, STRATEGIES["dpsgd"](), rank, kill, within=WITHIN_SECONDS, silent=(rank,))
    for each, end in enumerate(ends):
        if each != rank:
            assert (end.code, end.kind) == (1, "PeerLost"), (each, end)
            assert f"worker {rank} on {HOST}" in end.message


@pytest.mark.parametrize("strategy", ["dpsgd", "adpsgd"])
def test_a_worker_killed_in_a_validation_is_named(strategy: str, tmp_path: Path) -> None:
    ends = run(
        tmp_path,
        STRATEGIES[strategy](),
        2,
        kill,
        within=WITHIN_SECONDS,
        place="validation",
        silent=(2,),
        limit_train_batches=8,
    )
    for each in (0, 1, 3):
        assert (ends[each].code, ends[each].kind) == (1, "PeerLost"), (each, ends[each])
        assert f"worker 2 on {HOST}" in ends[each].message


@pytest.mark.parametrize("strategy", ["dpsgd", "adpsgd"])
def test_a_stopped_worker_is_named_after_the_time_out(strategy: str, tmp_path: Path) -> None:
    """Its connections stay open: only its heart has stopped."""
    # Long enough for a step on a busy machine: whoever is slower would be taken for lost before the trouble.
    ends = run(tmp_path, STRATEGIES[strategy](10.0), 2, stop, within=WITHIN_SECONDS, silent=(2,))
    for each in (0, 1, 3):
        assert (ends[each].code, ends[each].kind) == (1, "PeerLost"), (each, ends[each])
        assert f"worker 2 on {HOST}" in ends[each].message
        assert ends[each].seconds > 1.0


@pytest.mark.parametrize(
    ("strategy", "rank", "place"), [("dpsgd", 2, "start"), ("adpsgd", 0, "step"), ("dsp", 1, "validation")]
)
def test_a_terminated_worker_ends_the_run(strategy: str, rank: int, place: Place, tmp_path: Path) -> None:
    """Before the first batch too: Lightning's handler would wait there for workers that know nothing of it."""
    options = {"limit_train_batches": 8} if place == "validation" else {}
    ends = run(tmp_path, STRATEGIES[strategy](), rank, terminate, within=WITHIN_SECONDS, place=place, **options)
    assert ends[rank].kind == "SIGTERMException"
    for each, end in enumerate(ends):
        assert end.code == 1
        if each != rank:
            assert end.kind == "WorkerFailed", (each, end)
            assert f"Worker {rank} on {HOST} raised SIGTERMException" in end.message
