"""Proved here: hosts are killed, started again, stopped and parted from each other when that was asked for and for as
long; what happens on purpose is no failure; no run waits for a host that stands still for ever; and events that cannot
be understood are refused with an example."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from emulation.machines import CONNECT, Said, cluster, needs_hosts, python, waiting_clock
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.emulation import EmulatedNetwork, Event, Outcome, run_in_hosts
from lightning_decentral.lab.emulation.hosts import exit_code

Gates = Callable[[Said], list[tuple[float, Callable[[], bool]]]]

# An event is due when the emulator looks, which it does 5 times a second and for every line; a shared machine may make
# it look later. Its clock waits, in these tests, for what must have happened before an event.
LATE = 10.0

# Sends every other host the moment of the clock 50 times a second, from when it has heard of all until a file exists,
# then an empty datagram. Prints when it begins, and at the end what it has sent, and what has arrived from every other
# host. Until the others listen it says hello.
HEARTBEAT = """
import json, os, socket, sys, time
rank, number, file = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
others = [other for other in range(number) if other != rank]
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
own.bind(("", 6000))
own.settimeout(0.01)
heard, sent, arrived = set(), [], {other: [] for other in others}
def send(what):
    for other in others: own.sendto(b"%d " % rank + what, (f"10.77.0.{other + 1}", 6000))
def receive():
    try: sender, _, what = own.recv(99).decode().partition(" ")
    except TimeoutError: return
    heard.add(int(sender))
    if what != "hello": arrived[int(sender)].append(what)
while len(heard) < number - 1:
    send(b"hello")
    receive()
print("up", flush=True)
while not os.path.exists(file) or len(sent) < 20:
    if not sent or time.monotonic() >= sent[-1] + 0.02:
        sent.append(time.monotonic())
        send(repr(sent[-1]).encode())
    receive()
send(b"")
while not all("" in each for each in arrived.values()): receive()
print(json.dumps([sent, {other: [float(each) for each in arrived[other] if each] for other in others}]))
"""


def run(
    name: str, command: list[str], *events: Event, number: int = 2, gates: Gates = lambda said: []
) -> tuple[Said, list[Outcome]]:
    """What was said, and how it ended; the clock waits at the gates that are made of what is said."""
    said = Said()
    with EmulatedNetwork(cluster(number=number), name) as network, waiting_clock(*gates(said)):
        outcomes = run_in_hosts(network, command, events=events, timeout_seconds=30.0, grace_seconds=5.0, output=said)
    return said, outcomes


def heartbeats(said: Said, number: int) -> dict[tuple[int, int], tuple[list[float], list[float]]]:
    """When each host has sent each other one its heartbeats, and those that did not arrive."""
    told = [json.loads(said.by(rank)[-1]) for rank in range(number)]
    pairs = [(a, b) for a in range(number) for b in range(number) if a != b]
    return {(a, b): (told[a][0], sorted(set(told[a][0]) - set(told[b][1][str(a)]))) for a, b in pairs}


def moments(said: Said) -> dict[str, tuple[float, float]]:
    """When each event happened: by the clock of the emulator, and by that of this machine."""
    return {
        line.partition(" s: ")[2]: (float(line.partition(" s: ")[0]), when)
        for (host, line), when in zip(said.lines, said.times, strict=True)
        if host is None and " s: " in line
    }


# -- reading them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "event"),
    [
        ("kill", "3@20s", Event("kill", 20.0, ((3,),))),
        ("kill", "0-2,5@1.5s", Event("kill", 1.5, ((0, 1, 2, 5),))),
        ("restart", "12@1min", Event("restart", 60.0, ((12,),))),
        ("stop", "3@20s..30s", Event("stop", 20.0, ((3,),), 30.0)),
        ("stop", "3@500ms", Event("stop", 0.5, ((3,),))),
        ("cut", "0-3|4-7@30s..40s", Event("cut", 30.0, ((0, 1, 2, 3), (4, 5, 6, 7)), 40.0)),
        ("cut", "0|1,2|3@1s", Event("cut", 1.0, ((0,), (1, 2), (3,)))),
    ],
)
def test_events_are_read(kind: Literal["kill", "restart", "stop", "cut"], text: str, event: Event) -> None:
    assert Event.parse(kind, text) == event


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("kill", "3", "--kill got '3', needs hosts and a time. Write for example --kill 3@20s."),
        ("kill", "@20s", "--kill got '@20s', needs hosts"),
        ("kill", "a@20s", "--kill got 'a@20s', needs hosts"),
        ("kill", "3,3@20s", "--kill got '3,3@20s', needs hosts"),
        ("kill", "5-3@20s", "--kill got '5-3@20s', needs hosts"),
        ("kill", "3@20s..30s", "--kill got '3@20s..30s', needs hosts and a time"),
        ("kill", "3|4@20s", "--kill got '3|4@20s', needs hosts"),
        ("kill", "3@20", "--kill got '20', needs a duration"),
        ("restart", "3@-1s", "--restart got '-1s', needs a duration"),
        ("stop", "3@30s..20s", "--stop got '3@30s..20s': it ends before it begins. Write for example 3@20s..30s."),
        ("cut", "0-3@20s", "--cut got '0-3@20s', needs groups of hosts separated by | and a time."),
        ("cut", "0|0@20s", "--cut got '0|0@20s', needs groups"),
        ("cut", "0|@20s", "--cut got '0|@20s', needs groups"),
    ],
)
def test_what_cannot_be_read_is_answered_with_an_example(
    kind: Literal["kill", "restart", "stop", "cut"], text: str, message: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        Event.parse(kind, text)
    assert message in str(error.value)


def test_events_are_named_in_words() -> None:
    assert str(Event.parse("kill", "12@1s")) == "kill of host 12"
    assert str(Event.parse("stop", "1,2@1s")) == "stop of hosts 1, 2"
    assert str(Event.parse("cut", "0-1|2@1s")) == "cut of hosts 0, 1 | 2"


@needs_hosts
def test_an_event_of_a_host_that_there_is_not_is_refused(name: str) -> None:
    with (
        EmulatedNetwork(cluster(), name) as network,
        pytest.raises(ConfigurationError, match="--kill got host 2, needs one of the 2 hosts, 0 to 1"),
    ):
        run_in_hosts(network, ["true"], events=[Event.parse("kill", "2@1s")])


# -- what they do -----------------------------------------------------------------------------------------------------


@needs_hosts
def test_a_killed_host_is_no_failure_and_can_be_started_again(name: str, tmp_path: Path) -> None:
    """Host 1 is killed twice: the first time it begins anew, the second time it does not."""
    file = tmp_path / "1"
    file.touch()

    def lives(number: int) -> Callable[[], bool]:
        return lambda: len(file.read_text().split()) == number

    command = ["sh", "-c", f"echo start; [ $RANK = 0 ] && exec sleep 1.8; sleep 1000 & echo $! >> {file}; wait"]
    events = [Event.parse("kill", "1@500ms"), Event.parse("restart", "1@1s"), Event.parse("kill", "1@1500ms")]
    said, outcomes = run(name, command, *events, gates=lambda _: [(0.5, lives(1)), (1.5, lives(2))])
    assert [(outcome.exit_code, outcome.on_purpose) for outcome in outcomes] == [(0, False), (-signal.SIGKILL, True)]
    assert exit_code(outcomes) == 0
    assert said.by(1) == ["start", "start"]
    assert said.by(0) == ["start"]
    assert 1.5 <= outcomes[1].seconds < 1.5 + LATE
    happened = [line.partition(" s: ") for line in said.by(None)]
    assert [what for _, _, what in happened] == ["kill of host 1", "restart of host 1", "kill of host 1"]
    for (when, _, _), asked in zip(happened, (0.5, 1.0, 1.5), strict=True):
        assert asked <= float(when) < asked + LATE
    assert lives(2)()


@needs_hosts
def test_a_run_waits_for_a_restart_that_is_still_to_come(name: str, tmp_path: Path) -> None:
    """All have ended, one of them well and one killed; the restarted one decides."""
    file = tmp_path / "0"
    command = ["sh", "-c", f"echo start; [ $RANK = 1 ] && exit; [ -e {file} ] && exit; touch {file}; sleep 1000"]
    events = Event.parse("kill", "0@200ms"), Event.parse("restart", "0@1s")
    said, outcomes = run(name, command, *events, gates=lambda _: [(0.2, file.exists)])
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert said.by(0) == ["start", "start"]
    assert outcomes[0].seconds >= 1.0
    assert outcomes[1].seconds < outcomes[0].seconds


@needs_hosts
def test_a_restart_kills_first(name: str, tmp_path: Path) -> None:
    file = tmp_path / "1"
    wait = f"touch {file}; [ $RANK = 1 ] && sleep 1000"
    command = ["sh", "-c", f"echo start; [ $RANK = 0 ] || [ -e {file} ] || {{ {wait}; }}; echo end"]
    said, outcomes = run(name, command, Event.parse("restart", "1@500ms"), gates=lambda _: [(0.5, file.exists)])
    assert said.by(0) == ["start", "end"]
    assert said.by(1) == ["start", "start", "end"]
    assert exit_code(outcomes) == 0


@needs_hosts
def test_a_stopped_host_stands_still_with_its_children_and_goes_on(name: str) -> None:
    """Its connections stay: what it was sent meanwhile is there afterwards."""
    command = python(
        f"{CONNECT}\n"
        "import os\n"
        "if os.environ['RANK'] == '0':\n"
        "    peer = socket.create_server(('', 7000)).accept()[0]\n"
        "    print('up', flush=True)\n"
        "    for number in range(100): peer.sendall(b'%2d' % number); time.sleep(0.01)\n"
        "else:\n"
        "    peer = connect('host0', 7000)\n"
        "    child = os.fork()\n"
        "    os.write(1, b'up\\n')\n"
        "    last, longest, received = time.monotonic(), 0.0, b''\n"
        "    while longest < 0.5:\n"
        "        time.sleep(0.01)\n"
        "        longest, last = max(longest, time.monotonic() - last), time.monotonic()\n"
        "    while not child and (more := peer.recv(2)): received += more\n"
        "    if child: os.wait()\n"
        "    os.write(1, b'%f %d\\n' % (longest, len(received)))\n"
    )
    said, outcomes = run(
        name,
        command,
        Event.parse("stop", "1@300ms..1s"),
        gates=lambda said: [
            (0.3, lambda: said.by(1) == ["up", "up"] and said.by(0) == ["up"]),
            (1.0, lambda: said.since(None, "stop of host 1") > 0.8),
        ],
    )
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], said.lines
    told = [line.split() for line in said.by(1)[2:]]  # of the child and of its parent
    assert [float(longest) >= 0.5 for longest, _ in told] == [True, True]
    assert sorted(int(received) for _, received in told) == [0, 200]
    assert [line.partition(": ")[2] for line in said.by(None)] == ["stop of host 1", "end of the stop of host 1"]


@needs_hosts
def test_nobody_waits_for_a_host_that_stands_still_for_ever(name: str) -> None:
    command = ["sh", "-c", "[ $RANK = 0 ] && exec sleep 0.6; exec sleep 1000"]
    said, outcomes = run(name, command, Event.parse("stop", "1@300ms"))
    assert [(outcome.exit_code, outcome.on_purpose) for outcome in outcomes] == [(0, False), (-signal.SIGKILL, True)]
    assert "all others have ended: killing the hosts that stand still" in said.by(None)
    assert exit_code(outcomes) == 0


@needs_hosts
def test_partitions_last_as_long_as_they_were_asked_to(name: str, tmp_path: Path) -> None:
    """Two of them, which overlap in time: hosts 0 and 1 are parted first, hosts 0 and 2 a little later."""
    end = tmp_path / "end"

    def gates(said: Said) -> list[tuple[float, Callable[[], bool]]]:
        return [
            (0.2, lambda: all(said.by(rank) for rank in range(3))),
            (0.8, lambda: said.since(None, "cut of hosts 0 | 1") > 0.6),
            (1.2, lambda: said.since(None, "cut of hosts 0 | 2") > 0.8),
            (1.4, lambda: said.since(None, "end of the cut of hosts 0 | 2") > 0.2 and end.touch() is None),
        ]

    events = [Event.parse("cut", "0|1@200ms..800ms"), Event.parse("cut", "0|2@400ms..1200ms")]
    said, outcomes = run(name, python(HEARTBEAT, str(end)), *events, number=3, gates=gates)
    assert exit_code(outcomes) == 0, said.lines
    when = moments(said)
    for what, asked in (("cut of hosts 0 | 1", (0.2, 0.8)), ("cut of hosts 0 | 2", (0.4, 1.2))):
        for event, moment in zip((what, f"end of the {what}"), asked, strict=True):
            assert moment <= when[event][0] < moment + LATE, event
    for pair, (sent, lost) in heartbeats(said, 3).items():
        if 0 not in pair:
            assert not lost, (pair, lost)
            continue
        what = f"cut of hosts 0 | {max(pair)}"
        begins, ends = when[what][1], when[f"end of the {what}"][1]
        # Both are said before they are done. Whoever notes the moment of a heartbeat may send it a little later.
        assert begins <= lost[0] < ends, (pair, lost, begins, ends)
        assert set([moment for moment in sent if lost[0] <= moment < ends][:-1]) <= set(lost), (pair, lost, sent)
        assert lost == [moment for moment in sent if lost[0] <= moment <= lost[-1]], (pair, lost, sent)
    assert said.by(None)[-1].endswith("end of the cut of hosts 0 | 2")


@needs_hosts
def test_no_partition_outlives_its_run(name: str, tmp_path: Path) -> None:
    end = tmp_path / "end"
    end.touch()
    with EmulatedNetwork(cluster(), name) as network:
        said = Said()
        cut = [Event.parse("cut", "0|1@100ms")]
        run_in_hosts(network, ["sleep", "0.5"], events=cut, timeout_seconds=30.0, output=said)
        assert len(said.by(None)) == 1
        said = Said()
        run_in_hosts(network, python(HEARTBEAT, str(end)), timeout_seconds=30.0, output=said)
    assert [lost for _, lost in heartbeats(said, 2).values()] == [[], []]
