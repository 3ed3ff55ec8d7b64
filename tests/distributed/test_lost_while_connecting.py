"""Proved here: a worker that dies while the workers are still connecting is named by the others as one that dies later,
and they end within seconds: before the process group is there, in the user's set-up, while groups, shared memory and
connections for calls are made. What a worker raises there, the others raise too.

Three workers are started by hand, without a launcher that would kill the rest.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.ports import free_port
from lightning.pytorch import Trainer
from strategies.fits import QUIET, Regression

from lightning_decentral import AsyncStrategy, GossipStrategy
from lightning_decentral.transport import calls, connections, liveness
from lightning_decentral.transport.shared_memory import SharedMemory

WORKERS = 3
WITHIN_SECONDS = 50.0  # below the time-out of an exchange; a failure takes two or three on idle cores


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


class Dying(Regression):
    """One worker does something at one of the moments in which Lightning calls the module."""

    def __init__(self, moment: str, dying: int, action: Callable[[], None]) -> None:
        super().__init__()
        self.moment, self.dying, self.action = moment, dying, action

    def happens(self, moment: str) -> None:
        if moment == self.moment and rank() == self.dying:
            self.action()

    def setup(self, stage: str) -> None:
        self.happens("setup")

    def configure_model(self) -> None:
        self.happens("configure_model")

    def configure_optimizers(self) -> Any:
        self.happens("configure_optimizers")
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        self.happens("on_fit_start")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_error() -> None:
    raise ValueError("a mistake in the user's own set-up")


def work(own: int, port: int, folder: Path, strategy: Any, module: Dying) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(own),
        "WORLD_SIZE": str(WORKERS),
    }
    began = time.monotonic()
    error: BaseException | None = None
    module.happens("start")
    try:
        Trainer(**QUIET, devices=WORKERS, strategy=strategy, max_steps=3, default_root_dir=folder).fit(module)
    except BaseException as caught:
        error = caught
    end = {"kind": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    (folder / f"end-{own}").write_text(json.dumps(end))
    os._exit(0)  # a thread may still wait for the lost one to connect


def ends_of(folder: Path, strategy: Any, module: Dying) -> list[dict[str, Any]]:
    """How the workers ended that did not die."""
    port = free_port()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(own, port, folder, strategy, module)) for own in range(WORKERS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 3 * WITHIN_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    others = [own for own in range(WORKERS) if own != module.dying]
    return [json.loads((folder / f"end-{own}").read_text()) for own in others]


@pytest.mark.parametrize(
    ("moment", "dying"),
    [("setup", 0), ("setup", 2), ("configure_optimizers", 0), ("on_fit_start", 1)],
)
def test_it_is_named(moment: str, dying: int, tmp_path: Path) -> None:
    kind = AsyncStrategy if dying == 2 else GossipStrategy
    for end in ends_of(tmp_path, kind(exchange_timeout_seconds=60.0), Dying(moment, dying, die)):
        assert end["kind"] == "PeerLost", end
        assert f"Lost worker {dying} on" in end["message"]
        assert end["seconds"] < WITHIN_SECONDS


@pytest.mark.parametrize("place", ["new_group", "listen", "Edges"])
def test_it_is_named_while_connections_are_made(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may wait in a library that would wait for the whole time-out."""
    monkeypatch.setattr(liveness, "_STILL_SECONDS", 4.0)
    owner: Any = {"new_group": connections.dist, "Edges": calls}.get(place, SharedMemory)
    original = getattr(owner, place)

    def dying(*args: Any, **options: Any) -> Any:
        if rank() == 1:
            die()
        return original(*args, **options)

    monkeypatch.setattr(owner, place, dying)
    strategy = (AsyncStrategy if place == "Edges" else GossipStrategy)(exchange_timeout_seconds=60.0)
    for end in ends_of(tmp_path, strategy, Dying("never", 1, die)):
        assert end["kind"] == "PeerLost", end
        assert "Lost worker 1 on" in end["message"]
        assert end["seconds"] < WITHIN_SECONDS


def test_one_that_never_comes_is_told_in_words(tmp_path: Path) -> None:
    strategy = GossipStrategy(timeout=timedelta(seconds=4.0))
    for end in ends_of(tmp_path, strategy, Dying("start", 2, die)):
        assert end["kind"] == "PeerLost", end
        assert "could not connect with the others" in end["message"]
        assert end["seconds"] < WITHIN_SECONDS


def test_what_one_raises_all_raise(tmp_path: Path) -> None:
    for end in ends_of(tmp_path, GossipStrategy(), Dying("configure_optimizers", 1, raise_error)):
        assert end["kind"] == "WorkerFailed", end
        assert "a mistake in the user's own set-up" in end["message"]
