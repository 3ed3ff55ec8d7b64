"""Proved here: the benchmark of pipelines gives all workers the same share of the model, and a pipeline of these is,
by the clock, as fast as what the benchmark calls ideal; the comparison with PETRA's code finds one update that is not
the same, and says what it needs; a schedule without delays costs nothing against backpropagation."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.benchmarks import delays, petra, stages
from lightning_decentral.lab.benchmarks.stages import BACKWARD_SECONDS, CONTENDERS, FORWARD_SECONDS, Run
from lightning_decentral.lab.results import tables
from lightning_decentral.pipeline.clock import seconds_per_batch
from lightning_decentral.pipeline.schedules import dsp


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("name", CONTENDERS)
def test_workers_have_equal_shares_and_the_ideal_speed_is_the_clocks(name: str, workers: int) -> None:
    run = Run(name, workers)
    schedule = run.schedule
    assert schedule is not None
    assert len(run.blocks) == schedule.stages
    own = [0.0] * workers
    for stage, share in enumerate(run.blocks):
        own[schedule.worker_of(stage)] += share
    assert own == pytest.approx([1 / workers] * workers)
    forward = [FORWARD_SECONDS * share for share in schedule.shares]
    seconds = seconds_per_batch(schedule, 60, forward, [BACKWARD_SECONDS * share for share in schedule.shares])
    assert (FORWARD_SECONDS + BACKWARD_SECONDS) / seconds == pytest.approx(stages.ideal(name, workers), rel=1e-9)


def test_speeds_are_drawn(tmp_path: Path) -> None:
    stages.draw(tmp_path / "plot.png", {"DSP": [1.0, 1.9, 3.5, 1.8], "GPipe": [1.0, 1.5, 2.1, 1.2]})
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_comparison_with_petra_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = petra.ours(dsp(petra.STAGES), petra._batches(9), 0.0)
    other = [[mine[stage][0]] * stage + mine[stage] for stage in range(petra.STAGES)]  # by a common clock
    assert {largest for _, largest, _ in petra.compare(mine, other)} == {0.0}
    other[2][2 + 7] = mine[2][6]
    assert [largest > 0 for _, largest, _ in petra.compare(mine, other)] == [False, False, True, False]
    monkeypatch.setattr("sys.argv", ["petra"])
    monkeypatch.delenv("PETRA", raising=False)
    with pytest.raises(ConfigurationError, match="a clone"):
        petra.main()


def test_what_delays_cost_is_nothing_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A delay that grows after each of more batches than there are is none; one from the beginning costs something."""
    delays.train("plays", [11], 0.01, [1])  # 11 // 12 = 0: no warm-up, delays from the beginning
    (table,) = tables(capsys.readouterr().out)
    alike, other, same = (row[2] for row in table.rows)
    assert alike != other == same
    delays.train("plays", [12], 0.01, [1])  # a delay of one from the second batch on
    (table,) = tables(capsys.readouterr().out)
    assert len({row[2] for row in table.rows}) == 3
