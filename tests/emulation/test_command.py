"""Proved here: ``lightning-decentral emulate`` understands its options, runs the command with a prefix for each host,
measures, warns, and ends with the status of the hosts; it leaves nothing behind after success, failure, Ctrl-C (once or
twice, also while it starts), SIGTERM, SIGHUP and a closed pipe; what a killed emulator leaves is named by the next one
and removed by ``--clean``; and every wrong input is answered with what was got, what is needed and what to do."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.waiting import wait_until

from emulation.machines import Said, alive, cluster, left, needs_hosts, waiting_clock
from lightning_decentral.commands.main import main
from lightning_decentral.lab.emulation import EmulatedNetwork, run_in_hosts
from lightning_decentral.simulation.cluster_file import Host

ENDS_WITHIN = 60.0  # seconds: far above what ending takes on a busy machine
LONG = ["--grace", "5min"]  # a grace that nobody waits for


# -- in this process --------------------------------------------------------------------------------------------------


@needs_hosts
def test_every_line_names_its_host(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emulate", "--hosts", "3", "--name", name, "--", "sh", "-c", "echo I am $RANK of $WORLD_SIZE"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [f"[host{rank}] I am {rank} of 3" for rank in range(3)]


@needs_hosts
def test_the_status_is_that_of_the_host_that_failed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sh", "-c", "[ $RANK = 1 ] && exit 9; sleep 1000"]
    began = time.monotonic()
    assert main(["emulate", "--hosts", "2", "--name", name, "--grace", "500ms", "--", *command]) == 9
    assert time.monotonic() - began < ENDS_WITHIN
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["[emulate] host 1 ended with exit code 9", "[emulate] the others have 0.5 s to end"]


@needs_hosts
def test_events_and_the_time_limit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    events = ["--kill", "0@300ms", "--restart", "0@600ms", "--stop", "1@300ms..500ms", "--cut", "0|1@300ms..500ms"]
    arguments = ["emulate", "--hosts", "2", "--name", name, *events, "--timeout", "1200ms", "--", "sleep", "60"]
    with waiting_clock((1.0, lambda: True)):  # which does not get from before the events to after the end at once
        assert main(arguments) == 128 + signal.SIGKILL
    printed = capsys.readouterr().out
    happened = [line.partition(" s: ")[2] for line in printed.splitlines() if " s: " in line]
    assert sorted(happened) == sorted(
        [
            "kill of host 0",
            "restart of host 0",
            "stop of host 1",
            "end of the stop of host 1",
            "cut of hosts 0 | 1",
            "end of the cut of hosts 0 | 1",
        ]
    )
    assert "[emulate] time is up: killing hosts 0, 1" in printed


@needs_hosts
def test_check_prints_what_was_asked_and_what_was_measured(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a cluster file, with an exception on the command line: no machine carries what that asks for. A link that is
    off is named, and the command not run; that the cores cannot carry it was said before."""
    file = tmp_path / "mine.yaml"
    file.write_text("hosts: 3\nrate: 30gbit\n")
    arguments = ["--cluster", str(file), "--host", "1:rate=20mbit", "--name", name, "--check"]
    assert main(["emulate", *arguments, "--", "echo", "ran"]) == 1
    printed = capsys.readouterr().out
    assert "[host0] ran" not in printed
    rows = [line.split() for line in printed.splitlines() if " -> " in line]
    links = [" ".join(row[:3]) for row in rows]
    assert [(link, row[3]) for link, row in zip(links, rows, strict=True)] == [
        ("0 -> 1", "19.1"), ("1 -> 2", "19.1"), ("2 -> 0", "28692.2")
    ]  # fmt: skip
    for row in rows[:2]:  # the other one takes all that the cores have
        assert 0.3 * 19.1 < float(row[4]) < 1.1 * 19.1
    assert " ".join(rows[2]).endswith("<- more than 10 % off")
    assert "of 3 links are more than 10 % off." in printed
    warning = next(line for line in printed.splitlines() if "warning" in line)
    assert "the links allow 60 Gbit/s in all" in warning
    assert f"the {os.cpu_count()} cores of this machine carry" in warning
    assert 0.1 < float(warning.partition("machine carry ")[2].split()[0]) < 60.0
    assert "Lower the rate, or the number of hosts." in warning


@needs_hosts
def test_a_command_is_run_after_a_check_that_went_well(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emulate", "--hosts", "1", "--name", name, "--check", "--", "echo", "ran"]) == 0
    assert capsys.readouterr().out.splitlines() == ["One host has no links to measure.", "[host0] ran"]


@needs_hosts
@pytest.mark.usefixtures("the_only_one_that_cleans")
def test_two_runs_need_two_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with EmulatedNetwork(cluster(), name):
        assert main(["emulate", "--hosts", "2", "--name", name, "--", "true"]) == 2
        message = capsys.readouterr().err
        assert f"The name '{name}' is in use by process {os.getpid()}. Choose another one with --name." in message
        assert left(name)  # what was refused has removed nothing of what has the name
        assert main(["emulate", "--hosts", "2", "--name", f"{name}b", "--", "true"]) == 0
        assert main(["emulate", "--clean"]) == 0  # what is alive is not left over
        assert name not in capsys.readouterr().out
        assert len([found for found in left(name) if found.startswith(f"{name}-")]) == 3  # two hosts and the switch
    assert left(f"{name}b") == []


# -- what cannot work -------------------------------------------------------------------------------------------------

WRONG = [
    (["--hosts", "2"], ["got no command", "or --check", "-- python train.py"]),
    (["--hosts", "2", "--"], ["got no command"]),
    (["--", "true"], ["got neither --hosts nor --cluster", "--hosts 4"]),
    (["--hosts", "0", "--", "true"], ["--hosts got '0', needs a whole number of at least 1"]),
    (["--hosts", "2", "python", "train.py"], ["got 'python train.py'", "-- before the command"]),
    (["--hosts", "2", "--rat", "1mbit", "--", "true"], ["got '--rat 1mbit'", "--help lists them"]),
    (["--hosts", "2", "--", "no-such-program"], ["got the command 'no-such-program'", "program that exists"]),
    (["--hosts", "2", "--rate", "fast", "--", "true"], ["--rate got 'fast'", "1gbit or 125MB/s"]),
    (["--hosts", "2", "--rate", "0mbit", "--", "true"], ["got a rate of 0.0", "200mbit"]),
    (["--hosts", "2", "--delay", "5", "--", "true"], ["--delay got '5'", "250ms"]),
    (["--hosts", "2", "--host", "2:rate=1mbit", "--", "true"], ["--host got host 2", "0 to 1"]),
    (["--hosts", "2", "--host", "1:speed=1mbit", "--", "true"], ["speed", "rate, delay, cpu, slowdown"]),
    (["--hosts", "2", "--host", "rate=1mbit", "--", "true"], ["RANK:KEY=VALUE"]),
    (["--hosts", "2", "--kill", "2@1s", "--", "true"], ["--kill got host 2, needs one of the 2 hosts"]),
    (["--hosts", "2", "--kill", "1", "--", "true"], ["--kill got '1'", "--kill 3@20s"]),
    (["--hosts", "2", "--timeout", "soon", "--", "true"], ["--timeout got 'soon'"]),
    (["--cluster", "no-such.yaml", "--", "true"], ["no-such.yaml", "Correct the path"]),
    (["--cluster", "x.yaml", "--rate", "1mbit", "--", "true"], ["got --rate with --cluster", "one or the other"]),
]


@pytest.mark.parametrize(("arguments", "parts"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_options(arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Found before anything is made, so also on machines that cannot emulate."""
    assert main(["emulate", *arguments]) == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_a_cluster_file_with_an_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("hosts: 2\nspeed: 200mbit\n")
    assert main(["emulate", "--cluster", str(file), "--", "true"]) == 2
    message = capsys.readouterr().err
    assert str(file) in message
    assert "got the key 'speed'" in message
    assert "rate" in message


def test_another_system_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["emulate", "--hosts", "2", "--", "true"]) == 2
    message = capsys.readouterr().err
    assert "need Linux (network namespaces), this is darwin" in message
    assert "SimulatedStrategy" in message


@needs_hosts
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pyroute2", None)  # what Python knows of a package that is not there
    assert main(["emulate", "--hosts", "2", "--", "true"]) == 2
    assert 'pip install "lightning-decentral[emulation]"' in capsys.readouterr().err


def in_a_process_of_its_own(change: Callable[[], None], arguments: Sequence[str], errors: Path) -> int:
    """The status of the command in a child that has changed who it is."""
    with errors.open("wb") as file:
        pid = os.fork()
        if not pid:
            status = 99
            try:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                change()
                status = main(arguments)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
    ended: list[int] = []

    def has_ended() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] if found else [])
        return bool(found)

    try:
        wait_until(has_ended, "the command ends")
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return ended[0]


@needs_hosts
def test_a_user_without_root_is_told(name: str, tmp_path: Path) -> None:
    def nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    arguments = ["emulate", "--hosts", "2", "--name", name, "--", "true"]
    assert in_a_process_of_its_own(nobody, arguments, tmp_path / "errors") == 2
    message = (tmp_path / "errors").read_text()
    assert "need root" in message
    assert "got user 65534" in message
    assert "sudo" in message


@needs_hosts
def test_root_without_its_rights_is_told(name: str, tmp_path: Path) -> None:
    """As in a container that is not privileged."""

    def powerless() -> None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; this process
        assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0

    arguments = ["emulate", "--hosts", "2", "--name", name, "--", "true"]
    assert in_a_process_of_its_own(powerless, arguments, tmp_path / "errors") == 2
    message = (tmp_path / "errors").read_text()
    assert "cannot be made on this machine: got [Errno 1]" in message
    assert "--privileged" in message


@needs_hosts
@pytest.mark.parametrize("files", [2, 5, 6, 7, 8, 60])
def test_too_many_hosts_for_the_open_files_are_told(name: str, tmp_path: Path, files: int) -> None:
    """Wherever on its way it can open no more, nothing is left of it."""

    def few_files() -> None:
        first_free = os.dup(0)
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + files, first_free + files))

    arguments = ["emulate", "--hosts", "40", "--name", name, "--", "true"]
    assert in_a_process_of_its_own(few_files, arguments, tmp_path / "errors") == 2
    message = (tmp_path / "errors").read_text()
    assert "Too many open files" in message
    assert "ulimit -n 10000" in message


@needs_hosts
def test_the_example_on_the_page_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs root, so the other tests of the pages leave it out."""
    page = Path(__file__).parents[2] / "docs" / "concepts" / "emulation.md"
    (code,) = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert 'name="mine"' in code
    exec(compile(code.replace('name="mine"', f'name="{name}"'), str(page), "exec"), {})
    printed = capsys.readouterr().out
    assert sorted(line for line in printed.splitlines() if "I am" in line) == [
        f"[host{rank}] I am {rank}" for rank in range(3)
    ]
    assert "[0, 0, -9]" in printed


# -- how it ends ------------------------------------------------------------------------------------------------------


def _heed_signals() -> None:
    """A shell, or nohup, may have had them ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Started:
    """The command line in a process of its own, which believes to be a user's: what it prints goes to a file."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.file = folder / "output"
        with self.file.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightning_decentral", "emulate", *LONG, *arguments],
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_heed_signals,
            )

    @property
    def output(self) -> str:
        return self.file.read_text(errors="replace")

    def waits_for(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.output.count(text) >= times or self.process.poll() is not None, text)
        assert self.output.count(text) >= times, self.output

    def numbers(self, word: str) -> list[int]:
        """Process numbers that the hosts have printed after a word."""
        return [int(line.split()[-1]) for line in self.output.splitlines() if f"] {word} " in line]

    def ends(self) -> int:
        return self.process.wait(ENDS_WITHIN)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    runs: list[Started] = []

    def start(*arguments: str) -> Started:
        runs.append(Started(tmp_path, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


# A host with a child and a grandchild; neither hears Ctrl-C, since a shell makes what it starts with & ignore it.
FAMILY = ["sh", "-c", "setsid sleep 1000 & echo child $!; echo own $$; sleep 1000"]


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_ends_everything(number: signal.Signals, name: str, started: Callable[..., Started]) -> None:
    # With all that there is to clean up: control groups and the relay's devices too.
    options = ["--hosts", "2", "--rate", "100mbit", "--delay", "1ms", "--host", "1:cpu=50%", "--name", name]
    run = started(*options, "--", *FAMILY)
    run.waits_for("] own ", 2)
    run.process.send_signal(number)
    assert run.ends() == 130
    assert f"{number.name}: ending the hosts" in run.output
    assert "Traceback" not in run.output
    assert not any(alive(process) for process in (*run.numbers("child"), *run.numbers("own")))
    assert len(run.numbers("child")) == 2
    assert left(name) == []


@needs_hosts
def test_hosts_may_end_in_order_after_ctrl_c_also_when_they_stand_still(
    name: str, started: Callable[..., Started]
) -> None:
    """They hear it, and have time to write their checkpoints; the stopped one goes on for that."""
    command = ["sh", "-c", "trap 'sleep 0.3; echo saved; exit' INT; echo up; while :; do sleep 0.05; done"]
    run = started("--hosts", "2", "--stop", "1@2s", "--name", name, "--", *command)
    run.waits_for("] up", 2)
    run.waits_for("stop of host 1")
    run.process.send_signal(signal.SIGINT)
    assert run.ends() == 130
    assert run.output.count("] saved") == 2


@needs_hosts
def test_a_second_ctrl_c_ends_them_at_once(name: str, started: Callable[..., Started]) -> None:
    run = started("--hosts", "2", "--name", name, "--", "sh", "-c", 'trap "" INT; echo own $$; sleep 1000')
    run.waits_for("] own ", 2)
    run.process.send_signal(signal.SIGINT)
    run.waits_for("(again: at once)")
    time.sleep(0.5)
    assert run.process.poll() is None  # they ignore it, and have minutes
    run.process.send_signal(signal.SIGINT)
    assert run.ends() == 130
    assert not any(map(alive, run.numbers("own")))


@needs_hosts
@pytest.mark.parametrize("after", [0.05, 0.4])
def test_an_interruption_while_it_starts(after: float, name: str, started: Callable[..., Started]) -> None:
    """While the network is made, or while it is measured."""
    run = started("--hosts", "8", "--delay", "1ms", "--name", name, "--", "sh", "-c", "echo up; sleep 1000")
    wait_until(lambda: bool(left(name)), "something is made")
    time.sleep(after)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends() == 130, run.output
    for sign in ("Traceback", "Error", "ignored"):
        assert sign not in run.output
    assert left(name) == []


@needs_hosts
def test_nobody_reads_the_output(name: str) -> None:
    """As with ``| head -1``."""
    command = [sys.executable, "-m", "lightning_decentral", "emulate", "--hosts", "2", "--name", name, "--", "yes"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().rstrip() in (b"[host0] y", b"[host1] y")
        process.stdout.close()
        assert process.wait(ENDS_WITHIN) == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()


@needs_hosts
@pytest.mark.usefixtures("the_only_one_that_cleans")
def test_a_killed_emulator_leaves_what_the_next_one_names_and_clean_removes(
    name: str, started: Callable[..., Started], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hosts", "2", "--delay", "1ms", "--host", "1:cpu=50%", "--name", name]
    run = started(*options, "--", *FAMILY)
    run.waits_for("] own ", 2)
    run.process.kill()
    run.process.wait()
    wait_until(lambda: not any(map(alive, run.numbers("own"))), "the hosts end with the emulator")
    assert left(name)
    assert main(["emulate", *options, "--", "true"]) == 2
    message = capsys.readouterr().err
    assert f"of a run called '{name}' that did not end properly" in message
    assert "lightning-decentral emulate --clean" in message
    assert main(["emulate", "--clean"]) == 0
    assert f"removed what was left of the run '{name}'" in capsys.readouterr().out
    assert left(name) == []
    assert not any(map(alive, run.numbers("child")))  # whom the kernel does not kill: it left its session
    assert main(["emulate", "--clean"]) == 0
    assert name not in capsys.readouterr().out
    said = Said()
    with EmulatedNetwork(cluster(Host(cpu=0.5)), name) as network:
        assert run_in_hosts(network, ["true"], timeout_seconds=20.0, output=said)[0].exit_code == 0
