"""Proved here: what sleeps in place of computing takes at least as long as it says, by rows, and passes errors on;
speeds are of the middle of a run; the simulator is compared with a loop of the same calls."""

from __future__ import annotations

import time

import pytest
import torch

from lightning_decentral.lab.benchmarks import stages


def test_a_sleeper_takes_its_time_and_passes_errors_on() -> None:
    sleeper, x = stages.Sleeper(0.02), torch.ones(stages.ROWS // 2, 3, requires_grad=True)
    began = time.perf_counter()
    output = sleeper(x)
    forwarded = time.perf_counter()
    output.sum().backward()
    assert forwarded - began >= 0.01
    assert time.perf_counter() - forwarded >= 0.02
    assert x.grad is not None
    assert bool((x.grad == 1).all())


def test_speeds_are_of_the_middle_of_a_run() -> None:
    ends = [0.0, 10.0, *(11.0 + 0.5 * count for count in range(5)), 40.0]
    assert stages.seconds_of(ends) == pytest.approx(0.5)


def test_each_contender_has_as_many_devices() -> None:
    assert {schedule.workers for schedule in stages.contenders(4).values()} == {4}
    assert all(seconds > 0 for seconds in stages.simulated(3))
