"""Proved here: on emulated hosts torch's gloo meets and adds up, both strategies train with ``num_nodes=<hosts>`` and
``devices=1``, the bytes that leave the interfaces are those that the strategies count, a link's rate is what limits
them, and when a host is killed the others end and name it."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from emulation.machines import MBIT, Said, cluster, left, needs_hosts, waiting_clock
from emulation.work import HEARD, SIZE, STEPS
from lightning_decentral.lab.emulation import EmulatedNetwork, Event, Outcome, run_in_hosts
from lightning_decentral.simulation.cluster_file import PAYLOAD_SHARE, Host

pytestmark = needs_hosts

HOSTS = 4
RATE = 100 * MBIT
MODEL_BYTES = SIZE * SIZE * 4
WORK = str(Path(__file__).with_name("work.py"))
WITHIN = 150.0


@dataclass
class Training:
    """What was said in one run of all parts, and the interfaces' counters whenever a host said "ready" or "done"."""

    said: Said = field(default_factory=Said)
    counters: dict[tuple[str, str, int], int] = field(default_factory=dict)  # word, part, host
    outcomes: list[Outcome] = field(default_factory=list)

    def lines(self, word: str, part: str = "") -> list[list[str]]:
        """The words after these in what each host said."""
        beginning = f"{word} {part}".strip()
        found = {host: line.split()[len(beginning.split()) :] for host, line in self.said.lines
                 if line.startswith(f"{beginning} ")}  # fmt: skip
        assert sorted(found, key=str) == list(range(HOSTS)), "\n".join(line for _, line in self.said.lines)
        return [found[host] for host in range(HOSTS)]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, warm: str) -> Training:
    """All parts on the same four hosts; the last one is slowed down."""
    run = Training()
    name = f"testtraining{os.getpid()}"
    heard = tmp_path_factory.mktemp("heard")
    hosts = [Host(RATE)] * (HOSTS - 1) + [Host(RATE, slowdown=3.0)]
    with EmulatedNetwork(cluster(*hosts), name) as network:

        def hear(host: int | None, line: str) -> None:
            run.said(host, line)
            word, _, rest = line.partition(" ")
            if host is not None and word in ("ready", "done"):
                run.counters[word, rest.split()[0], host] = network.bytes_sent(host)
                (heard / f"{word} {rest.split()[0]} host{host}").touch()

        run.outcomes = run_in_hosts(
            network,
            [warm, WORK, "all_reduce", "dpsgd", "adpsgd"],
            {HEARD: str(heard)},
            timeout_seconds=WITHIN,
            output=hear,
        )
    assert left(name) == []
    return run


def test_gloo_adds_up_over_all_hosts(training: Training) -> None:
    total = float(sum(range(1, HOSTS + 1)))
    assert training.lines("sum") == [[str(HOSTS), str(total), str(total)]] * HOSTS


@pytest.mark.parametrize("part", ["dpsgd", "adpsgd"])
def test_a_strategy_trains_and_counts_what_leaves_the_interfaces(part: str, training: Training) -> None:
    assert [outcome.exit_code for outcome in training.outcomes] == [0] * HOSTS, training.said.lines
    factors = ["1.0"] * (HOSTS - 1) + ["3.0"]
    assert training.lines("ready", part) == [[f"host{host}", factors[host]] for host in range(HOSTS)]
    counted = [int(words[0]) for words in training.lines("done", part)]
    steps = [int(words[1]) for words in training.lines("done", part)]
    left_interface = [
        training.counters["done", part, host] - training.counters["ready", part, host] for host in range(HOSTS)
    ]
    assert sum(steps) == HOSTS * STEPS, steps
    if part == "dpsgd":
        assert counted == [STEPS * MODEL_BYTES] * HOSTS  # to one peer in every step
    else:
        calls, rest = divmod(sum(counted), 2 * MODEL_BYTES)  # each and its answer
        assert rest == 0
        assert 0 < calls <= sum(steps[1::2])  # odd ranks call, at most once in a step
    for host in range(HOSTS):
        # Above: headers (66 of 1514 bytes at most), acknowledgements of as many bytes received, heartbeats.
        assert counted[host] <= left_interface[host] < counted[host] / PAYLOAD_SHARE * 1.03, host


def test_the_links_limit_the_steps(training: Training) -> None:
    """A model of a megabyte in every step over 100 Mbit/s; training by itself takes milliseconds."""
    when = {
        line.split()[0]: moment
        for (host, line), moment in zip(training.said.lines, training.said.times, strict=True)
        if host == 0 and re.match("(ready|done) dpsgd", line)
    }
    assert when["done"] - when["ready"] > STEPS * MODEL_BYTES / (RATE * PAYLOAD_SHARE)


def test_a_killed_host_is_named_by_all_others(training: Training, name: str, tmp_path: Path, warm: str) -> None:
    """They end by themselves, long before the time that they are given."""
    for host in range(3):
        (tmp_path / f"ready for_ever host{host}").touch()
    said = Said()

    def all_train() -> bool:
        return all(said.since(host, "ready for_ever") >= 0.0 for host in range(3))

    network = EmulatedNetwork(cluster(*[Host(RATE)] * 3), name)
    with network, waiting_clock((0.1, all_train), (1.0, lambda: True)):
        outcomes = run_in_hosts(
            network,
            [warm, WORK, "for_ever"],
            {HEARD: str(tmp_path)},
            events=[Event.parse("kill", "2@1s")],
            timeout_seconds=WITHIN,
            grace_seconds=60.0,
            output=said,
        )
    everything = "\n".join(f"{host}: {line}" for host, line in said.lines)
    assert (outcomes[2].exit_code, outcomes[2].on_purpose) == (-signal.SIGKILL, True)
    for host in (0, 1):
        assert outcomes[host].exit_code == 1, everything
        errors = [line for line in said.by(host) if "PeerLost" in line]
        assert any("worker 2 on host2" in line for line in errors), everything
        assert outcomes[host].seconds < 50.0, everything
    assert "time is up" not in everything
