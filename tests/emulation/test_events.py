"""Proved here: hosts are killed, started again, stopped and parted from each other when that was asked for and for as
long; what happens on purpose is no failure; no run waits for a host that stands still for ever; and events that cannot
be understood are refused with an example."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Literal

import pytest

from emulation.machines import CONNECT, Said, cluster, needs_hosts, on_time, python
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.emulation import EmulatedNetwork, Event, Outcome, run_in_hosts
from lightning_decentral.lab.emulation.hosts import exit_code

# An event is due when the emulator looks, which it does 5 times a second and for every line; a shared machine may make
# it look later.
LATE = 0.5

# Sends every other host a datagram 50 times a second until a moment of the clock; prints, for every other host, the
# longest time in which nothing was heard of it, and when that began (after the first sign of all).
HEARTBEAT = """
import json, os, socket, sys, time
rank, number, end = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), float(sys.argv[1])
others = [other for other in range(number) if other != rank]
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind(("", 6000))
own.settimeout(0.02)
heard, longest = {}, {other: (0.0, 0.0) for other in others}
following = time.monotonic()
while (now := time.monotonic()) < end:
    if now >= following:
        following = now + 0.02
        for other in others:
            own.sendto(b"%d" % rank, (f"10.77.0.{other + 1}", 6000))
    try:
        sender = int(own.recv(9))
    except TimeoutError:
        continue
    now = time.monotonic()
    longest[sender] = max(longest[sender], (now - heard.get(sender, now), heard.get(sender, now)))
    heard[sender] = now
for sender in others:
    longest[sender] = max(longest[sender], (end - heard.get(sender, 0.0), heard.get(sender, 0.0)))
print(json.dumps([longest[other] for other in others]))
"""


def run(name: str, command: list[str], *events: Event, number: int = 2) -> tuple[Said, list[Outcome], float]:
    """What was said, how it ended, and when it began."""
    said = Said()
    with EmulatedNetwork(cluster(number=number), name) as network:
        began = time.monotonic()
        outcomes = run_in_hosts(network, command, events=events, timeout_seconds=20.0, grace_seconds=5.0, output=said)
    return said, outcomes, began


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
@on_time
def test_a_killed_host_is_no_failure_and_can_be_started_again(name: str, tmp_path: Path) -> None:
    """Host 1 is killed twice: the first time it begins anew, the second time it does not."""
    (tmp_path / "1").unlink(missing_ok=True)
    command = ["sh", "-c", f"echo start; sleep 1000 & [ $RANK = 0 ] && exec sleep 1.8; echo $! >> {tmp_path}/1; wait"]
    events = [Event.parse("kill", "1@500ms"), Event.parse("restart", "1@1s"), Event.parse("kill", "1@1500ms")]
    said, outcomes, began = run(name, command, *events)
    assert [(outcome.exit_code, outcome.on_purpose) for outcome in outcomes] == [(0, False), (-signal.SIGKILL, True)]
    assert exit_code(outcomes) == 0
    assert said.by(1) == ["start", "start"]
    assert said.by(0) == ["start"]
    again = max(when - began for when, (host, _) in zip(said.times, said.lines, strict=True) if host == 1)
    assert 1.0 <= again < 1.0 + LATE
    assert 1.5 <= outcomes[1].seconds < 1.5 + LATE
    events_said = [line.partition(": ")[2] for line in said.by(None)]
    assert events_said == ["kill of host 1", "restart of host 1", "kill of host 1"]
    assert len((tmp_path / "1").read_text().split()) == 2


@needs_hosts
@on_time
def test_a_run_waits_for_a_restart_that_is_still_to_come(name: str) -> None:
    """All have ended, one of them well and one killed; the restarted one decides."""
    command = ["sh", "-c", "[ $RANK = 0 ] || sleep 0.2; echo start"]
    said, outcomes, _ = run(name, command, Event.parse("restart", "0@1s"))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert said.by(0) == ["start", "start"]
    assert outcomes[0].seconds >= 1.0


@needs_hosts
@on_time
def test_a_restart_kills_first(name: str) -> None:
    command = python("import time; print('start', flush=True); time.sleep(1.0); print('end')")
    said, outcomes, _ = run(name, command, Event.parse("restart", "1@500ms"))
    assert said.by(0) == ["start", "end"]
    assert said.by(1) == ["start", "start", "end"]
    assert exit_code(outcomes) == 0


@needs_hosts
@on_time
def test_a_stopped_host_stands_still_with_its_children_and_goes_on(name: str) -> None:
    """Its connections stay: what it was sent meanwhile is there afterwards."""
    command = python(
        f"{CONNECT}\n"
        "import os\n"
        "if os.environ['RANK'] == '0':\n"
        "    peer = socket.create_server(('', 7000)).accept()[0]\n"
        "    for number in range(100): peer.sendall(b'%2d' % number); time.sleep(0.02)\n"
        "else:\n"
        "    peer = connect('host0', 7000)\n"
        "    child = os.fork()\n"
        "    gaps, last, received = [], time.monotonic(), b''\n"
        "    end = last + 2.0\n"
        "    while (now := time.monotonic()) < end or (not child and (more := peer.recv(2))):\n"
        "        if now < end: gaps.append(now - last); last = now; time.sleep(0.01)\n"
        "        else: received += more\n"
        "    if child: os.wait()\n"
        "    print(max(gaps), len(received))\n"
    )
    said, outcomes, _ = run(name, command, Event.parse("stop", "1@900ms..1600ms"))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], said.lines
    for line in said.by(1):  # of the child and of its parent
        assert 0.7 - LATE < float(line.split()[0]) < 0.7 + LATE
    assert sorted(int(line.split()[1]) for line in said.by(1)) == [0, 200]
    assert [line.partition(": ")[2] for line in said.by(None)] == ["stop of host 1", "end of the stop of host 1"]


@needs_hosts
def test_nobody_waits_for_a_host_that_stands_still_for_ever(name: str) -> None:
    began = time.monotonic()
    said, outcomes, _ = run(name, ["sleep", "1"], Event.parse("stop", "1@500ms"))
    assert time.monotonic() - began < 10.0
    assert [(outcome.exit_code, outcome.on_purpose) for outcome in outcomes] == [(0, False), (-signal.SIGKILL, True)]
    assert "all others have ended: killing the hosts that stand still" in said.by(None)
    assert exit_code(outcomes) == 0


@needs_hosts
@on_time
def test_partitions_last_as_long_as_they_were_asked_to(name: str) -> None:
    """Two of them, which overlap in time: hosts 0 and 1 are parted first, hosts 0 and 2 a little later."""
    events = [Event.parse("cut", "0|1@600ms..1400ms"), Event.parse("cut", "0|2@1s..2s")]
    said = Said()
    with EmulatedNetwork(cluster(number=3), name) as network:
        began = time.monotonic()
        heartbeat = python(HEARTBEAT, str(began + 3.0))
        outcomes = run_in_hosts(network, heartbeat, events=events, timeout_seconds=20.0, output=said)
    assert exit_code(outcomes) == 0, said.lines
    silences = {
        (rank, other): silence
        for rank in range(3)
        for other, silence in zip([o for o in range(3) if o != rank], json.loads(said.by(rank)[0]), strict=True)
    }
    for pair, (long, begins) in silences.items():
        parted = {frozenset((0, 1)): (0.6, 0.8), frozenset((0, 2)): (1.0, 1.0)}.get(frozenset(pair))
        if parted is None:
            assert long < LATE, (pair, long)
        else:
            assert parted[1] - LATE < long < parted[1] + LATE, (pair, long)
            assert parted[0] - 0.1 < begins - began < parted[0] + LATE, (pair, begins - began)
    assert said.by(None)[-1].endswith("end of the cut of hosts 0 | 2")


@needs_hosts
@on_time
def test_no_partition_outlives_its_run(name: str) -> None:
    with EmulatedNetwork(cluster(), name) as network:
        run_in_hosts(network, ["sleep", "0.4"], events=[Event.parse("cut", "0|1@200ms")], timeout_seconds=20.0)
        said = Said()
        heartbeat = python(HEARTBEAT, str(time.monotonic() + 1.5))
        run_in_hosts(network, heartbeat, timeout_seconds=20.0, output=said)
    for host in range(2):
        assert json.loads(said.by(host)[0])[0][0] < LATE
