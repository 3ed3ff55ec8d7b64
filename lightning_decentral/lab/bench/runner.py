"""Running a race: every contender in turn on the same hosts, round after round."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lightning_decentral.errors import EmulationError
from lightning_decentral.lab.bench import contenders
from lightning_decentral.lab.bench.contenders import Contender
from lightning_decentral.lab.bench.environments import NotInstallable, python_for
from lightning_decentral.lab.bench.prefork import Prefork
from lightning_decentral.lab.bench.record import Record
from lightning_decentral.lab.bench.task import Task
from lightning_decentral.lab.bench.worker import PORTS, environment_of
from lightning_decentral.lab.emulation.command import warn_if_too_fast
from lightning_decentral.lab.emulation.hosts import run_in_hosts
from lightning_decentral.lab.emulation.network import EmulatedNetwork
from lightning_decentral.simulation.cluster_file import ClusterFile

_FIRST_PORT = 29600  # of an emulated host, whose ports nobody else uses
_SAMPLE_SECONDS = 0.2
_LAST_LINES = 40


@dataclass(frozen=True)
class Race:
    """What is raced, where, and how often.

    Attributes:
        task: what each worker trains.
        contenders: who takes part; in each round the first one begins one place later.
        workers: how many.
        rounds: how often everybody runs.
        cluster: the emulated hosts, one per worker; ``None``: plain processes of this machine, over loopback.
        timeout_seconds: for one contender in one round.
        install: whether the packages of other projects may be installed, each into an environment of its own.
    """

    task: Task
    contenders: Sequence[Contender]
    workers: int
    rounds: int = 3
    cluster: ClusterFile | None = None
    timeout_seconds: float = 300.0
    install: bool = True


@dataclass(frozen=True)
class Run:
    """One contender in one round.

    Attributes:
        contender: who.
        round: which, from 0.
        records: what its workers measured, by rank.
        cores_busy: share of the machine's cores that was in use while steps were counted, by whomever.
    """

    contender: Contender
    round: int
    records: Sequence[Record]
    cores_busy: float


@dataclass
class Results:
    """All runs of a race, and why some contenders are not among them.

    Attributes:
        race: what was run.
        runs: in the order in which they were made.
        left_out: by contender's name: why there is no run of it, in one line.
        ceiling_bytes_per_second: what the cores can carry through all links together with nothing else to do; infinite
            over loopback, where it was not measured.
    """

    race: Race
    runs: list[Run] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    ceiling_bytes_per_second: float = math.inf


def run(race: Race, say: Callable[[str], None]) -> Results:
    """Run a race.

    A contender that cannot be installed, or fails, is left out of the later rounds, with the reason.

    Args:
        race: what to run.
        say: told what goes on, one line at a time.

    Raises:
        EmulationError: if hosts cannot be emulated here.
    """
    results = Results(race)
    pythons: dict[str, str] = {}
    for contender in race.contenders:
        try:
            pythons[contender.name] = python_for(contender, race.install)
        except NotInstallable as error:
            results.left_out[contender.name] = str(error)
            say(f"{contender.name}: left out: {error}")
    with (
        tempfile.TemporaryDirectory() as folder,
        _preforks(race, pythons, Path(folder)) as preforks,
        _hosts(race, results) as start,
        _Cores() as cores,
    ):
        for number in range(race.rounds):
            shift = number % len(race.contenders)
            for contender in (*race.contenders[shift:], *race.contenders[:shift]):
                if contender.name in results.left_out:
                    continue
                began = time.monotonic()
                failure = start(contender, preforks[contender.name], folder)
                if failure is not None:
                    results.left_out[contender.name] = f"failed in round {number + 1}: {failure}"
                    say(f"round {number + 1}, {contender.name}: {results.left_out[contender.name]}")
                    continue
                records = [Record.load(folder, contender.name, rank) for rank in range(race.workers)]
                busy = cores.busy(
                    max(record.begins[record.warm_up_steps] for record in records),
                    min(record.ends[-1] for record in records),
                )
                results.runs.append(Run(contender, number, records, busy))
                pace = sum(record.seconds for record in records) / sum(record.steps for record in records)
                say(
                    f"round {number + 1}, {contender.name}: {pace:.4f} s per step, cores {busy:.0%} busy "
                    f"({time.monotonic() - began:.0f} s)"
                )
    return results


Start = Callable[[Contender, Prefork, str], "str | None"]
"""Runs all workers of a contender, their records in a folder; returns why there are none."""


@contextmanager
def _preforks(race: Race, pythons: Mapping[str, str], folder: Path) -> Iterator[dict[str, Prefork]]:
    """Make one for each interpreter; by contender."""
    with ExitStack() as stack:
        by_python: dict[str, Prefork] = {}
        for python in dict.fromkeys(pythons.values()):
            modules = dict.fromkeys(c.module for c in race.contenders if pythons.get(c.name) == python)
            path = folder / f"prefork{len(by_python)}"
            by_python[python] = Prefork(python, [f"{contenders.__name__}.{module}" for module in modules], path)
            stack.callback(by_python[python].close)
        yield {name: by_python[python] for name, python in pythons.items()}


@contextmanager
def _hosts(race: Race, results: Results) -> Iterator[Start]:
    if race.cluster is None:
        yield lambda contender, prefork, folder: _start_locally(race, contender, prefork, folder)
        return
    network = EmulatedNetwork(race.cluster, "bench")
    runs = iter(range(10_000))
    try:
        network.create()
        results.ceiling_bytes_per_second = warn_if_too_fast(network)
        network.limit()
        yield lambda contender, prefork, folder: _start_in_hosts(network, race, contender, prefork, folder, next(runs))
    finally:
        network.remove()


def _start_in_hosts(
    network: EmulatedNetwork, race: Race, contender: Contender, prefork: Prefork, folder: str, number: int
) -> str | None:
    said: list[str] = []

    def listen(host: int | None, line: str) -> None:
        said.append(line if host is None else f"host {host}: {line}")

    port = _FIRST_PORT + PORTS * (number % 1000)
    outcomes = run_in_hosts(
        network,
        _command(race, contender, prefork, folder),
        environment={"MASTER_PORT": str(port), **_SETTINGS},
        timeout_seconds=race.timeout_seconds + 30,
        grace_seconds=20,
        output=listen,
    )
    return _reason(said) if any(outcome.exit_code for outcome in outcomes) else None


def _start_locally(race: Race, contender: Contender, prefork: Prefork, folder: str) -> str | None:
    port = _free_ports(PORTS)
    processes = []
    with tempfile.TemporaryFile() as output:
        for rank in range(race.workers):
            environment = environment_of(rank, race.workers, "127.0.0.1", port)
            processes.append(
                subprocess.Popen(
                    _command(race, contender, prefork, folder),
                    env={**os.environ, **environment, **_SETTINGS},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
        try:
            deadline = time.monotonic() + race.timeout_seconds + 30
            failed = False
            while not failed and time.monotonic() < deadline and any(p.poll() is None for p in processes):
                failed = any(process.poll() for process in processes)
                time.sleep(0.05)
            if failed:
                time.sleep(2.0)  # for the others to say what they know
            failed = failed or any(process.poll() != 0 for process in processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        output.seek(0)
        return _reason(output.read().decode(errors="replace").splitlines()) if failed else None


_SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _command(race: Race, contender: Contender, prefork: Prefork, folder: str) -> list[str]:
    arguments = ["--contender", contender.name, "--task", race.task.to_json(), "--folder", folder]
    return prefork.command([*arguments, "--timeout", str(race.timeout_seconds)])


def _reason(lines: Sequence[str]) -> str:
    """Find in what a failed run printed the last line that looks like an error."""
    for line in list(lines[-_LAST_LINES:]) if len(lines) > 2000 else list(lines):
        if "Error" in line or "error:" in line or "ends itself" in line:
            return line.strip()[:300]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def _free_ports(count: int) -> int:
    """Return the first of some successive ports that nobody listens on."""
    for first in range(29700, 60000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise EmulationError("No free ports on 127.0.0.1: end some of the programs that hold them.")


class _Cores:
    """How busy the machine's cores are, sampled while it is entered."""

    def __enter__(self) -> _Cores:
        self._samples: list[tuple[float, float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def busy(self, begin: float, end: float) -> float:
        """Share of the cores' time between two moments of ``time.monotonic``; not a number if it was too short."""
        inside = [sample for sample in self._samples if begin <= sample[0] <= end]
        if len(inside) < 2:
            return math.nan
        (_, busy_before, all_before), (_, busy_after, all_after) = inside[0], inside[-1]
        return (busy_after - busy_before) / max(1.0, all_after - all_before)

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            idle = ticks[3] + ticks[4]
            self._samples.append((time.monotonic(), float(sum(ticks) - idle), float(sum(ticks))))
