"""Proved here: a command runs in every host with the variables of torchrun, a host name, and the names of the others;
what it prints arrives line by line, however it prints; its end is reported as it was; a limited host gets its share of
the processor and no more; and whatever the command has started ends with it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import wait_until

from emulation.machines import Said, alive, cluster, left, needs_hosts, on_time, python, waiting_clock
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.emulation import EmulatedNetwork, Outcome, run_in_hosts
from lightning_decentral.lab.emulation.hosts import exit_code
from lightning_decentral.lab.emulation.network import leftovers, remove
from lightning_decentral.simulation.cluster_file import Host

pytestmark = needs_hosts


def run(
    name: str, command: list[str], *hosts: Host, number: int = 2, seconds: float = 20.0, **options: Any
) -> tuple[Said, list[Outcome]]:
    """What was said, and how it ended."""
    said = Said()
    with EmulatedNetwork(cluster(*hosts, number=number), name) as network:
        outcomes = run_in_hosts(network, command, timeout_seconds=seconds, output=said, **options)
    return said, outcomes


def test_a_host_knows_who_it_is_and_who_the_others_are(name: str) -> None:
    look = python(
        "import json, os, socket\n"
        "peers = [socket.getaddrinfo(f'host{r}', 80, socket.AF_INET)[0][4][0] for r in range(3)]\n"
        "print(json.dumps([dict(os.environ), os.uname().nodename, peers, socket.gethostbyname('localhost')]))\n"
    )
    said, outcomes = run(name, look, Host(), Host(slowdown=4.0), Host(), environment={"MINE": "yes"})
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, 0]
    for rank in range(3):
        environment, own, peers, local = json.loads(said.by(rank)[0])
        assert own == f"host{rank}"
        assert peers == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
        assert local == "127.0.0.1"
        wanted = {
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": "29500",
            "WORLD_SIZE": "3",
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(rank),
            "GROUP_WORLD_SIZE": "3",
            "ROLE_RANK": str(rank),
            "ROLE_WORLD_SIZE": "3",
            "NODE_RANK": str(rank),
            "TORCHELASTIC_RUN_ID": name,
            "GLOO_SOCKET_IFNAME": "eth0",
            "LIGHTNING_DECENTRAL_SLOWDOWN": "4.0" if rank == 1 else "1.0",
            "MINE": "yes",
        }
        assert {key: environment.get(key) for key in wanted} == wanted
    assert os.uname().nodename != "host0"
    assert "host0" not in Path("/etc/hosts").read_text()


def test_the_number_of_the_host_can_be_an_argument(name: str) -> None:
    said, _ = run(name, python("import sys; print(sys.argv[1:])", "out/{rank}.txt", "{other}"))
    assert said.lines[0][1] != said.lines[1][1]
    assert [said.by(host) for host in range(2)] == [[f"['out/{host}.txt', '{{other}}']"] for host in range(2)]


def test_lines_arrive_whole_and_progress_bars_as_they_end(name: str) -> None:
    """A line longer than a pipe, bars that return to the beginning of the line, bytes that are no text, no last end."""
    write = python(
        "import os, time\n"
        "def write(text):\n"
        "    while text: text = text[os.write(1, text):]\n"
        "write(b'x' * 300_000 + b'y\\n')\n"
        "for percent in range(0, 101, 25):\n"
        "    write(b'\\r%d %%' % percent); time.sleep(0.02)\n"
        "write(b'\\n' + b'a\\rb\\r\\r\\n' + b'windows\\r\\n' + b'\\xff\\n' + b'\\n')\n"
        "os.write(2, b'error\\n')\n"
        "write(b'1 %\\r'); time.sleep(0.1); write(b'2 %\\r'); time.sleep(0.1); write(b'no end')\n"
    )
    said, _ = run(name, write, number=1)
    assert said.by(0)[0] == "x" * 300_000 + "y"
    assert said.by(0)[1:] == ["100 %", "b", "windows", "\ufffd", "", "error", "no end"]


def test_lines_arrive_while_the_command_runs(name: str, tmp_path: Path) -> None:
    """And not all at the end: the command waits until its first line was heard."""
    heard, lines = tmp_path / "heard", []

    def hear(host: int | None, line: str) -> None:
        lines.append(line)
        heard.touch()

    command = ["sh", "-c", f"echo early; while [ ! -e {heard} ]; do sleep 0.02; done; echo late"]
    with EmulatedNetwork(cluster(number=1), name) as network:
        run_in_hosts(network, command, timeout_seconds=60.0, output=hear)
    assert lines == ["early", "late"]


def test_a_host_that_prints_without_end_does_not_keep_the_emulator_from_the_rest(name: str) -> None:
    """Neither with lines nor without: the other host is heard, and the time-out acts."""
    command = ["sh", "-c", 'case $RANK in 0) yes;; 1) yes | tr -d "\\n";; *) echo heard;; esac']
    said = Said()
    with EmulatedNetwork(cluster(number=3), name) as network, waiting_clock((0.2, lambda: said.since(2, "heard") >= 0)):
        outcomes = run_in_hosts(network, command, timeout_seconds=0.3, output=said)
    # When the time is up, a line of many megabytes is decoded, and everybody is killed.
    assert said.by(2) == ["heard"]
    assert "time is up: killing hosts 0, 1" in said.by(None)
    assert [outcome.exit_code for outcome in outcomes] == [-signal.SIGKILL, -signal.SIGKILL, 0]


def test_waiting_for_a_host_that_closed_its_output_costs_nothing(name: str) -> None:
    with waiting_clock() as looks:
        _, outcomes = run(name, ["sh", "-c", "exec >&- 2>&-; exec sleep 1"], number=1)
    assert outcomes[0].exit_code == 0
    assert looks[0] < 100  # at the clock: a busy loop does it ten thousand times in a second


def test_how_a_command_ends_is_told(name: str, tmp_path: Path) -> None:
    first = tmp_path / "host2"
    wait = f"while [ ! -e {first} ]; do sleep 0.02; done"
    command = ["sh", "-c", f"case $RANK in 0) exit 0;; 1) {wait}; exit 7;; *) kill -SEGV $$;; esac"]
    said = Said()

    def hear(host: int | None, line: str) -> None:
        said(host, line)
        if "host 2 ended" in line:
            first.touch()

    with EmulatedNetwork(cluster(number=3), name) as network:
        outcomes = run_in_hosts(network, command, timeout_seconds=60.0, output=hear)
    assert [outcome.exit_code for outcome in outcomes] == [0, 7, -signal.SIGSEGV]
    assert not any(outcome.on_purpose for outcome in outcomes)
    assert "host 1 ended with exit code 7" in said.by(None)
    assert exit_code(outcomes) == 128 + signal.SIGSEGV  # the first that failed


def test_the_status_of_all_is_that_of_the_first_failure() -> None:
    good, late, early = Outcome(0, False, 1.0), Outcome(3, False, 9.0), Outcome(4, False, 2.0)
    assert exit_code([good, good]) == 0
    assert exit_code([good, late, early]) == 4
    assert exit_code([Outcome(-9, True, 1.0), good]) == 0  # killed on purpose
    assert exit_code([Outcome(-9, False, 1.0), good]) == 137


def test_the_others_have_some_time_when_a_host_has_failed(name: str) -> None:
    command = ["sh", "-c", "case $RANK in 0) exit 5;; 1) sleep 0.3;; *) sleep 60;; esac"]
    began = time.monotonic()
    said, outcomes = run(name, command, number=3, grace_seconds=3.0)
    assert 3.0 < time.monotonic() - began < 30.0
    assert "the others have 3 s to end" in said.by(None)
    assert [outcome.exit_code for outcome in outcomes] == [5, 0, -signal.SIGKILL]
    assert exit_code(outcomes) == 5


@on_time
def test_a_limited_host_gets_its_share_of_the_processor(name: str) -> None:
    """All its processes together, also those that they start; the other host is not limited."""
    busy = python(
        "import os, resource, time\n"
        "def used():\n"
        "    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "    return sum(one.ru_utime + one.ru_stime for one in each)\n"
        "began, before = time.monotonic(), used()\n"
        "child = os.fork()\n"
        "while time.monotonic() < began + 1.6: pass\n"
        "if child: os.wait(); print((used() - before) / (time.monotonic() - began))\n"
    )
    said, _ = run(name, busy, Host(cpu=0.25), Host(), Host(cpu=0.02))
    quarter, free, little = (float(said.by(host)[0]) for host in range(3))
    # In cores. Granted in slices (every 20 ms, and every 50 ms for 2 %), of which one more or less is used, and each
    # core may take a little more before it notices; less when other programs want the cores too, as the free one tells.
    assert 0.6 * min(0.25, free) < quarter < 1.15 * 0.25
    assert little < 0.04
    assert free > 0.9 * quarter


def test_what_a_command_has_started_ends_with_it(name: str, tmp_path: Path) -> None:
    """Also if it left its session, ignores signals and keeps the pipe open."""
    command = ["sh", "-c", f'trap "" TERM INT HUP; setsid sleep 1000 & echo $! > {tmp_path}/$RANK; sleep 0.2']
    said, _ = run(name, command, seconds=60.0)
    assert not any("time is up" in line for line in said.by(None))
    for rank in range(2):
        assert not alive(int((tmp_path / str(rank)).read_text()))


def test_many_processes_of_a_limited_host_are_gone_before_its_control_group(name: str) -> None:
    command = ["sh", "-c", "for i in $(seq 40); do sleep 1000 & done; echo up"]
    said, outcomes = run(name, command, Host(cpu=0.5))
    assert said.by(0) == ["up"]
    assert outcomes[0].exit_code == 0
    assert left(name) == []


def test_a_command_that_cannot_be_started_is_named(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("no first line\n")
    script.chmod(0o755)
    for program, what in ((str(script), "Exec format error"), ("no-such-program", "No such file")):
        with pytest.raises(ConfigurationError, match=rf"{program}.*{what}.*Correct it"):
            run(name, [program])


def test_an_error_while_printing_ends_everything(name: str, tmp_path: Path) -> None:
    files = [tmp_path / str(rank) for rank in range(2)]

    def fail(host: int | None, line: str) -> None:
        wait_until(lambda: all(file.exists() for file in files), "both run")
        raise OSError("nobody reads this")

    new = f"{tmp_path}/$RANK.new"
    command = ["sh", "-c", f"echo $$ > {new}; mv {new} {tmp_path}/$RANK; echo line; sleep 1000"]
    with EmulatedNetwork(cluster(), name) as network:
        with pytest.raises(OSError, match="nobody reads this"):
            run_in_hosts(network, command, timeout_seconds=20.0, output=fail)
        for file in files:
            assert not alive(int(file.read_text()))
        said = Said()  # and the network can be used again
        assert [o.exit_code for o in run_in_hosts(network, ["true"], timeout_seconds=20.0, output=said)] == [0, 0]


def test_a_handler_of_signals_of_the_caller_is_not_run_by_children(name: str, tmp_path: Path) -> None:
    """Making namespaces must not fork a copy of this process that a signal sends through the caller's code."""
    ran = tmp_path / "ran"
    previous = signal.signal(signal.SIGTERM, lambda *_: ran.write_text(str(os.getpid())))
    try:
        for _ in range(5):
            with EmulatedNetwork(cluster(Host(delay_seconds=0.001), Host()), name):
                pass
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not ran.exists()


def test_hosts_end_with_the_emulator(name: str, tmp_path: Path) -> None:
    """Killed, it cannot end them itself: the kernel does. What is left of the run is found and can be removed."""
    command = ["sh", "-c", f"cd {tmp_path}; echo $$ > $RANK.new; mv $RANK.new $RANK; exec sleep 1000"]
    pid = os.fork()
    if not pid:
        try:
            network = EmulatedNetwork(cluster(Host(cpu=0.5), Host(delay_seconds=0.001)), name)
            network.create()
            network.limit()
            run_in_hosts(network, command)
        finally:
            os._exit(1)
    files = [tmp_path / str(rank) for rank in range(2)]
    try:
        wait_until(lambda: all(file.exists() for file in files), "the hosts run")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    wait_until(lambda: not any(alive(int(file.read_text())) for file in files), "the hosts end")
    assert left(name)
    assert name in leftovers()
    remove(name)
    assert name not in leftovers()
