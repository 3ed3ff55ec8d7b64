"""Proved here: emulated links carry what was asked of them, in both directions and at once; delays add up to the round
trip; sites share their link; partitions part whom they name and end when they end; what a host sends is counted; and
several networks can be up at the same time without knowing of each other. Signals wait while something is changed."""

from __future__ import annotations

import itertools
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import pytest

from emulation.machines import CONNECT, MBIT, Said, cluster, left, measured, needs_hosts, on_time, python, reno
from lightning_decentral.errors import ConfigurationError, EmulationError
from lightning_decentral.lab.emulation import EmulatedNetwork, Measured, measure, run_in_hosts
from lightning_decentral.lab.emulation.check import describe
from lightning_decentral.lab.emulation.network import inside
from lightning_decentral.simulation.cluster_file import PAYLOAD_SHARE, ClusterFile, Host

# What `--check` promises; measured over a second, tbf's bucket (5 ms of the rate) and TCP's sawtooth stay below it.
TOLERANCE = 0.10
ROUND_TRIP = 1.10  # longer than asked by what two cores take that also do other things; never shorter


def all_right(links: Sequence[Measured]) -> bool:
    return all(link.right for link in links)


def delays_by(way: str, network: EmulatedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the way in which a network delays, which is otherwise the kernel's to choose."""
    if way == "relay":
        monkeypatch.setattr(network, "_has_netem", lambda: False)


def reaches(network: EmulatedNetwork, source: int, target: int, seconds: float = 10.0) -> bool:
    """Whether a datagram arrives within some seconds; without a limit it takes a tenth of a millisecond."""
    with inside(network.namespace(target)):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(network.namespace(source)):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.settimeout(seconds)
        receiver.bind((network.address(target), 7000))
        sender.sendto(b"?", (network.address(target), 7000))
        try:
            return receiver.recv(1) == b"?"
        except TimeoutError:
            return False


@needs_hosts
def test_every_link_carries_its_own_rate(name: str) -> None:
    """All links of the ring at once; the slow host's uplink and its downlink are slow, and no other."""
    with EmulatedNetwork(cluster(Host(40 * MBIT), Host(40 * MBIT), Host(8 * MBIT)), name) as network:
        reno(network)
        links = measured(network, all_right)
    assert [link.asked_bytes_per_second for link in links] == [
        rate * MBIT * PAYLOAD_SHARE
        for rate in (40, 8, 8)  # 0 -> 1, 1 -> 2, 2 -> 0
    ]
    for link in links:
        assert link.bytes_per_second == pytest.approx(link.asked_bytes_per_second, rel=TOLERANCE), link
        assert link.right, link


@needs_hosts
@pytest.mark.parametrize("way", ["relay", "netem"])
def test_delays_of_both_ends_add_up_and_leave_the_rate(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = EmulatedNetwork(cluster(Host(30 * MBIT, 0.015), Host(30 * MBIT, 0.045)), name)
    delays_by(way, network, monkeypatch)
    with network:
        if way == "netem" and "netem" not in network.delay_by:
            pytest.skip("this kernel has no netem")
        assert way in network.delay_by
        reno(network)
        links = measured(network, all_right)
    for link in links:
        assert link.asked_round_trip_seconds == pytest.approx(0.060)
        assert 0.060 <= link.round_trip_seconds < 0.060 * ROUND_TRIP, link
        assert link.bytes_per_second == pytest.approx(30 * MBIT * PAYLOAD_SHARE, rel=TOLERANCE), link


# Sends datagrams to another host for as long as it may, or counts what arrives in the second half of that time, which
# begins at the moment in a file: when all are up.
FLOOD = """
import os, socket, sys, time
targets = {int(a): int(b) for a, b in (pair.split(">") for pair in sys.argv[3:])}
file, seconds, rank = sys.argv[1], float(sys.argv[2]), int(os.environ["RANK"])
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if rank not in targets: own.bind(("", 7000))
print("up", flush=True)
while not os.path.exists(file): time.sleep(0.01)
begin = float(open(file).read())
if rank in targets:
    while time.monotonic() < begin + seconds:
        try: own.sendto(bytes(1400), (f"10.77.0.{targets[rank] + 1}", 7000))
        except OSError: time.sleep(0.001)
else:
    own.settimeout(0.5)
    count = 0
    while (now := time.monotonic()) < begin + seconds:
        try: size = len(own.recv(2000))
        except TimeoutError: continue
        if now > begin + seconds / 2: count += size + 42
    print(count / (seconds / 2))
"""


@needs_hosts
@on_time
def test_a_site_shares_its_link_to_the_others(name: str, tmp_path: Path) -> None:
    """Two hosts of one site send to the other one, as fast as they can: together they have the rate of the WAN."""
    wan = 10 * MBIT
    sites = ClusterFile("sites", (Host(30 * MBIT),) * 4, ((0, 2), (1, 3)), wan, 0.010)
    said, begin = Said(), tmp_path / "begin"
    begin.unlink(missing_ok=True)

    def hear(host: int | None, line: str) -> None:
        said(host, line)
        if [line for _, line in said.lines] == ["up"] * 4:
            begin.with_suffix(".new").write_text(str(time.monotonic()))
            begin.with_suffix(".new").rename(begin)

    with EmulatedNetwork(sites, name) as network:
        flood = python(FLOOD, str(begin), "2.0", "0>1", "2>3")
        outcomes = run_in_hosts(network, flood, timeout_seconds=30.0, output=hear)
    assert [outcome.exit_code for outcome in outcomes] == [0] * 4, said.lines
    rates = [float(said.by(host)[1]) for host in (1, 3)]
    assert min(rates) > 0.0
    assert sum(rates) == pytest.approx(wan, rel=TOLERANCE)


@needs_hosts
def test_only_what_leaves_a_site_uses_the_wan(name: str) -> None:
    sites = ClusterFile("sites", (Host(50 * MBIT, 0.001),) * 3, ((0, 1), (2,)), 2 * MBIT, 0.030)
    with EmulatedNetwork(sites, name) as network:
        links = measured(network, inner_and_outer)
    assert inner_and_outer(links), links


def inner_and_outer(links: Sequence[Measured]) -> bool:
    """The first link within a site, the others between two: fiftyfold apart in rate."""
    inner, *outer = links
    return (
        # What the processor takes on a busy machine may be as much as half a round trip of the WAN.
        0.002 <= inner.round_trip_seconds < 0.031
        and all(0.062 <= link.round_trip_seconds < 0.124 for link in outer)
        and inner.bytes_per_second > 10 * MBIT
        # What queues before the WAN while the measurement begins arrives in it too, hence the factor of 2.
        and all(0.5 * MBIT < link.bytes_per_second < 4 * MBIT for link in outer)
    )


@needs_hosts
def test_partitions_part_whom_they_name_and_end_one_by_one(name: str) -> None:
    def parted(*expected: set[int]) -> None:
        for a, b in itertools.permutations(range(3), 2):
            if {a, b} in expected:
                assert not reaches(network, a, b, seconds=0.1)
            else:
                assert reaches(network, a, b)

    with EmulatedNetwork(cluster(number=3), name) as network:
        parted()
        network.cut([[0], [1]])
        parted({0, 1})
        network.cut([[0], [1, 2]])
        parted({0, 1}, {0, 2})
        network.heal([[0], [1]])
        parted({0, 1}, {0, 2})  # the second partition parts 0 and 1 too
        network.heal([[0], [1, 2]])
        parted()
        network.cut([[0, 1], [2]])
        network.cut([[0], [2]])
        network.heal()
        parted()
        network.heal()  # nothing to end


@needs_hosts
def test_what_a_host_sends_is_counted(name: str) -> None:
    number = 3_000_000
    send = python(
        f"{CONNECT}\n"
        "import os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    c = socket.create_server(('', 7000)).accept()[0]\n"
        "    while c.recv(1 << 16): pass\n"
        "else:\n"
        "    connect('host0', 7000).sendall(bytes(int(sys.argv[1])))\n",
        str(number),
    )
    with EmulatedNetwork(cluster(Host(200 * MBIT), Host(200 * MBIT)), name) as network:
        before = [network.bytes_sent(host) for host in range(2)]
        assert [outcome.exit_code for outcome in run_in_hosts(network, send, timeout_seconds=20.0)] == [0, 0]
        answered, sent = (network.bytes_sent(host) - before[host] for host in range(2))
    # Headers are 66 of 1514 bytes, or of up to 64 KB where the segments are cut by the interface.
    assert number < sent < number / PAYLOAD_SHARE * 1.02
    assert answered < 0.05 * number  # acknowledgements


@needs_hosts
def test_two_networks_do_not_know_of_each_other(name: str) -> None:
    other = f"{name}other"
    with EmulatedNetwork(cluster(), name) as first, EmulatedNetwork(cluster(), other) as second:
        assert first.address(1) == second.address(1)
        assert reaches(first, 0, 1)
        second.cut([[0], [1]])
        assert reaches(first, 0, 1)
        assert not reaches(second, 0, 1, seconds=0.1)
    assert left(other) == []


@needs_hosts
def test_a_host_reaches_nothing_but_the_hosts(name: str) -> None:
    """Not this machine's own servers, nor the world."""
    with socket.create_server(("0.0.0.0", 0)) as here, EmulatedNetwork(cluster(), name) as network:
        with inside(network.namespace(0)):
            inner = socket.socket()
        inner.settimeout(2.0)
        with inner, pytest.raises(ConnectionRefusedError):
            inner.connect(("127.0.0.1", here.getsockname()[1]))
        with inside(network.namespace(0)):
            inner = socket.socket()
        inner.settimeout(2.0)
        with inner, pytest.raises(OSError, match="unreachable"):
            inner.connect(("192.0.2.1", 80))


@needs_hosts
@pytest.mark.parametrize("rate", [1.0, 100e9 / 8])
def test_rates_that_cannot_be_emulated_are_refused(rate: float, name: str) -> None:
    with pytest.raises(ConfigurationError, match="needs one from 1kbit to 34gbit") as error:
        EmulatedNetwork(cluster(Host(rate)), name)
    assert f"{rate * 8e-9:.3g} Gbit/s" in str(error.value)


@needs_hosts
@pytest.mark.parametrize("wrong", ["", "a-b", "a b", "x" * 41])
def test_names_are_letters_and_digits(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="needs up to 40 letters and digits"):
        EmulatedNetwork(cluster(), wrong)


@needs_hosts
def test_a_network_that_cannot_be_made_leaves_nothing(name: str) -> None:
    """A quota that control groups cannot hold is only found when everything else is there."""
    with pytest.raises(EmulationError, match=r"got 0\.001% as its cpu, needs at least 0\.1%"):
        EmulatedNetwork(cluster(Host(), Host(cpu=0.00001)), name).create()
    assert left(name) == []


@needs_hosts
def test_one_host_has_no_links_to_measure(name: str) -> None:
    with EmulatedNetwork(cluster(Host(10 * MBIT)), name) as network:
        assert measure(network) == []
        assert "no links" in describe([], network)


def test_right_is_within_ten_percent_of_rate_and_delay() -> None:
    def link(rate: float, round_trip: float, asked: float = 100.0, asked_round_trip: float = 0.1) -> bool:
        return Measured(0, 1, asked, rate, asked_round_trip, round_trip).right

    assert link(100.0, 0.1)
    assert link(91.0, 0.109)
    assert not link(89.0, 0.1)
    assert not link(111.0, 0.1)
    assert not link(100.0, 0.111)
    assert not link(100.0, 0.089)
    assert link(5.0, 0.1, asked=math.inf)
    assert link(100.0, 0.0019, asked_round_trip=0.0)  # below what the processor takes, nothing is said
    assert not link(100.0, 0.003, asked_round_trip=0.0)


def test_the_relay_is_a_program_of_the_standard_library() -> None:
    """It is run without the environment's packages, so that it starts at once."""
    text = (Path(__file__).parents[2] / "lightning_decentral" / "lab" / "emulation" / "relay.py").read_text()
    assert "lightning_decentral" not in text


@needs_hosts
def test_no_signal_is_handled_in_the_middle_of_a_change(name: str) -> None:
    """What a handler raised in there, asyncio would print; signals come all the time, and are handled in between."""
    handled: list[bool] = []
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        files = []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        handled.append(any("asyncio" in file for file in files))

    def send() -> None:
        while not stop.wait(0.001):
            os.kill(os.getpid(), signal.SIGHUP)

    signal.signal(signal.SIGHUP, handle)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with EmulatedNetwork(cluster(Host(MBIT, 0.001), Host(), Host()), name) as network:
            network.cut(((0,), (1,)))
            network.heal()
            network.bytes_sent(0)
    finally:
        stop.set()
        sender.join()
    assert len(handled) > 3
    assert not any(handled)
