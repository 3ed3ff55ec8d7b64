"""What it costs that workers may come and go, and how long one takes to join.

    python -m lightning_decentral.lab.benchmarks.membership cost [--rounds 3]
    python -m lightning_decentral.lab.benchmarks.membership join [--times 5]

Workers of AD-PSGD in emulated hosts (Linux, root); a sleep stands for the computing, and the gradient is real.

``cost``: steps per second of all workers, of `OpenStrategy` with a rendezvous against `AsyncStrategy`, while nobody
comes or goes; a round runs both, in turns first. ``join``: again and again one worker of four is killed, and started
once the others have gone on without it. Told are the seconds from when it looks for them until it takes part, of these
the copy, what as many bytes take by themselves between two of the hosts, and how long the steps of the others were
meanwhile, against theirs while they were alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from lightning_decentral import AsyncStrategy, OpenStrategy
from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.lab.bench.contenders.ours import Module
from lightning_decentral.lab.bench.task import Batch, Task
from lightning_decentral.lab.benchmarks.report import QUIET
from lightning_decentral.lab.emulation import EmulatedNetwork
from lightning_decentral.lab.emulation.network import enter
from lightning_decentral.lab.rehearsal import Diary, Rehearsal
from lightning_decentral.lab.results import environment
from lightning_decentral.simulation.cluster_file import ClusterFile, Host

_PORT = 29500
_START_SECONDS, _POLL_SECONDS = 120.0, 0.1
_SETTLE_SECONDS = 12.0  # after a loss, until the others have gone on for a while
_IMAGES = 1024

_RECEIVES = """
import socket, sys, time
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
connection, _ = server.accept()
began, left = time.monotonic(), int(sys.argv[3])
while left:
    left -= len(connection.recv(1 << 20))
print(time.monotonic() - began, flush=True)
"""
_SENDS = (
    "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2]))).sendall(bytes(int(sys.argv[3])))"
)


class Images(Dataset[Batch]):
    """A set of so many images, of which there are few different ones.

    Args:
        task: whose images they are.
        size: how many.
    """

    def __init__(self, task: Task, size: int) -> None:
        whole = Task(batch_size=_IMAGES, seed=task.seed)
        self._images, self._labels = whole.batch(0, 1, 0)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Batch:
        return self._images[index % _IMAGES], self._labels[index % _IMAGES]


class Said(logging.Handler):
    """Writes what is logged, and when by ``time.monotonic``.

    Args:
        path: of the file, one JSON object per line.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seconds": time.monotonic(), "said": record.getMessage()}) + "\n")


@dataclass(frozen=True)
class Joined:
    """How a worker joined.

    Args:
        began: when it looked for those that train, by ``time.monotonic``.
        took_part: when it took part.
        copy_seconds: of these the copy, by the clock of who gave it.
    """

    began: float
    took_part: float
    copy_seconds: float

    @property
    def seconds(self) -> float:
        """The seconds until it took part."""
        return self.took_part - self.began


def joined(taker: Sequence[dict[str, Any]], givers: Sequence[dict[str, Any]]) -> Joined | None:
    """Read from what workers have said how one of them joined; nothing if it has not.

    Args:
        taker: what that one has said, and when.
        givers: what the others have said.
    """
    for line in taker:
        if found := re.search(r"takes part after ([\d.]+) s \(took a model", line["said"]):
            began = line["seconds"] - float(found[1])
            copies = [
                float(gave[1])
                for other in givers
                if other["seconds"] >= began and (gave := re.search(r"gave a copy .* in ([\d.]+) s", other["said"]))
            ]
            return Joined(began, line["seconds"], copies[0]) if copies else None
    return None


def steps_per_second(diaries: Sequence[Sequence[dict[str, Any]]], begin: float, end: float) -> float:
    """Return how many steps all workers together made in a second, between two moments."""
    speed = 0.0
    for diary in diaries:
        inside = [line["seconds"] for line in diary if begin <= line["seconds"] <= end]
        speed += (len(inside) - 1) / (inside[-1] - inside[0])
    return speed


def step_seconds(diary: Sequence[dict[str, Any]], begin: float, end: float) -> list[float]:
    """List how long the steps of a worker were of which a part lies between two moments."""
    ends = [line["seconds"] for line in diary]
    return [after - before for before, after in pairwise(ends) if after > begin and before < end]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    cost = parts.add_parser("cost")
    cost.add_argument("--rounds", type=int, default=3)
    cost.add_argument("--workers", type=int, default=8)
    cost.add_argument("--seconds", type=float, default=30.0, help="that are counted of each run (30)")
    cost.add_argument("--megabytes", type=float, default=5.0, help="of the model (5)")
    cost.add_argument("--compute", type=float, default=0.1, help="seconds of a gradient (0.1)")
    cost.add_argument("--megabits", type=float, default=200.0, help="per second of each link (200)")
    join = parts.add_parser("join")
    join.add_argument("--times", type=int, default=5)
    join.add_argument("--megabytes", type=float, default=100.0, help="of the model (100)")
    join.add_argument("--compute", type=float, default=1.0, help="seconds of a gradient (1)")
    join.add_argument("--megabits", type=float, default=1000.0, help="per second of each link (1000)")
    worker = parts.add_parser("worker", help="one of these, which the others start")
    worker.add_argument("--first", help="the address of worker 0, for a run in which nobody comes or goes")
    worker.add_argument("--workers", type=int, required=True)
    worker.add_argument("--task", required=True)
    worker.add_argument("--folder", required=True)
    options = parser.parse_args(argv)
    if options.part == "worker":
        train(Task.from_json(options.task), options.workers, Path(options.folder), options.first)
        return 0
    task = Task(
        model_bytes=int(1e6 * options.megabytes),
        compute_seconds=options.compute,
        batch_size=32 if options.part == "cost" else 4,
        momentum=0.0,
    )
    workers = options.workers if options.part == "cost" else 4
    link = ClusterFile("membership", (Host(options.megabits * 1e6 / 8),) * (workers + 1))  # one of the rendezvous
    print(f"# {_TITLES[options.part]}\n\n{environment()}\n", flush=True)
    if options.part == "cost":
        _cost(options, task, link)
    else:
        _join(options, task, link)
    return 0


_TITLES = {"cost": "AD-PSGD with and without membership", "join": "A worker joins"}


def train(task: Task, workers: int, folder: Path, first: str | None) -> None:
    """Train one worker until it is killed.

    Args:
        task: what is trained.
        workers: how many.
        folder: for its diary, and for what it says.
        first: the address of worker 0, where nobody comes or goes; ``None``: `OpenStrategy`.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    said = logging.getLogger("lightning.pytorch.decentral")
    said.setLevel(logging.INFO)
    said.addHandler(Said(folder / f"said-{os.environ['NODE_RANK']}-{os.getpid()}.jsonl"))
    strategy: Any = OpenStrategy(ADPSGD())
    if first is not None:
        os.environ |= {"MASTER_ADDR": first, "MASTER_PORT": str(_PORT)}
        strategy = AsyncStrategy(ADPSGD())
    fit(task, workers, strategy, [Diary(str(folder))])


def fit(task: Task, workers: int, strategy: Any, callbacks: list[Callback]) -> None:
    """Train one worker, each of which is a node of its own, for longer than anybody waits.

    Args:
        task: what is trained.
        workers: how many.
        strategy: of them.
        callbacks: of this one.
    """
    rank = int(os.environ["NODE_RANK"])
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        num_nodes=workers,
        max_epochs=1,
        callbacks=callbacks,
        **QUIET,
    )
    size = 1_000_000 * task.batch_size // 4  # more than anybody waits for
    trainer.fit(Module(task, rank), DataLoader(Images(task, size), batch_size=task.batch_size))


def _command(task: Task, workers: int, folder: Path, first: str | None = None) -> list[str]:
    own = [] if first is None else ["--first", first]
    told = ["--workers", str(workers), "--task", task.to_json(), "--folder", str(folder), *own]
    return [sys.executable, "-m", "lightning_decentral.lab.benchmarks.membership", "worker", *told]


def await_training(run: Rehearsal, folder: Path) -> None:
    """Wait until all workers have made a step.

    Args:
        run: of these workers.
        folder: of their diaries.

    Raises:
        TimeoutError: if one does not in time.
    """
    _await("A worker", run, lambda: all(life.has_trained(folder) for life in run.lives))


def _await(what: str, run: Rehearsal, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {_START_SECONDS:g} s. {run.last_words()}")
        time.sleep(_POLL_SECONDS)


def _cost(options: argparse.Namespace, task: Task, hosts: ClusterFile) -> None:
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(options.rounds):
        for is_open in (True, False) if number % 2 else (False, True):
            speeds[is_open].append(_speed(options, task, hosts, is_open))
            print(f"<!-- {'with' if is_open else 'without'}: {speeds[is_open][-1]:.2f} steps/s -->", flush=True)
    ratios = [with_it / without for with_it, without in zip(speeds[True], speeds[False], strict=True)]
    print("\n| steps per second of all workers | median | least | most |\n|---|---|---|---|")
    for name, values, digits in (
        ("without membership", speeds[False], 2),
        ("with membership", speeds[True], 2),
        ("with / without, of one round", ratios, 4),
    ):
        print(f"| {name} | " + " | ".join(f"{f(values):.{digits}f}" for f in (statistics.median, min, max)) + " |")


def _speed(options: argparse.Namespace, task: Task, hosts: ClusterFile, is_open: bool) -> float:
    with tempfile.TemporaryDirectory() as name, EmulatedNetwork(hosts, f"members{uuid.uuid4().hex[:6]}") as network:
        folder, workers = Path(name), options.workers
        command = _command(task, workers, folder, None if is_open else network.address(0))
        with Rehearsal(folder, workers, command, math.inf, network=network) as run:
            await_training(run, folder)
            begin = time.monotonic() + 3.0
            time.sleep(3.0 + options.seconds)
            return steps_per_second([life.diary(folder) for life in run.lives], begin, begin + options.seconds)


def _join(options: argparse.Namespace, task: Task, hosts: ClusterFile) -> None:
    found: list[Joined] = []
    slower: list[float] = []
    with tempfile.TemporaryDirectory() as name, EmulatedNetwork(hosts, f"members{uuid.uuid4().hex[:6]}") as network:
        alone = statistics.median(_copied(network, task.actual_bytes) for _ in range(3))
        folder = Path(name)
        with Rehearsal(folder, 4, _command(task, 4, folder), math.inf, network=network) as run:
            await_training(run, folder)
            others = run.lives[:3]
            for _ in range(options.times):
                run.lives[-1].process.kill()
                run.lives[-1].process.wait()
                time.sleep(2.0 * _SETTLE_SECONDS)
                quiet = time.monotonic() - _SETTLE_SECONDS, time.monotonic()
                life = run.start(3)
                _await("The newcomer", run, partial(life.has_trained, folder))
                time.sleep(2.0)
                said = {each: _said(folder, each.rank, each.process.pid) for each in (*others, life)}
                how = joined(said[life], [line for each in others for line in said[each]])
                if how is None:
                    raise RuntimeError(f"The newcomer did not say how it joined: {said[life]}. {run.last_words()}")
                found.append(how)
                diaries = [each.diary(folder) for each in others]
                before = [step for diary in diaries for step in step_seconds(diary, *quiet)]
                during = [step for diary in diaries for step in step_seconds(diary, how.began, how.took_part)]
                slower.append(statistics.mean(during) / statistics.mean(before))
                steps = f"steps {slower[-1]:.3f}"
                print(f"<!-- {how.seconds:.2f} s, copy {how.copy_seconds:.2f} s, {steps} -->", flush=True)
    print("\n| | median | least | most |\n|---|---|---|---|")
    for what, values in (
        ("seconds of as many bytes by themselves", [alone]),
        ("seconds until it took part", [each.seconds for each in found]),
        ("of these the copy", [each.copy_seconds for each in found]),
        ("until it took part / bytes by themselves", [each.seconds / alone for each in found]),
        ("the copy / bytes by themselves", [each.copy_seconds / alone for each in found]),
        ("the others' steps, meanwhile / before", slower),
    ):
        print(f"| {what} | " + " | ".join(f"{f(values):.3f}" for f in (statistics.median, min, max)) + " |")


def _said(folder: Path, rank: int, pid: int) -> list[dict[str, Any]]:
    path = folder / f"said-{rank}-{pid}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _copied(network: EmulatedNetwork, num_bytes: int) -> float:
    """Return the seconds that so many bytes take between two hosts."""
    told = [network.address(1), "29777", str(num_bytes)]

    def inside(host: int) -> Any:
        return lambda: enter(network.namespace(host), f"host{host}", str(network.folder / "hosts"), None)

    receiver = subprocess.Popen(
        [sys.executable, "-c", _RECEIVES, *told], stdout=subprocess.PIPE, text=True, preexec_fn=inside(1)
    )
    assert receiver.stdout is not None
    receiver.stdout.readline()
    subprocess.run([sys.executable, "-c", _SENDS, *told], check=True, timeout=60.0, preexec_fn=inside(0))
    said, _ = receiver.communicate(timeout=60.0)
    return float(said)


if __name__ == "__main__":
    sys.exit(main())
