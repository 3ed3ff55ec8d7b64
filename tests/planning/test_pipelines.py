"""Proved here: the planner prices schedules by their clock: closed forms without a network, what a slow worker and a
slow link cost where they are, and which bytes are sent; the command prints them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_decentral.commands.main import main
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.pipelines import PipelinePlan, plan_pipelines
from lightning_decentral.simulation.cluster import Cluster


def plans(cluster: Cluster, activation_bytes: int = 1000) -> dict[str, PipelinePlan]:
    return {plan.schedule: plan for plan in plan_pipelines(4, cluster, activation_bytes)}


def test_speeds_are_those_of_the_schedules() -> None:
    found = plans(Cluster(0.4, bandwidth_bytes_per_second=1e12))
    assert found["ddg"].speedup == pytest.approx(4.0, rel=1e-3)
    assert found["dsp"].speedup == pytest.approx(3.0, rel=1e-3)
    assert found["gpipe"].speedup == pytest.approx(4 * 16 / 19, rel=1e-3)
    assert found["ouroboros"].stages == 5
    assert found["ouroboros"].speedup == pytest.approx(1 / (1 / 3 + 2 / 3 / 8), rel=1e-3)
    assert (found["dsp"].staleness, found["dsp"].kept, found["gpipe"].staleness) == (6, 7, 0)
    assert {plan.bytes_per_batch for plan in found.values()} == {2000}  # an inner stage sends both ways
    ordered = plan_pipelines(4, Cluster(0.4, bandwidth_bytes_per_second=1e12), 1000)
    assert [plan.seconds_per_batch for plan in ordered] == sorted(plan.seconds_per_batch for plan in ordered)


def test_slow_workers_and_links_count_where_they_are() -> None:
    slow = plans(Cluster(0.4, bandwidth_bytes_per_second=1e12, slowdown={2: 2.0}))
    assert slow["ddg"].speedup == pytest.approx(2.0, rel=1e-3)
    hidden = plans(Cluster(0.4, bandwidth_bytes_per_second=1e6), 50_000)  # 0.05 s, where a stage computes 0.1 s
    assert hidden["dsp"].speedup == pytest.approx(3.0, rel=1e-2)
    link = plans(Cluster(0.4, bandwidth_bytes_per_second=1e6, slow_links={3: 4.0}), 50_000)  # 0.2 s
    assert 0.2 <= link["dsp"].seconds_per_batch < link["ddg"].seconds_per_batch  # which has half as many under way


def test_the_command_adds_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = "plan --parameters 50e6 --workers 4 --compute 400ms --bandwidth 1gbit --methods ddp"
    assert main([*arguments.split(), "--activations", "4e6"]) == 0
    out = capsys.readouterr().out
    assert "first keeps" in out
    assert "features_replay" in out
    assert main(arguments.split()) == 0
    assert "first keeps" not in capsys.readouterr().out
    assert main([*arguments.split(), "--activations", "4e6", "--timelines", str(tmp_path / "pictures")]) == 0
    drawn = {file.stem: file.read_text() for file in (tmp_path / "pictures").iterdir()}
    assert drawn.keys() == plans(Cluster(0.4)).keys()
    assert drawn["dsp"].count(">0</text>") == 8  # each of four stages forwards and backwards batch 0
    assert main([*arguments.split(), "--timelines", str(tmp_path)]) != 0
    assert "without --activations" in capsys.readouterr().err
    with pytest.raises(ConfigurationError):
        plan_pipelines(2, Cluster(0.4, slowdown={5: 2.0}), 10)
