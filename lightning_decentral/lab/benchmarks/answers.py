"""What it costs a server, which trains as well, to answer the others beside its own gradient.

    python -m lightning_decentral.lab.benchmarks.answers [--workers 8] [--seconds 20]

Workers of A-PSGD in emulated hosts (Linux, root); worker 0 serves. A sleep stands for the computing, and the gradient
is real. Told is the processor time of the threads of worker 0 that answer (they receive a gradient, make the update,
and copy and send the model), in a step of worker 0 and as a share of it; beside it that of all threads of worker 0 but
the one that trains, which is more: gloo's, that move bytes, and those that watch over the run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral import AsyncStrategy
from lightning_decentral.algorithms import APSGD
from lightning_decentral.lab.bench.task import Task
from lightning_decentral.lab.benchmarks.membership import await_training, fit
from lightning_decentral.lab.emulation import EmulatedNetwork
from lightning_decentral.lab.rehearsal import Diary, Rehearsal
from lightning_decentral.lab.results import environment
from lightning_decentral.simulation.cluster_file import ClusterFile, Host

_PORT = 29500
_WARM_UP_SECONDS = 3.0
_ANSWERS = "decentral-answer-"  # how the names of threads begin that answer


def thread_seconds(native_id: int) -> float:
    """Return the processor seconds that a thread of this process has used; 0 of one that has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/self/task/{native_id}/schedstat").read_text().split()[0]) / 1e9
    return 0.0


def seconds_beside() -> tuple[float, float]:
    """Return the processor seconds of the threads that answer, and of all but the main thread."""
    answering = [each.native_id for each in threading.enumerate() if each.name.startswith(_ANSWERS)]
    every = (int(path.name) for path in Path("/proc/self/task").iterdir())
    return sum(thread_seconds(each or 0) for each in answering), sum(
        thread_seconds(each) for each in every if each != threading.main_thread().native_id
    )


class Clocks(Callback):
    """Writes after each step of worker 0 when it was, how many calls were answered, and what threads have used.

    Args:
        path: of the file, one JSON object per line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write a line."""
        strategy = trainer.strategy
        if trainer.global_rank > 0 or not isinstance(strategy, AsyncStrategy):
            return
        answering, beside = seconds_beside()
        line = {
            "seconds": time.monotonic(),
            "answered": strategy.traffic.calls_answered,
            "answering": answering,
            "beside": beside,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Put what a server has written into a table.

    Args:
        lines: of `Clocks`, after each step.
    """
    first, last, steps = lines[0], lines[-1], len(lines) - 1
    step = (last["seconds"] - first["seconds"]) / steps
    answers = (last["answered"] - first["answered"]) / steps
    yield "| of worker 0 | in a step | % of a step |"
    yield "|---|---|---|"
    yield f"| step, ms | {1e3 * step:.1f} | 100 |"
    yield f"| calls answered | {answers:.2f} | - |"
    for name, key in (("threads that answer, ms", "answering"), ("all threads but the one that trains, ms", "beside")):
        used = (last[key] - first[key]) / steps
        yield f"| {name} | {1e3 * used:.2f} | {100 * used / step:.2f} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="that are counted (20)")
    parser.add_argument("--megabytes", type=float, default=5.0, help="of the model (5)")
    parser.add_argument("--compute", type=float, default=0.1, help="seconds of a gradient (0.1)")
    parser.add_argument("--megabits", type=float, default=200.0, help="per second of each link (200)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # what one of them is told
    options = parser.parse_args(argv)
    if options.worker is not None:
        told = json.loads(options.worker)
        train(Task.from_json(told["task"]), told["workers"], Path(told["folder"]), told["first"])
        return 0
    task = Task(model_bytes=int(1e6 * options.megabytes), compute_seconds=options.compute, batch_size=32, momentum=0.0)
    link = ClusterFile("answers", (Host(options.megabits * 1e6 / 8),) * (options.workers + 1))  # one of the rendezvous
    print(f"# A server answers beside its own gradient\n\n{environment()}\n", flush=True)
    with tempfile.TemporaryDirectory() as name, EmulatedNetwork(link, f"answers{uuid.uuid4().hex[:6]}") as network:
        told = {"task": task.to_json(), "workers": options.workers, "folder": name, "first": network.address(0)}
        command = [sys.executable, "-m", "lightning_decentral.lab.benchmarks.answers", "--worker", json.dumps(told)]
        with Rehearsal(Path(name), options.workers, command, math.inf, network=network) as run:
            await_training(run, Path(name))
            begin = time.monotonic() + _WARM_UP_SECONDS
            time.sleep(_WARM_UP_SECONDS + options.seconds)
            text = (Path(name) / "clocks.jsonl").read_text(encoding="utf-8")
            written = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    lines = [line for line in written if begin <= line["seconds"] <= begin + options.seconds]
    if len(lines) < 2:
        raise RuntimeError(
            f"Worker 0 made {len(lines)} steps in {options.seconds:g} s, and needs 2. {run.last_words()}"
        )
    print("\n".join(table(lines)))
    return 0


def train(task: Task, workers: int, folder: Path, first: str) -> None:
    """Train one worker until it is killed.

    Args:
        task: what is trained.
        workers: how many.
        folder: for its diary and its clocks.
        first: the address of worker 0.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": first, "MASTER_PORT": str(_PORT)}
    fit(task, workers, AsyncStrategy(APSGD()), [Diary(str(folder)), Clocks(folder / "clocks.jsonl")])


if __name__ == "__main__":
    sys.exit(main())
