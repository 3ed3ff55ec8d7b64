"""A rehearsal for unreliable machines: workers of one run are killed or stopped, and started again, or are parted for a
while.

    python -m lightning_decentral.lab.rehearsal --disturb kill --times 20 -- \\
        -c recipes/images/base.yaml -c recipes/images/spot/worker.yaml --trainer.accelerator cpu

What comes after ``--`` are the arguments of ``lightning-decentral fit``, with `OpenStrategy`. A rendezvous and the
workers are started as processes of this machine, as somebody would start them elsewhere. ``kill``: again and again, at
random moments, one of them is killed (SIGKILL), and started again. ``stop``: one of them stands still (SIGSTOP) for so
many seconds; it ends when it finds itself left out, and is started again. ``cut``: two of them lose every packet that
they send to each other, for so many seconds; each worker has an emulated host of its own for this, and the rendezvous
another one, which needs Linux and root. ``nothing``: the run as it is undisturbed.

A run is over when nobody is left to join. So a disturbance waits while it would bring down more workers than
``--at-once`` says, by default all but one; and where all are down nevertheless, the command ends with an error.

Printed is the accuracy at the end, and for each disturbance when the survivors had their next exchange, and when the
disturbed worker was back. That nothing is left behind is checked: no process, no port, no shared memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.emulation import EmulatedNetwork
from lightning_decentral.lab.emulation.hosts import worker_environment
from lightning_decentral.lab.emulation.network import enter
from lightning_decentral.lab.results import environment
from lightning_decentral.simulation.cluster_file import ClusterFile, Host

RENDEZVOUS = (sys.executable, "-m", "lightning_decentral", "rendezvous", "--port", "0", "--host")
"""Starts one on a free port; the address follows."""

_NAME = "lightning_decentral.lab.rehearsal"
_POLL_SECONDS = 0.05
_END_SECONDS = 20.0

Disturbance = Literal["nothing", "kill", "stop", "cut"]
"""What happens to a worker, or to what connects two."""


class Diary(Callback):
    """Writes when a worker has made a step, and how many exchanges it has taken part in until then.

    Each life of a worker has a file of its own, of one JSON object per line; what is written outlives a kill.

    Args:
        folder: for the files, ``RANK-PID.jsonl``.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._file: IO[str] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file of this life."""
        path = self._folder / f"{trainer.global_rank}-{os.getpid()}.jsonl"
        self._file = open(path, "w", buffering=1)  # noqa: SIM115 (written to until the process ends)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write a step."""
        traffic = trainer.strategy.traffic  # type: ignore[attr-defined]
        self._write(exchanges=traffic.exchanges + traffic.calls_answered)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured last."""
        self._write(metrics={name: float(value) for name, value in trainer.callback_metrics.items()})

    def _write(self, **what: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"seconds": time.monotonic(), **what}) + "\n")


@dataclass(eq=False)
class Life:
    """One start of a worker.

    Args:
        rank: of the worker.
        process: that it is.
        disturbed: when it was killed or stopped, on the clock of `time.monotonic`.
        down_until: when it may take part again, if it was not left out.
    """

    rank: int
    process: subprocess.Popen[bytes]
    disturbed: float | None = None
    down_until: float = -math.inf

    def has_trained(self, folder: Path) -> bool:
        """Tell whether it has made a step."""
        path = self._path(folder)
        return path.exists() and path.stat().st_size > 0

    def diary(self, folder: Path) -> list[dict[str, Any]]:
        """Read what it has written so far."""
        path = self._path(folder)
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _path(self, folder: Path) -> Path:
        return folder / f"{self.rank}-{self.process.pid}.jsonl"


@dataclass(frozen=True)
class Disturbed:
    """What came of a disturbance.

    Args:
        ranks: of the worker that was disturbed, or of the two that could not reach each other.
        others: seconds until each survivor's next exchange; where two could not reach each other, of all.
        back: seconds until a life of this worker made its first step; none: the run was over before, or nobody was
            away.
    """

    ranks: tuple[int, ...]
    others: list[float]
    back: float | None


class Rehearsal:
    """A rendezvous and workers on this machine.

    Args:
        folder: for logs and diaries.
        workers: how many.
        worker: the command of one.
        seconds: that the whole run may take.
        rendezvous: its command, to which the address is added; it prints a line that ends with its port.
        network: a host for each worker, and one more for the rendezvous; ``None``: all are processes of this host.
    """

    def __init__(
        self,
        folder: Path,
        workers: int,
        worker: Sequence[str],
        seconds: float,
        rendezvous: Sequence[str] = RENDEZVOUS,
        network: EmulatedNetwork | None = None,
    ) -> None:
        self._network, self._cuts = network, list[tuple[float, tuple[int, int]]]()
        self.folder, self.lives = folder, list[Life]()
        self._workers, self._worker = workers, worker
        self._deadline = time.monotonic() + seconds
        self.job = f"rehearsal-{uuid.uuid4().hex[:8]}"
        self._current: dict[int, Life] = {}
        self._address = "127.0.0.1" if network is None else network.address(workers)
        self._rendezvous = subprocess.Popen(
            [*rendezvous, self._address], stdout=subprocess.PIPE, text=True, preexec_fn=self._entering(workers)
        )
        assert self._rendezvous.stdout is not None
        self.port = int(self._rendezvous.stdout.readline().rpartition("=")[2])

    def __enter__(self) -> Rehearsal:
        for rank in range(self._workers):
            self.start(rank)
        return self

    def __exit__(self, *_: object) -> None:
        processes: list[subprocess.Popen[Any]] = [*(life.process for life in self.lives), self._rendezvous]
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait(_END_SECONDS)

    def run(
        self,
        disturb: Disturbance,
        times: int,
        pause: float,
        stop_seconds: float,
        seed: int,
        at_once: int | None = None,
    ) -> None:
        """Let the workers train to the end, and disturb them.

        Args:
            disturb: what happens to a worker.
            times: how often, if the run lasts.
            pause: mean seconds between two disturbances.
            stop_seconds: for how long a worker stands still, or two cannot reach each other.
            seed: of the moments, and of who is disturbed.
            at_once: how many workers may be down at one moment because of disturbances; by default all but one.

        Raises:
            TimeoutError: if that takes too long; with what the workers have said last.
            RuntimeError: if all workers were down at one moment, so that nobody is left to join.
        """
        rng = random.Random(seed)
        due, continues, healed_by = math.inf, dict[float, Life](), -math.inf
        left = 0 if disturb == "nothing" else times
        most_down = self._workers - 1 if at_once is None else at_once
        began = False
        while not self._is_over(began):
            now = time.monotonic()
            if now > self._deadline:
                raise TimeoutError(f"The run was not over in time. {self.last_words()}")
            for rank, life in self._current.items():
                if life.process.poll() not in (None, 0):
                    self.start(rank)
            if not began and all(life.has_trained(self.folder) for life in self._current.values()):
                began, due = True, now + rng.uniform(0.0, 2.0 * pause)
            for when in [each for each in continues if each <= now]:
                continues.pop(when).process.send_signal(signal.SIGCONT)
            if self._cuts and healed_by <= now:
                self._heal()
            ended = any(life.process.poll() == 0 for life in self._current.values())
            if disturb == "cut" and left and now >= max(due, healed_by) and not ended:
                if not self._down(now):
                    healed_by = self._cut(rng) + stop_seconds
                    left -= 1
                    due = healed_by + rng.uniform(0.0, 2.0 * pause)
            elif left and now >= due and not ended:
                victim = self._current[rng.choice(sorted(self._current))]
                fits = len(self._down(now)) < most_down
                if victim.disturbed is None and victim.process.poll() is None and fits:
                    victim.disturbed = time.monotonic()
                    if disturb == "kill":
                        victim.process.kill()
                        victim.down_until = math.inf
                    else:
                        victim.process.send_signal(signal.SIGSTOP)
                        continues[now + stop_seconds] = victim
                        victim.down_until = now + 2.0 * stop_seconds  # for it to find out whether it was left out
                    left -= 1
                    due = now + rng.uniform(0.0, 2.0 * pause)
            time.sleep(_POLL_SECONDS)
        self._rendezvous.terminate()
        self._rendezvous.wait(_END_SECONDS)

    def _cut(self, rng: random.Random) -> float:
        """Let two workers not reach each other; return since when."""
        assert self._network is not None
        first, second = rng.sample(sorted(self._current), 2)
        self._network.cut([[first], [second]])
        self._cuts.append((time.monotonic(), (first, second)))
        return self._cuts[-1][0]

    def _heal(self) -> None:
        if self._network is not None:
            self._network.heal()

    def _entering(self, host: int) -> Callable[[], None] | None:
        """Return what makes a process one of an emulated host, between fork and exec; nothing if there is none."""
        network = self._network
        if network is None:
            return None
        return lambda: enter(network.namespace(host), f"host{host}", str(network.folder / "hosts"), None)

    def _down(self, now: float) -> list[int]:
        """List the ranks whose worker does not take part now."""
        return [
            rank
            for rank, life in self._current.items()
            if life.process.poll() is not None or now < life.down_until or not life.has_trained(self.folder)
        ]

    def _is_over(self, began: bool) -> bool:
        """Tell whether nobody trains any more, and somebody has come to the end.

        Raises:
            RuntimeError: if nobody trains any more, and nobody has come to the end.
        """
        lives = self._current.values()
        if all(life.process.poll() == 0 for life in lives):
            return True
        if not began or any(life.process.poll() is None and life.has_trained(self.folder) for life in lives):
            return False
        if any(life.process.poll() == 0 for life in lives):
            return True  # who was disturbed just before the end has come too late
        raise RuntimeError(
            "All workers were down at one moment: the run is over, and nobody is left to join. Start it again with "
            f"fewer disturbances, or with more seconds between them (--pause). {self.last_words()}"
        )

    def start(self, rank: int) -> Life:
        """Start a worker, for the first time or again."""
        place = {"MASTER_ADDR": self._address, "MASTER_PORT": str(self.port), "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        place["LIGHTNING_DECENTRAL_JOB"] = self.job
        if self._network is not None:
            place |= _interfaces(worker_environment(self._network, rank))
        with open(self.folder / f"{rank}.log", "ab") as log:
            process = subprocess.Popen(
                self._worker, stdout=log, stderr=log, env=os.environ | place, preexec_fn=self._entering(rank)
            )
        self._current[rank] = Life(rank, process)
        self.lives.append(self._current[rank])
        return self._current[rank]

    def last_words(self) -> str:
        """Return the ends of what the workers have written."""
        return "\n".join(f"Worker {rank}: {path.read_text(errors='replace')[-2000:]}" for rank, path in self._logs())

    def _logs(self) -> list[tuple[int, Path]]:
        return [(rank, self.folder / f"{rank}.log") for rank in range(self._workers)]

    def metrics(self) -> dict[str, float]:
        """Return what the workers that have come to the end have measured last, all the same.

        Raises:
            RuntimeError: if it is not the same.
        """
        ended = [life for life in self._current.values() if life.process.poll() == 0]
        ends = [line["metrics"] for life in ended for line in life.diary(self.folder)[-1:]]
        validated = [{name: value for name, value in end.items() if name.startswith("val")} for end in ends]
        if not validated or any(each != validated[0] for each in validated):
            raise RuntimeError(f"The workers ended with {validated}, need the same. See the logs in {self.folder}.")
        found: dict[str, float] = validated[0]
        return found

    def disturbances(self) -> list[Disturbed]:
        """Tell what came of each disturbance, in their order."""
        diaries = {life: life.diary(self.folder) for life in self.lives}
        found = []
        moments = sorted(
            (life.disturbed, number) for number, life in enumerate(self.lives) if life.disturbed is not None
        )
        for when, number in moments:
            life = self.lives[number]
            others = [
                waited
                for other, diary in diaries.items()
                if other.rank != life.rank and (waited := next_exchange(diary, when)) is not None
            ]
            first = [
                line["seconds"] - when
                for other, diary in diaries.items()
                if other.rank == life.rank
                for line in diary
                if line["seconds"] > when + 1e-3 and other is not life
            ]
            found.append(Disturbed((life.rank,), others, min(first, default=None)))
        for when, pair in self._cuts:
            waits = (next_exchange(diary, when) for diary in diaries.values())
            found.append(Disturbed(pair, [each for each in waits if each is not None], None))
        return found

    def left_behind(self) -> list[str]:
        """List what is left of the run: processes, listening ports, and files in shared memory."""
        left = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = self.job.encode() in (process / "environ").read_bytes()
            except OSError:
                continue
            if ours and process.name != str(os.getpid()):
                left.append(f"process {process.name}")
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
                local, state = line.split()[1], line.split()[3]
                if int(local.rpartition(":")[2], 16) == self.port and state == "0A":
                    left.append(f"port {self.port}")
        pids = {str(life.process.pid) for life in self.lives}
        shared = Path("/dev/shm")
        for path in shared.iterdir() if shared.exists() else ():
            if pids & set(path.name.replace("-", "_").split("_")):
                left.append(f"shared memory {path.name}")
        return left


def _interfaces(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.endswith("_SOCKET_IFNAME")}


def next_exchange(diary: Sequence[dict[str, Any]], when: float) -> float | None:
    """Tell how many seconds after a moment a worker had made its next exchange; none if it did not train then."""
    before = [line for line in diary if "exchanges" in line and line["seconds"] <= when]
    after = [line for line in diary if "exchanges" in line and line["seconds"] > when]
    if not before:
        return None
    later = (line["seconds"] - when for line in after if line["exchanges"] > before[-1]["exchanges"])
    return next(later, None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if something is left behind.

    Raises:
        ConfigurationError: for numbers out of range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disturb", choices=get_args(Disturbance), default="kill")
    parser.add_argument("--times", type=int, default=20, help="disturbances, if the run lasts (20)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--pause", type=float, default=10.0, help="mean seconds between two of them (10)")
    parser.add_argument("--stop-seconds", type=float, default=20.0, help="for how long stop and cut last (20)")
    parser.add_argument("--at-once", type=int, help="workers that may be down at one moment (all but one)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="that the run may take (3600)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments, and of the training")
    parser.add_argument("--folder", type=Path, help="for logs; a temporary one by default")
    parser.add_argument("fit", nargs="+", metavar="ARGUMENT", help="of lightning-decentral fit, after --")
    options = parser.parse_args(argv)
    if options.workers < 2 or options.times < 0 or options.pause < 0:
        raise ConfigurationError(
            f"rehearsal got --workers {options.workers}, --times {options.times} and --pause {options.pause}, needs at "
            "least 2 workers, and no negative number. Correct it."
        )
    if options.at_once is not None and not 1 <= options.at_once <= options.workers:
        raise ConfigurationError(
            f"rehearsal got --at-once {options.at_once}, needs 1 to {options.workers}, the number of workers. Correct "
            "it, or leave it out."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("The rehearsal was ended."))  # and its processes with it
    with tempfile.TemporaryDirectory() as own:
        folder = options.folder or Path(own)
        folder.mkdir(parents=True, exist_ok=True)
        diary = [f"--trainer.callbacks+={_NAME}.Diary", f"--trainer.callbacks.folder={folder.resolve()}"]
        worker = [sys.executable, "-m", "lightning_decentral", "fit", *options.fit, *diary]
        worker.append(f"--seed_everything={options.seed}")
        hosts = ClusterFile("rehearsal", (Host(),) * (options.workers + 1))
        name = f"rehearsal{uuid.uuid4().hex[:8]}"
        with EmulatedNetwork(hosts, name) if options.disturb == "cut" else nullcontext() as network:
            began = time.monotonic()
            with Rehearsal(folder.resolve(), options.workers, worker, options.seconds, network=network) as rehearsal:
                rehearsal.run(
                    *(options.disturb, options.times, options.pause, options.stop_seconds),
                    *(options.seed, options.at_once),
                )
                seconds = time.monotonic() - began
                metrics, found = rehearsal.metrics(), rehearsal.disturbances()
        left = rehearsal.left_behind()
    return told(options, metrics, seconds, found, left, len(rehearsal.lives))


def told(
    options: argparse.Namespace,
    metrics: dict[str, float],
    seconds: float,
    found: list[Disturbed],
    left: list[str],
    lives: int,
) -> int:
    """Print what has happened; returns the exit status."""
    what = {"nothing": "undisturbed", "kill": "killed", "stop": f"stopped for {options.stop_seconds:g} s"}
    what["cut"] = f"two cut off from each other for {options.stop_seconds:g} s"
    print(f"# {options.workers} workers, {what[options.disturb]}\n\n{environment()}\n")
    names = sorted(metrics)
    print(f"| run | seed | times | started again | {' | '.join(names)} | seconds | left behind |")
    print("|---|---|---|---|" + "---|" * (len(names) + 2))
    values = " | ".join(f"{metrics[name]:.4f}" for name in names)
    again = lives - options.workers
    row = f"| {what[options.disturb]} | {options.seed} | {len(found)} | {again} | {values} | {seconds:.0f} "
    print(f"{row}| {', '.join(left) or 'nothing'} |")
    if found:
        waits = sorted(wait for one in found for wait in one.others)
        back = [one.back for one in found if one.back is not None]
        print("\n## Seconds after a disturbance\n\n| until | count | median | 90 % | longest |\n|---|---|---|---|---|")
        whose = "a worker" if options.disturb == "cut" else "a survivor"
        for name, each in ((f"{whose}'s next exchange", waits), ("the worker is back", sorted(back))):
            if each:
                high = each[min(len(each) - 1, int(0.9 * len(each)))]
                print(f"| {name} | {len(each)} | {statistics.median(each):.2f} | {high:.2f} | {each[-1]:.2f} |")
        ranks = [rank for one in found for rank in one.ranks]
        counts = ", ".join(f"worker {rank}: {ranks.count(rank)}" for rank in range(options.workers))
        print(f"\nHow often each was disturbed: {counts}.", flush=True)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
