"""Proved here: the benchmark of pipelines gives all workers the same share of its blocks, and a pipeline of these is,
by the clock, as fast as what the benchmark calls ideal."""

from __future__ import annotations

import pytest

from lightning_decentral.lab.benchmarks import stages
from lightning_decentral.lab.benchmarks.stages import BACKWARD_SECONDS, BLOCKS, CONTENDERS, FORWARD_SECONDS, Run
from lightning_decentral.pipeline.clock import seconds_per_batch


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("name", CONTENDERS)
def test_workers_have_equal_shares_and_the_ideal_speed_is_the_clocks(name: str, workers: int) -> None:
    run = Run(name, workers)
    schedule = run.schedule
    assert schedule is not None
    ends = [0, *run.cuts, BLOCKS]
    assert len(ends) == schedule.stages + 1
    blocks = [0] * workers
    for stage in range(schedule.stages):
        blocks[schedule.worker_of(stage)] += ends[stage + 1] - ends[stage]
    assert set(blocks) == {BLOCKS // workers}
    forward = [FORWARD_SECONDS * share for share in schedule.shares]
    seconds = seconds_per_batch(schedule, 60, forward, [BACKWARD_SECONDS * share for share in schedule.shares])
    assert (FORWARD_SECONDS + BACKWARD_SECONDS) / seconds == pytest.approx(stages.ideal(name, workers), rel=1e-9)
