"""Proved here: the race to a loss tells when each run was there, keeps runs that have ended, and draws them all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lightning_decentral.lab.benchmarks import frontier
from lightning_decentral.lab.benchmarks.frontier import CONTENDERS, NETWORKS, Network, Ran, main, table

CURVE = [{"progress/seconds": 4.0 * n, "progress/megabytes": 10.0 * n, "val_loss": 4.0 - n} for n in (1, 2, 3)]


def test_the_table_tells_when_the_loss_was_reached_and_why_a_run_ended() -> None:
    runs = {"reached": Ran(CURVE, 0), "late": Ran(CURVE[:1], 0), "lost": Ran([], 1)}
    rows = table({"far": runs}, 2.6).splitlines()[2:]
    assert rows == [
        "| 200 Mbit/s, 50 ms | reached | 8.0 | 20 | 1.000 | at the target |",
        "| 200 Mbit/s, 50 ms | late | - | - | 3.000 | time was up |",
        "| 200 Mbit/s, 50 ms | lost | - | - | - | a worker was lost |",
    ]
    assert runs["reached"].seconds_to(1.0) == 12.0
    assert runs["late"].seconds_to(1.0) == math.inf


def test_a_run_that_ended_is_not_made_again_and_all_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def race(network: Network, name: str, folder: Path, target: float, seconds: float) -> int:
        made.append((network.title, name))
        (folder / "curve").mkdir()
        lines = ["epoch,progress/seconds,progress/megabytes,val_loss", "0,1.0,2.0,3.5", "1,2.0,4.0,2.0"]
        (folder / "curve" / "metrics.csv").write_text("\n".join(lines))
        return 0

    monkeypatch.setattr(frontier, "_race", race)
    arguments = ["--output", str(tmp_path), "--networks", "loopback,far", "--contenders", "DDP;AD-PSGD"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert made == [(NETWORKS[n].title, c) for n in ("loopback", "far") for c in ("DDP", "AD-PSGD")]
    assert capsys.readouterr().out.count("| loopback | AD-PSGD | 2.0 | 4 | 2.000 | at the target |") == 2
    assert (tmp_path / "plot.png").stat().st_size > 0
    with pytest.raises(ValueError, match="needs some of loopback"):
        main(["--output", str(tmp_path), "--networks", "moon"])


@pytest.mark.parametrize("name", CONTENDERS)
def test_all_are_told_the_same_but_for_the_method(name: str, tmp_path: Path) -> None:
    ours, ddp = (frontier._settings(NETWORKS["far"], CONTENDERS[one], tmp_path, 2.7, 45.0) for one in (name, "DDP"))
    json.dumps(ours)
    for settings in (ours, ddp):
        settings["trainer"].pop("strategy")
        settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][:4]
    assert ours == ddp
