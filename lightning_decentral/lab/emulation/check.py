"""Whether the emulated links do what was asked of them, and what the machine could carry at most."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_decentral.errors import EmulationError
from lightning_decentral.lab.emulation.hosts import run_in_hosts
from lightning_decentral.lab.emulation.network import EmulatedNetwork
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.cluster_file import PAYLOAD_SHARE, ClusterFile

TOLERANCE = 0.10  # asked against measured
_PORT = 29400
_PINGS = 15
_SHORTEST_DELAY_SECONDS = 1e-3  # below, what the processor takes for a packet is not small against it


@dataclass(frozen=True)
class Measured:
    """One link of a ring through all hosts, in which everybody sends to the next one at the same time.

    Attributes:
        source: the host that sends.
        target: the next host.
        asked_bytes_per_second: payload that the limits allow.
        bytes_per_second: payload that arrived.
        asked_round_trip_seconds: the sum of the delays, there and back.
        round_trip_seconds: of one byte, with nothing else on the way; the median of 15.
    """

    source: int
    target: int
    asked_bytes_per_second: float
    bytes_per_second: float
    asked_round_trip_seconds: float
    round_trip_seconds: float

    @property
    def right(self) -> bool:
        """Whether rate and delay are within 10 % of what was asked; delays below 1 ms, and no limit, always are."""
        rate, delay = self.asked_bytes_per_second, self.asked_round_trip_seconds
        rate_right = math.isinf(rate) or abs(self.bytes_per_second / rate - 1) <= TOLERANCE
        extra = self.round_trip_seconds - delay
        delay_right = -TOLERANCE * delay <= extra <= max(TOLERANCE * delay, 2 * _SHORTEST_DELAY_SECONDS)
        return rate_right and delay_right


def measure(network: EmulatedNetwork, seconds: float = 3.0, warm_up_seconds: float = 1.5) -> list[Measured]:
    """Measure round trips, and then all links of the ring at once, in both directions of every host's link.

    Args:
        network: the hosts.
        seconds: how long to measure what arrives.
        warm_up_seconds: how long to send before, in addition to 30 round trips: TCP finds the rate meanwhile.

    Raises:
        EmulationError: if a host does not answer.
    """
    if network.workers == 1:
        return []
    asked = [_asked(network.cluster, rank) for rank in range(network.workers)]
    longest = max(round_trip for _, round_trip in asked)
    results = _probe(
        network, _PINGS, seconds, warm_up=warm_up_seconds + 30 * longest, pinging=0.2 + (_PINGS + 5) * longest
    )
    return [
        Measured(
            rank,
            (rank + 1) % network.workers,
            asked[rank][0],
            results[(rank + 1) % network.workers][1],
            asked[rank][1],
            results[rank][0],
        )
        for rank in range(network.workers)
    ]


def ceiling(network: EmulatedNetwork, seconds: float = 0.5) -> float:
    """Return bytes per second of payload that all hosts together can send while their links are not limited and
    delayed yet.

    All that is sent on one machine costs time of its cores: this is what they carry with nothing else to do.
    """
    return sum(rate for _, rate in _probe(network, 0, seconds, warm_up=0.1, pinging=0.0))


def describe(measured: Sequence[Measured], network: EmulatedNetwork) -> str:
    """Return a table of what was asked and what was measured, and a verdict."""
    if not measured:
        return "One host has no links to measure."
    lines = [
        "link       asked Mbit/s  measured  ratio   asked RTT ms  measured",
        "---------  ------------  --------  -----   ------------  --------",
    ]
    for one in measured:
        asked = one.asked_bytes_per_second * 8e-6
        ratio = "    -" if math.isinf(asked) else f"{one.bytes_per_second / one.asked_bytes_per_second:5.2f}"
        lines.append(
            f"{f'{one.source} -> {one.target}':9}  {asked:12.1f}  {one.bytes_per_second * 8e-6:8.1f}  {ratio}   "
            f"{one.asked_round_trip_seconds * 1e3:12.1f}  {one.round_trip_seconds * 1e3:8.2f}"
            f"{'' if one.right else '   <- more than 10 % off'}"
        )
    wrong = sum(not one.right for one in measured)
    lines.append(
        f"Payload of TCP ({PAYLOAD_SHARE:.3f} of the link's rate), all links at once; {network.delay_by}. "
        + ("All within 10 %." if not wrong else f"{wrong} of {len(measured)} links are more than 10 % off.")
    )
    return "\n".join(lines)


def _asked(cluster: ClusterFile, source: int) -> tuple[float, float]:
    """Payload bytes per second and round trip of the link from a host to the next one, while all send to their next."""
    n = len(cluster.hosts)
    target = (source + 1) % n
    ring = Cluster(sites=cluster.sites)
    sites = ring.site_of(source), ring.site_of(target)
    here, there = cluster.hosts[source], cluster.hosts[target]
    rate = min(here.rate_bytes_per_second, there.rate_bytes_per_second)
    round_trip = here.delay_seconds + there.delay_seconds
    if sites[0] != sites[1]:
        edges = ring.ring_edges_out_of_sites(n)  # as many come in
        share = max(edges[site] for site in sites)
        rate = min(rate, cluster.wan_rate_bytes_per_second / share)
        round_trip += 2 * cluster.wan_delay_seconds
    return rate * PAYLOAD_SHARE, round_trip


def _probe(
    network: EmulatedNetwork, pings: int, seconds: float, warm_up: float, pinging: float
) -> list[tuple[float, float]]:
    """Round trip and bytes per second that each host received; `pinging` seconds are for the round trips."""
    n = network.workers
    addresses = [network.address(rank) for rank in range(n)]
    script = Path(__file__).with_name("probe.py")
    results: dict[int, tuple[float, float]] = {}
    said: list[str] = []
    ready: set[int] = set()
    go = network.folder / "go"
    go.unlink(missing_ok=True)

    def read(host: int | None, line: str) -> None:
        if host is not None and line == "ready":
            ready.add(host)
            if len(ready) == n:
                go.with_suffix(".new").write_text(str(time.monotonic() + 0.05))
                go.with_suffix(".new").rename(go)  # nobody sees half of it
        elif host is not None and line.startswith("probe "):
            _, round_trip, rate = line.split()
            results[host] = (float(round_trip), float(rate))
        else:
            said.append(line)

    numbers = [_PORT, pings, pinging, seconds, warm_up]
    run_in_hosts(
        network,
        [sys.executable, "-S", "-E", str(script), "{self}", "{next}", *map(str, numbers), str(go)],
        substitute=lambda rank: {"self": addresses[rank], "next": addresses[(rank + 1) % n]},
        timeout_seconds=pinging + seconds + warm_up + 30 + n,
        output=read,
        cpu_limits=False,  # the links are measured, and not how fast Python is
    )
    if len(results) < n:
        raise EmulationError(f"Hosts {sorted(set(range(n)) - set(results))} could not be measured: {' '.join(said)}")
    return [results[rank] for rank in range(n)]
