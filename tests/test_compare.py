"""Proved here: ``lightning-decentral compare`` trains a recipe under several strategies and leaves the table, the
curves and the plot; its numbers are those of the runs; and what cannot work is refused before anything runs."""

from __future__ import annotations

import csv
import os
import re
import sys
from pathlib import Path

import pytest
from emulation.machines import needs_hosts

from lightning_decentral.commands import compare, telling
from lightning_decentral.commands.main import main
from lightning_decentral.commands.telling import Curve, meaning
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes import ResNetClassifier

pytestmark = pytest.mark.usefixtures("runs_start_warm")
RECIPE = str(Path(__file__).parents[1] / "recipes" / "images" / "base.yaml")


@pytest.fixture
def runs_start_warm(warm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", warm)


def test_a_recipe_under_two_strategies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their workers are forked, which saves importing everything once more."""
    own = tmp_path / "own.yaml"  # a strategy may be a file
    strategy = "class_path: lightning_decentral.GossipStrategy\n    init_args: {start_method: fork}\n"
    own.write_text(f"trainer:\n  strategy:\n    {strategy}")
    command = [
        "compare",
        "-c",
        RECIPE,
        "--strategies",
        f"ddp_fork,{own}",
        "--workers",
        "2",
        "--epochs",
        "2",
        "--no-wandb",
    ]
    small = ["--model.depth", "8", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
    assert main([*command, "--slow", "1:2", "--output", str(tmp_path), *small]) == 0

    said = capsys.readouterr().out
    for run in ("ddp_fork, seed 1", "own, seed 1"):  # a line at each validation, without a terminal
        assert re.findall(rf"^{run}: epoch (\d) done after \d+ s of training: val_", said, re.MULTILINE) == ["1", "2"]
    assert re.search(r"^own took \d+ s for 2 epochs and ddp_fork \d+ s for 2: own is ", said, re.MULTILINE)
    with open(tmp_path / "table.csv", newline="") as file:
        rows = {row["strategy"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"ddp_fork", "own"}
    for row in rows.values():
        assert int(float(row["epochs"])) == 2
        assert 0 <= float(row["val_accuracy"]) <= float(row["best val_accuracy"]) <= 1
    # 6 steps, float32: with two workers an all-reduce sends each worker's model once, and so does gossip with the one
    # neighbour.
    model = ResNetClassifier(depth=8, in_channels=1, num_classes=10)
    megabytes = 2 * 6 * 4 * sum(p.numel() for p in model.parameters()) / 1e6
    for row in rows.values():
        assert float(row["megabytes sent"]) == pytest.approx(megabytes, rel=1e-6)
    with open(tmp_path / "curves.csv", newline="") as file:
        points = list(csv.DictReader(file))
    assert [(p["strategy"], float(p["epoch"])) for p in points] == [
        ("ddp_fork", 0.0),
        ("ddp_fork", 1.0),
        ("own", 0.0),
        ("own", 1.0),
    ]
    assert [float(p["progress/batches"]) for p in points] == [6.0, 12.0, 6.0, 12.0]
    table = (tmp_path / "table.md").read_text()
    assert "worker 1 slowed 2 times" in table
    assert "| own |" in table
    for picture in ("plot.png", "workers.png", "own-seed1/timeline/timeline.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_files_are_contenders_too(tmp_path: Path) -> None:
    """Under the strategy of the recipe, or of the file itself."""
    images = Path(RECIPE).parent
    contenders = f"{images / 'compression' / 'int8.yaml'},{images / 'method' / 'sync_sgd.yaml'}"
    command = ["compare", "-c", RECIPE, "-c", str(images / "method" / "ddp.yaml"), "--strategies", contenders]
    small = ["--model.depth", "8", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
    small += ["--workers", "2", "--epochs", "1", "--no-wandb", "--output", str(tmp_path)]
    assert main([*command, *small]) == 0
    with open(tmp_path / "table.csv", newline="") as file:
        rows = {row["strategy"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"int8", "sync_sgd"}
    # With two workers an all-gather of 8-bit messages sends a quarter of what an all-reduce of float32 does; the small
    # tensors, as they are, are 3 % of the model.
    share = float(rows["int8"]["megabytes sent"]) / float(rows["sync_sgd"]["megabytes sent"])
    assert 0.25 < share < 0.3


def curve(seconds_per_epoch: float, *accuracies: float) -> Curve:
    return [
        {"epoch": float(epoch), "progress/seconds": seconds_per_epoch * (epoch + 1), "val_accuracy": accuracy}
        for epoch, accuracy in enumerate(accuracies)
    ]


def test_what_the_figures_mean_is_said_from_the_figures() -> None:
    curves = {("ddp", 1): curve(40, 0.5, 0.75, 0.875), ("adpsgd", 1): curve(10, 0.25, 0.875, 0.9375)}
    assert meaning(curves).splitlines() == [
        "adpsgd took 30 s for 3 epochs and ddp 120 s for 3: adpsgd is 4.0 times as fast.",
        "It reached ddp's last val_accuracy (0.875) after 20 s, and ended with 0.9375.",
    ]
    worse = {("ddp", 1): curve(10, 0.5, 0.875), ("d2", 1): curve(20, 0.5, 0.625)}
    assert meaning(worse).splitlines() == [
        "d2 took 40 s for 2 epochs and ddp 20 s for 2: d2 is 2.0 times slower.",
        "It did not reach ddp's last val_accuracy (0.875): it ended with 0.625.",
    ]
    assert meaning({("ddp", 1): curve(10, 0.5)}) == ""
    some = {**worse, ("ddp", 2): curve(10, 0.5, 0.625), ("d2", 2): curve(20, 0.5, 0.625)}
    assert (
        "With 1 of 2 seeds it did not reach ddp's last val_accuracy. The means of all seeds are 0.625, and 0.75"
        in meaning(some)
    )
    seeds = {**curves, ("ddp", 2): curve(40, 0.5, 0.75, 0.625), ("adpsgd", 2): curve(10, 0.625, 0.5, 0.5625)}
    assert "after 15 s, and ended with 0.75 (means of 2 seeds)." in meaning(seeds)


def test_a_run_that_is_silent_is_said_to_be_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "_QUIET_SECONDS", 0.0)
    lines: list[str] = []
    program = "import sys, time; time.sleep(1.2); sys.exit(3)"
    command = [sys.executable, "-c", program]
    assert telling.run_and_tell(command, os.environ, tmp_path / "metrics.csv", "ddp", lines.append) == 3
    assert "0 validations so far" in lines[0]


@needs_hosts
def test_a_recipe_on_emulated_hosts_stops_at_its_target(tmp_path: Path) -> None:
    """One of the hosts is slow; any accuracy reaches the target, so the first validation is the last."""
    cluster = tmp_path / "two.yaml"
    cluster.write_text("hosts: 2\nrate: 400mbit\ncompute: 20ms\nhost:\n  1: {slowdown: 5}\n")
    command = ["compare", "-c", RECIPE, "--strategies", "dpsgd", "--epochs", "3", "--no-wandb", "--seeds", "1"]
    small = ["--model.depth", "8", "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1"]
    output = tmp_path / "out"
    target = ["--cluster", str(cluster), "--target", "val_accuracy=-1"]
    assert main([*command, *target, "--output", str(output), *small]) == 0
    with open(output / "table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["epochs"]) == 1
    assert float(row["seconds"]) >= 4 * 5 * 0.02  # of the slow host
    assert float(row["seconds to val_accuracy -1"]) == float(row["seconds"])
    assert "emulated hosts: two" in (output / "table.md").read_text()


def test_the_staleness_of_an_epoch_goes_to_its_last_validation(tmp_path: Path) -> None:
    """It is logged in a row of its own, after the validations of the epoch."""
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,progress/seconds,staleness,staleness/max,staleness/mean,val_loss\n"
        "0,1.5,,,,0.9\n0,2.5,,,,0.8\n0,,,3,1.25,\n1,,2.0,,,\n1,4.5,,,,0.7\n"
    )
    first, second, third = telling.read_curve(path)
    assert "staleness/mean" not in first
    assert (second["staleness/mean"], second["staleness/max"]) == (1.25, 3.0)
    assert third == {"epoch": 1.0, "progress/seconds": 4.5, "val_loss": 0.7}


def test_the_table_shows_mean_and_spread_over_seeds() -> None:
    rows: list[dict[str, str | float]] = [
        {"strategy": "ddp", "seed": 1, "val_loss": 0.5},
        {"strategy": "ddp", "seed": 2, "val_loss": 0.7},
        {"strategy": "d2", "seed": 1, "val_loss": 0.25, "other": 3.0},
    ]
    assert compare.markdown_table(rows).splitlines() == [
        "| strategy | val_loss | other |",
        "|---|---|---|",
        "| ddp | 0.6000 (0.5000 to 0.7000) | - |",
        "| d2 | 0.2500 | 3 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", RECIPE, "--strategies", "dpsdg"], "Unknown strategy 'dpsdg'"),
        (["-c", RECIPE, "--strategies", "ddp,nowhere.yaml"], "There is no file 'nowhere.yaml' of a strategy"),
        (["-c", RECIPE, "--strategies", ","], "--strategies is empty"),
        (["-c", RECIPE, "--strategies", f"{RECIPE},{RECIPE}"], "'base' twice, needs different names"),
        (["-c", "nowhere.yaml"], "There is no configuration file 'nowhere.yaml'"),
        (["-c", RECIPE, "--workers", "2", "--slow", "3:4"], "names worker 3, but there are 2"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compare.main([*arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    command = ["-c", RECIPE, "--strategies", "ddp", "--workers", "1", "--no-wandb", "--output", str(tmp_path)]
    with pytest.raises(ConfigurationError, match="The run of ddp ended with exit code 2"):
        compare.main([*command, "--model.no_such_option", "1"])


def test_a_table_of_some_of_the_runs_says_which_are_still_to_come() -> None:
    done = [("ddp", 1), ("dpsgd", 1), ("ddp", 2)]
    assert compare.seeds_so_far(done, [1, 2]) == "seeds 1, 2; still to come: 1 of dpsgd"
    assert compare.seeds_so_far([*done, ("dpsgd", 2)], [1, 2]) == "seeds 1, 2"
