"""Proved here: a recorder counts the steps after the warm-up, by number or by time, with all processor time of its
process and its children, and leaves one whole file."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench.record import Record, Recorder
from lightning_decentral.lab.bench.task import Task


def drive(recorder: Recorder, seconds: float = 0.0) -> None:
    while recorder.more:
        recorder.begin_step()
        time.sleep(seconds)
        recorder.end_step(torch.tensor(float(recorder.step)))


def test_the_steps_after_the_warm_up_are_counted(tmp_path: Path) -> None:
    meetings: list[tuple[int, int]] = []

    def meet(steps: int) -> int:
        meetings.append((recorder.step, steps))
        time.sleep(0.2)  # waiting for the others is not counted
        return steps

    recorder = Recorder(Task(steps=5, warm_up_steps=3), "some", tmp_path, 1, 4, meet=meet)
    drive(recorder, 0.02)
    written = recorder.finish(torch.arange(4.0))
    assert meetings == [(3, 5)]
    record = Record.load(tmp_path, "some", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["some-1.pt"]
    assert record.losses == [float(step) for step in range(8)]
    assert (record.steps, record.warm_up_steps, len(record.begins), len(record.ends)) == (5, 3, 8, 8)
    assert len(record.step_seconds) == 5
    assert record.seconds == pytest.approx(sum(record.step_seconds)) == record.ends[-1] - record.begins[3]
    assert record.seconds >= 5 * 0.02
    assert record.begins[3] - record.ends[2] >= 0.2
    assert abs(record.begins[0] + record.clock_offset_seconds - time.time()) < 60
    assert Task.from_json(record.task) == Task(steps=5, warm_up_steps=3)
    assert torch.equal(record.parameters, torch.arange(4.0))
    assert written.losses == record.losses
    # Memory of a process with torch: neither nothing nor a mistaken unit.
    for size in (record.memory_before_bytes, record.memory_peak_bytes):
        assert 20e6 < size < 20e9
    assert record.memory_peak_bytes >= record.memory_before_bytes


def test_a_race_by_time_stops_by_the_own_clock(tmp_path: Path) -> None:
    task = Task(steps=3, warm_up_steps=3, seconds=1.0)
    recorder = Recorder(task, "some", tmp_path, 0, 1, asynchronous=True)
    drive(recorder, 0.005)
    record = recorder.finish(torch.zeros(1))
    assert record.seconds >= 1.0
    assert record.ends[-2] - record.begins[3] < 1.0  # not one step more than it takes
    assert record.steps > 3


def test_a_race_by_time_of_synchronous_workers_has_a_number_of_steps_that_all_agree_on(tmp_path: Path) -> None:
    proposals: list[int] = []

    def meet(steps: int) -> int:
        proposals.append(steps)
        return 16

    recorder = Recorder(Task(steps=3, warm_up_steps=5, seconds=0.8), "some", tmp_path, 1, 2, meet=meet)
    drive(recorder, 0.02)
    assert recorder.finish(torch.zeros(1)).steps == 16
    (steps,) = proposals
    assert steps % 8 == 0
    assert 8 <= steps <= 40  # 0.8 s of steps that sleep 0.02 s


def test_without_a_warm_up_the_first_step_counts(tmp_path: Path) -> None:
    recorder = Recorder(Task(steps=2, warm_up_steps=0), "some", tmp_path, 0, 1)
    drive(recorder)
    assert recorder.finish(torch.zeros(1)).steps == 2


def test_finishing_early_is_an_error(tmp_path: Path) -> None:
    recorder = Recorder(Task(steps=2, warm_up_steps=0), "some", tmp_path, 0, 1)
    recorder.begin_step()
    recorder.end_step(0.0)
    with pytest.raises(ConfigurationError, match="needs 0 to warm up and 2 more"):
        recorder.finish(torch.zeros(1))
    assert not list(tmp_path.iterdir())


def test_bytes_are_of_the_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    recorder = Recorder(Task(steps=1, warm_up_steps=0), "some", tmp_path, 0, 1)
    drive(recorder)
    record = recorder.finish(torch.zeros(1))
    assert (record.interface, record.bytes_sent, record.bytes_received) == ("nothing0", None, None)


def test_processor_time_of_children_counts(tmp_path: Path) -> None:
    recorder = Recorder(Task(steps=1, warm_up_steps=0), "some", tmp_path, 0, 1)
    recorder.begin_step()
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()  # it has used its time and is still there
        recorder.end_step(0.0)
    finally:
        child.kill()
        child.wait(10.0)
        child.stdout.close()
    assert recorder.finish(torch.zeros(1)).cpu_seconds >= 0.45  # in ticks of 0.01 s
