"""Proved here, with workers that only write diaries: a rehearsal kills and stops them at its moments and starts them
again, to the end of the run, and never all at once unless asked, which it tells; tells when survivors had their next
exchange and when a worker was back; parts two of them for so long; finds what is left behind. That real workers survive
is proved in `test_open`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulation.machines import cluster, needs_hosts
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.emulation import EmulatedNetwork
from lightning_decentral.lab.rehearsal import Disturbance, Rehearsal, main, next_exchange

PYTHON = [sys.executable, "-S", "-E", "-c"]
RENDEZVOUS = [*PYTHON, "import time; print('port=1', flush=True); time.sleep(60)"]
WORKER = """
import json, os, pathlib, sys, time
folder, rank, longest, lives = pathlib.Path(sys.argv[1]), os.environ["NODE_RANK"], float(sys.argv[2]), int(sys.argv[3])
with open(folder / f"{rank}-{os.getpid()}.jsonl", "w", buffering=1) as diary:
    last = time.monotonic()
    for step in range(3000):
        diary.write(json.dumps({"seconds": time.monotonic(), "exchanges": step}) + "\\n")
        time.sleep(0.01)
        if time.monotonic() - last > longest:
            sys.exit("This worker was left out.")
        last = time.monotonic()
        if len(list(folder.glob("*.jsonl"))) >= lives:
            break
    metrics = {"val_accuracy": 0.5, "loss": float(rank)}
    diary.write(json.dumps({"seconds": time.monotonic(), "metrics": metrics}) + "\\n")
"""


@pytest.mark.parametrize(("disturb", "longest", "lives"), [("kill", 60.0, 5), ("stop", 0.5, 3)])
def test_workers_are_disturbed_and_started_again(
    disturb: Disturbance, longest: float, lives: int, tmp_path: Path
) -> None:
    """Two workers; the run is over when it has seen so many lives."""
    worker = [*PYTHON, WORKER, str(tmp_path), str(longest), str(lives)]
    with Rehearsal(tmp_path, 2, worker, 60.0, RENDEZVOUS) as rehearsal:
        rehearsal.run(disturb, 3, 0.02, 0.6, seed=1)
        assert rehearsal.metrics() == {"val_accuracy": 0.5}
        found = rehearsal.disturbances()
    assert rehearsal.left_behind() == []
    assert 1 <= len(found) <= 3
    assert len(rehearsal.lives) >= lives  # a machine as slow as that may stop workers, too
    if disturb == "kill":
        assert len(found) == 3
        assert len(rehearsal.lives) == 5
        moments = sorted(life.disturbed for life in rehearsal.lives if life.disturbed is not None)
        for one, when, following in zip(found[:-1], moments[:-1], moments[1:], strict=True):  # never both at once
            assert one.back is not None
            assert following >= when + one.back
    for one in found:
        assert one.ranks in ((0,), (1,))
        assert one.back is None or one.back > (0.6 if disturb == "stop" else 0.0)
        assert all(wait > 0.0 for wait in one.others)
    assert any(one.back for one in found)


# Sends to the other worker all the time, and ends when it has heard of that one, then nothing for a while, then again.
TALKS = """
import json, os, pathlib, socket, sys, time
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["NODE_RANK"])
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind(("", 6000))
own.setblocking(False)
heard, last, longest, after = 0, 0.0, 0.0, 0
with open(folder / f"{rank}-{os.getpid()}.jsonl", "w", buffering=1) as diary:
    while after < 20:
        time.sleep(0.005)
        own.sendto(b"", (f"10.77.0.{2 - rank}", 6000))
        before, now = heard, time.monotonic()
        try:
            while True:
                own.recv(9)
                heard += 1
        except BlockingIOError:
            pass
        if heard == before:
            continue
        longest, last = max(longest, now - last if before else 0.0), now
        after += longest > 0.8
        diary.write(json.dumps({"seconds": now, "exchanges": heard}) + "\\n")
    diary.write(json.dumps({"seconds": now, "metrics": {"val_parted": float(longest < 30.0)}}) + "\\n")
"""


@needs_hosts
def test_two_workers_cannot_reach_each_other_for_a_while_and_nobody_is_away(tmp_path: Path) -> None:
    with (
        EmulatedNetwork(cluster(number=3), f"rehearsal{os.getpid()}") as network,
        Rehearsal(tmp_path, 2, [*PYTHON, TALKS, str(tmp_path)], 60.0, RENDEZVOUS, network) as rehearsal,
    ):
        rehearsal.run("cut", 1, 0.1, 1.0, seed=1)
        assert rehearsal.metrics() == {"val_parted": 1.0}
        (found,) = rehearsal.disturbances()
        assert len(rehearsal.lives) == 2
    assert sorted(found.ranks) == [0, 1]
    assert found.back is None
    assert len(found.others) == 2
    assert rehearsal.left_behind() == []


def test_a_run_whose_workers_are_all_down_at_once_ends_with_a_message(tmp_path: Path) -> None:
    slow_to_start = f"import time; time.sleep(0.3)\n{WORKER}"
    worker = [*PYTHON, slow_to_start, str(tmp_path), "60", "1000"]
    with (
        pytest.raises(RuntimeError, match="All workers were down at one moment"),
        Rehearsal(tmp_path, 2, worker, 60.0, RENDEZVOUS) as rehearsal,
    ):
        rehearsal.run("kill", 30, 0.0, 1.0, seed=1, at_once=2)
    assert rehearsal.left_behind() == []
    with pytest.raises(ConfigurationError, match="--at-once 3"):
        main(["--workers", "2", "--at-once", "3", "--", "-c", "x.yaml"])


def test_what_is_left_behind_is_found_and_a_run_that_hangs_ends(tmp_path: Path) -> None:
    rehearsal = Rehearsal(tmp_path, 2, [*PYTHON, "import time; time.sleep(60)"], 0.1, RENDEZVOUS)
    with pytest.raises(TimeoutError, match="not over in time"), rehearsal:
        rehearsal.run("nothing", 0, 1.0, 1.0, seed=1)
    assert rehearsal.left_behind() == []
    with subprocess.Popen(
        ["sleep", "60"], env={"PATH": "/usr/bin:/bin", "LIGHTNING_DECENTRAL_JOB": rehearsal.job}
    ) as one:
        assert rehearsal.left_behind() == [f"process {one.pid}"]
        one.kill()


def test_the_next_exchange_is_one_that_was_not_counted_before() -> None:
    diary = [{"seconds": at, "exchanges": count} for at, count in ((1.0, 3), (2.0, 4), (3.0, 4), (4.0, 5))]
    assert next_exchange(diary, 2.5) == pytest.approx(1.5)
    assert next_exchange(diary, 1.5) == pytest.approx(0.5)
    assert next_exchange(diary, 0.5) is None  # it did not train yet
    assert next_exchange(diary, 4.5) is None  # nor any more
    with pytest.raises(ConfigurationError, match="--workers 1"):
        main(["--workers", "1", "--", "-c", "x.yaml"])
