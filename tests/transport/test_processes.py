"""Proved here: a worker whose process has ended before anybody looked at it is missed all the same; one of another name
space of processes, of which nothing is known, is not."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from lightning_decentral.transport import processes
from lightning_decentral.transport.liveness import Watch


@pytest.mark.skipif(not processes._name_space(), reason="only Linux tells of processes")
def test_a_process_that_ended_before_anybody_looked_is_missed() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        name = processes._named(other.pid)
        assert processes.is_there(name)
        other.kill()
    assert not processes.is_there(name)
    beats, lost = dist.HashStore(), list[Any]()
    watch: Any = SimpleNamespace(_beats=beats, _hosts=["here"] * 4, _rank=0, publish=lost.append)

    def look(known: dict[int, str]) -> dict[int, str]:
        Watch._look_at_processes(watch, known)
        return known

    beats.set("process/2", processes.own_process())
    beats.set("process/3", f"{name.rpartition(' ')[0]} pid:[1]")
    assert look({1: "", 2: "", 3: ""}) == {1: "", 2: processes.own_process(), 3: ""}  # worker 1 has said nothing yet
    assert not lost
    beats.set("process/1", name)
    look({1: "", 2: processes.own_process(), 3: ""})
    assert [failure.ranks for failure in lost] == [(1,)]
    beats.set("process/2", "")
    assert look({2: name}) == {}  # it has left
    assert len(lost) == 1
