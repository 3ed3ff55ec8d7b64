"""Proved here: ``lightning-decentral plan`` understands units, prints and writes the planner's numbers, ends with a
recommendation, and answers what it does not understand with what it got, what it needs and what to write instead."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from lightning_decentral.commands.plan import main
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.choosing import choose
from lightning_decentral.planning.planner import compare_plans, recommend
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.cluster_file import ClusterFile
from lightning_decentral.topology import Hypercube, Ring
from lightning_decentral.units import parse_bandwidth, parse_factors, parse_seconds, whole_number

COMMAND = [
    "--parameters", "25.6e6", "--workers", "8", "--bandwidth", "1gbit", "--latency", "1ms", "--compute", "250ms"
]  # fmt: skip
CLUSTER = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=125e6, latency_seconds=0.001)


def test_it_prints_the_plans_and_the_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    printed = capsys.readouterr().out
    plans = compare_plans(8, 102_400_000, CLUSTER)
    for plan in plans:
        assert any(
            plan.method.split("(")[0] in line and f"{plan.seconds_per_step:.4g}" in line
            for line in printed.splitlines()
        )
    best = recommend(plans)
    assert f"Take Trainer(strategy=Strategy({best.plan.method})).\n{best.reason}\nThe table has methods" in printed
    scope: dict[str, object] = {}
    exec(next(line for line in printed.splitlines() if line.startswith("from ")), scope)  # what it says is enough
    assert type(eval(f"Strategy({best.plan.method})", scope)).__name__ == "AsyncStrategy"
    assert "OnePeerExponential " in printed
    assert "size=8, " not in printed.rpartition("Take ")[0]


def test_it_writes_every_number_as_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plans.csv"
    assert main([*COMMAND, "--slow", "3:10", "5:2", "--csv", str(path)]) == 0
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    slow = Cluster(0.25, {3: 10.0, 5: 2.0}, bandwidth_bytes_per_second=125e6, latency_seconds=0.001)
    plans = compare_plans(8, 102_400_000, slow)
    assert [(row["method"], float(row["seconds_per_step"]), float(row["bytes_per_step"])) for row in rows] == [
        (plan.method, plan.seconds_per_step, plan.bytes_per_step) for plan in plans
    ]
    assert "steps/s" in capsys.readouterr().out


def test_it_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One picture, for a cluster with sites too; or one sentence before anything is computed."""
    path = tmp_path / "new" / "plan.png"
    few = ["--methods", "ddp", "dpsgd", "--topologies", "ring"]
    assert main(["--parameters", "1e6", "--cluster", TWO_SITES, *few, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("lightning_decentral.plots.canvas.find_spec", lambda name: None)
    capsys.readouterr()
    with pytest.raises(
        ConfigurationError, match=r'--plot needs matplotlib, .* pip install "lightning-decentral\[recipes'
    ):
        main([*COMMAND, "--plot", str(path)])
    assert not capsys.readouterr().out


def test_methods_topologies_and_dtype_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "plans.csv"
    chosen = ["--methods", "sync_sgd", "dpsgd", "--topologies", "ring", "hypercube", "--dtype-bytes", "2"]
    assert main([*COMMAND, *chosen, "--slow-link", "0:2", "--csv", str(path)]) == 0
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["topology"] for row in rows] == ["", repr(Ring(8)), repr(Hypercube(8))]
    assert [float(row["bytes_per_step"]) for row in rows] == [89_600_000, 2 * 51_200_000, 3 * 51_200_000]


def test_with_data_the_last_lines_choose_by_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--methods", "ddp", "--data", "differ", "--optimizer", "adaptive"]) == 0
    choice = choose(8, 102_400_000, CLUSTER, "differ", "adaptive")
    assert f"Take Trainer(strategy=Strategy({choice.algorithm!r})).\n{choice.text}\n" in capsys.readouterr().out


def test_without_rich_the_table_is_plain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_decentral.commands.plan.find_spec", lambda name: None)
    assert main(COMMAND) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["method", "topology", "s/step"]
    assert lines[1].startswith("DistributedDataParallel")
    assert len({len(line) for line in lines[:9]}) == 1  # the last column is aligned to the right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1gbit", 125e6), ("1Gbit", 125e6), ("100 mbit", 12.5e6), ("8kbit", 1e3), ("16bit", 2.0),
        ("125MB/s", 125e6), ("1.5 GB/s", 1.5e9), ("3kB/s", 3e3), ("7B/s", 7.0), ("1e2mbit", 12.5e6), ("inf", math.inf),
    ],
)  # fmt: skip
def test_bandwidths(text: str, expected: float) -> None:
    assert parse_bandwidth("--bandwidth", text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1ms", 1e-3), ("250us", 250e-6), ("0s", 0.0), ("0.5 s", 0.5), ("2min", 120.0), ("5ns", 5e-9)],
)
def test_durations(text: str, expected: float) -> None:
    assert parse_seconds("--latency", text) == pytest.approx(expected)


def test_numbers_and_factors() -> None:
    assert whole_number("--parameters", "25.6e6") == 25_600_000
    assert parse_factors("--slow", ["3:10", "0:1.5"]) == {3: 10.0, 0: 1.5}


@pytest.mark.parametrize(
    ("option", "value", "needed", "advice"),
    [
        ("--bandwidth", "1mb", "a number and one of bit, kbit", "1gbit or 125MB/s"),
        ("--bandwidth", "fast", "a number and one of", "1gbit"),
        ("--bandwidth", "125mb/s", "a number and one of", "1gbit"),
        ("--bandwidth", "0gbit", "positive", "positive"),
        ("--latency", "1", "a number and one of ns, us, ms, s", "--latency 250ms"),
        ("--compute", "1.2.3s", "a number and one of", "250ms"),
        ("--workers", "2.5", "a whole number of at least 1", "--workers 16"),
        ("--workers", "0", "a whole number of at least 1", "--workers 16"),
        ("--parameters", "many", "a whole number", "25.6e6"),
        ("--parameters", "inf", "a whole number", "25.6e6"),
        ("--slow", "3", "RANK:FACTOR", "--slow 3:10"),
        ("--slow", "9:10", "there are 8", "0 to 7"),
        ("--methods", "dpsdg", "some of ddp, sync_sgd", "Did you mean 'dpsgd'?"),
        ("--topologies", "rings", "one of", "'ring'"),
    ],
)
def test_errors_say_what_was_got_what_is_needed_and_what_to_do(
    option: str, value: str, needed: str, advice: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        main([*COMMAND, option, value])
    message = str(error.value)
    assert value.split("gbit")[0].split(":")[0] in message
    assert needed in message
    assert advice in message


TWO_SITES = str(Path(__file__).parents[1] / "clusters" / "two_sites.yaml")


def test_a_cluster_file_stands_in_place_of_the_options(tmp_path: Path) -> None:
    path = tmp_path / "plans.csv"
    for options, compute in (([], None), (["--compute", "2s"], 2.0)):
        assert main(["--parameters", "25.6e6", "--cluster", TWO_SITES, *options, "--csv", str(path)]) == 0
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        plans = compare_plans(8, 102_400_000, ClusterFile.read(TWO_SITES).model(compute))
        assert [(row["method"], float(row["seconds_per_step"]), int(row["workers"])) for row in rows] == [
            (plan.method, plan.seconds_per_step, 8) for plan in plans
        ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--workers", "8"], "--workers"),
        (["--bandwidth", "1gbit", "--latency", "0s"], "--bandwidth, --latency"),
        (["--slow", "3:10"], "--slow"),
        (["--slow-link", "3:10", "--compute", "1s"], "--slow-link"),
    ],
)
def test_other_options_do_not_go_with_a_cluster_file(options: list[str], named: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        main(["--parameters", "1e6", "--cluster", TWO_SITES, *options])
    message = str(error.value)
    assert f"two_sites.yaml together with {named}, needs one description of the cluster. Leave them out" in message


def test_a_wrong_cluster_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    with pytest.raises(ConfigurationError, match=r"wrong\.yaml: got no file that can be read"):
        main(["--parameters", "1e6", "--cluster", str(path)])
    path.write_text("hosts: 4")
    with pytest.raises(ConfigurationError, match=r"'wrong' got no compute time, .* --compute 100ms"):
        main(["--parameters", "1e6", "--cluster", str(path)])
    assert main(["--parameters", "1e6", "--cluster", str(path), "--compute", "1s", "--methods", "ddp"]) == 0


def test_without_a_cluster_file_its_options_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--parameters", "1e6", "--bandwidth", "1gbit"])
    assert end.value.code == 2
    assert "required, or --cluster FILE: --workers, --compute\n" in capsys.readouterr().err


def test_a_missing_option_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--workers", "4"])
    assert end.value.code == 2
    assert "--parameters" in capsys.readouterr().err
