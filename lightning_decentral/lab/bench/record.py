"""What one worker of a race measures, and the file it leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench.task import PERIOD, Task, save_atomically

_MEETING_STEPS = 4  # before the first one that is counted


@dataclass(frozen=True)
class Record:
    """What one worker measured, from the end of the warm-up to the end of its last step unless said otherwise.

    All workers meet some steps before the first one that is counted, and then warm up to the end: what a method has
    sent ahead while others were late to the meeting is not counted.

    Attributes:
        contender: its name.
        rank: of the worker.
        world_size: how many took part.
        task: as JSON.
        warm_up_steps: steps that are not counted; they come first in ``losses``, ``begins`` and ``ends``.
        steps: that are counted.
        seconds: they took, with everything that lies between them.
        step_seconds: from the beginning of each counted step to that of the next, or to the end of the last.
        losses: of this worker's batches, at its own model; of all steps.
        begins: of all steps, in seconds of ``time.monotonic``, which all processes of a machine share.
        ends: of all steps.
        clock_offset_seconds: added to ``begins`` and ``ends``, gives ``time.time``.
        interface: whose bytes were counted.
        bytes_sent: that left through the interface, with all headers, and whatever *else* used it: on loopback the
            bytes of all workers of the machine. ``None`` if there is no such interface.
        bytes_received: likewise.
        cpu_seconds: user and system time of this process and of the processes it started.
        memory_before_bytes: resident, with the framework and the data but no model. Of this process alone; what lies in
            files (the code of libraries) is not counted, here and below.
        memory_peak_bytes: resident, the most at the end of a step.
        parameters: of this worker's model at the end, as one vector; not averaged with others beyond what the method
            itself does.
        sent_by_then: bytes that had left through the interface by the end of each counted step; empty on loopback,
            which all workers share.
    """

    contender: str
    rank: int
    world_size: int
    task: str
    warm_up_steps: int
    steps: int
    seconds: float
    step_seconds: list[float]
    losses: list[float]
    begins: list[float]
    ends: list[float]
    clock_offset_seconds: float
    interface: str
    bytes_sent: int | None
    bytes_received: int | None
    cpu_seconds: float
    memory_before_bytes: int
    memory_peak_bytes: int
    parameters: Tensor
    sent_by_then: list[int]

    @staticmethod
    def path(folder: str | Path, contender: str, rank: int) -> Path:
        """Tell where the record of a worker is."""
        return Path(folder) / f"{contender}-{rank}.pt"

    @staticmethod
    def load(folder: str | Path, contender: str, rank: int) -> Record:
        """Read it.

        Raises:
            FileNotFoundError: if the worker has not finished.
        """
        return Record(**torch.load(Record.path(folder, contender, rank), weights_only=True))


class Recorder:
    """Measures a worker. Every adapter uses it in the same way, around each step::

        while recorder.more:
            images, labels = task.batch(recorder.rank, recorder.world_size, recorder.step)
            recorder.begin_step()
            ...
            recorder.end_step(loss)
        recorder.finish(parameters)

    Args:
        task: what is trained.
        contender: its name.
        folder: for the record; made if it is not there.
        rank: of this worker.
        world_size: how many take part.
        asynchronous: whether this worker may stop by its own clock, because nobody waits for it.
        meet: called once, near the end of the warm-up, with the number of steps that this worker would count; returns
            worker 0's when all workers have called it. The default is for a worker alone.

    Attributes:
        step: the number of the next step, or of the one under way, from 0; warm-up included.
    """

    def __init__(
        self,
        task: Task,
        contender: str,
        folder: str | Path,
        rank: int,
        world_size: int,
        asynchronous: bool = False,
        meet: Callable[[int], int] = lambda steps: steps,
    ) -> None:
        self.task, self.contender, self.folder = task, contender, Path(folder)
        self.rank, self.world_size = rank, world_size
        self.step = 0
        self._own_clock = asynchronous and task.seconds is not None
        self._meet = meet
        self._steps = task.steps
        self._losses: list[float] = []
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._sent_by_then: list[int] = []
        self._interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        self._memory_before = self._memory_peak = _memory_bytes()
        self._at_start: tuple[float, tuple[int, int] | None] | None = None
        self._at_end: tuple[float, tuple[int, int] | None] | None = None

    @property
    def more(self) -> bool:
        """Whether there is another step to make."""
        return self._at_end is None

    @property
    def meets_next(self) -> bool:
        """Whether the step that begins next waits for all workers first."""
        warm_up = self.task.warm_up_steps
        return self.step == warm_up - min(_MEETING_STEPS, max(0, warm_up - 3))  # after 3 steps, which tell the pace

    def begin_step(self) -> None:
        """Begin a step, before its forward pass. Near the end of the warm-up, wait for all workers."""
        warm_up = self.task.warm_up_steps
        if self.meets_next:
            self._steps = self._meet(self._proposal())
        if self.step == warm_up:
            self._at_start = self._counters()
        self._begins.append(time.monotonic())

    def end_step(self, loss: Tensor | float) -> None:
        """End a step, after its update; ``loss`` is that of its batch."""
        self._losses.append(float(loss))
        self._ends.append(time.monotonic())
        self._memory_peak = max(self._memory_peak, _memory_bytes())
        self.step += 1
        counted = self.step - self.task.warm_up_steps
        if counted < 1:
            return
        if self._interface != "lo" and (sent := interface_bytes(self._interface)) is not None:
            self._sent_by_then.append(sent[0])
        if self._own_clock:
            over = self._ends[-1] - self._begins[self.task.warm_up_steps] >= (self.task.seconds or 0.0)
        else:
            over = counted >= self._steps
        if over:
            self._at_end = self._counters()

    def finish(self, parameters: Tensor) -> Record:
        """Write the record.

        Args:
            parameters: of this worker's model, ``[number of parameters]``.

        Raises:
            ConfigurationError: if there are steps left to make.
        """
        if self._at_start is None or self._at_end is None:
            raise ConfigurationError(
                f"Recorder.finish() got a race of {self.step} steps, needs {self.task.warm_up_steps} to warm up and "
                f"{self._steps} more. Call begin_step() and end_step() while recorder.more."
            )
        (cpu_before, bytes_before), (cpu_after, bytes_after) = self._at_start, self._at_end
        sent, received = None, None
        if bytes_before is not None and bytes_after is not None:
            sent, received = (after - before for before, after in zip(bytes_before, bytes_after, strict=True))
        marks = [*self._begins[self.task.warm_up_steps :], self._ends[-1]]
        record = Record(
            contender=self.contender,
            rank=self.rank,
            world_size=self.world_size,
            task=self.task.to_json(),
            warm_up_steps=self.task.warm_up_steps,
            steps=len(marks) - 1,
            seconds=marks[-1] - marks[0],
            step_seconds=[after - before for before, after in pairwise(marks)],
            losses=self._losses,
            begins=self._begins,
            ends=self._ends,
            clock_offset_seconds=time.time() - time.monotonic(),
            interface=self._interface,
            bytes_sent=sent,
            bytes_received=received,
            cpu_seconds=cpu_after - cpu_before,
            memory_before_bytes=self._memory_before,
            memory_peak_bytes=self._memory_peak,
            parameters=parameters.detach().clone(),
            sent_by_then=self._sent_by_then,
        )
        content = {**asdict(record), "parameters": record.parameters}
        save_atomically(content, Record.path(self.folder, self.contender, self.rank))
        return record

    def _counters(self) -> tuple[float, tuple[int, int] | None]:
        return _cpu_seconds(), interface_bytes(self._interface)

    def _proposal(self) -> int:
        """Tell how many steps this worker would count."""
        if self.task.seconds is None or self._own_clock:
            return self.task.steps
        intervals = len(self._begins) - 2  # without the first step, which connects
        pace = (self._begins[-1] - self._begins[1]) / intervals
        return PERIOD * max(1, round(self.task.seconds / pace / PERIOD))


def interface_bytes(interface: str) -> tuple[int, int] | None:
    """Count the bytes that an interface has sent and received since it is there; ``None``: there is none."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == interface:
            numbers = columns.split()
            return int(numbers[8]), int(numbers[0])
    return None


def _memory_bytes() -> int:
    """Resident memory of this process that belongs to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_seconds() -> float:
    """User and system time of this process and of all its descendants, those that have ended included."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for pid in descendants(os.getpid()):
        columns = _stat(pid)
        if columns is not None:
            total += sum(map(int, columns[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def descendants(pid: int) -> set[int]:
    """Return the processes that a process started, those that these started, and so on, as far as they have not
    ended."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (columns := _stat(int(entry.name))) is not None:
            parents[int(entry.name)] = int(columns[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {pid}


def _stat(pid: int) -> list[str] | None:
    """Read from /proc: state, parent, ..., with user and system time, and those of ended children, at 11 to 14."""
    try:  # what stands before is the name in parentheses, which may contain anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return None
