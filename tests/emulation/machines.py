"""What the tests of emulated hosts share: small clusters, small programs, and a look at what a run has left behind."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import ParamSpec

import pytest

from lightning_decentral.lab.emulation import EmulatedNetwork, Measured, hosts, measure
from lightning_decentral.lab.emulation.cgroups import exist
from lightning_decentral.lab.emulation.network import RUN_FOLDER, inside
from lightning_decentral.simulation.cluster_file import ClusterFile, Host

MBIT = 1e6 / 8  # bytes per second


def _missing() -> str:
    if sys.platform != "linux":
        return "emulated hosts need Linux"
    if os.geteuid() != 0:
        return "emulated hosts need root"
    if importlib.util.find_spec("pyroute2") is None:
        return "emulated hosts need pyroute2: pip install lightning-decentral[emulation]"
    return ""


needs_hosts = pytest.mark.skipif(bool(_missing()), reason=_missing())


def cluster(*limited: Host, number: int = 2) -> ClusterFile:
    """These hosts, or so many without limits."""
    return ClusterFile("test", limited or (Host(),) * number)


def python(code: str, *arguments: str) -> list[str]:
    """A command that runs code of the standard library: it starts without the environment's packages."""
    return [sys.executable, "-S", "-c", code, *arguments]


# For such a command: a connection to a host, as soon as it listens there.
CONNECT = """
import socket, time
def connect(host, port):
    while True:
        try: return socket.create_connection((host, port))
        except ConnectionRefusedError: time.sleep(0.01)
"""


class Said:
    """What the hosts and the emulator (``None``) have printed, and when."""

    def __init__(self) -> None:
        self.lines: list[tuple[int | None, str]] = []
        self.times: list[float] = []

    def __call__(self, host: int | None, line: str) -> None:
        self.lines.append((host, line))
        self.times.append(time.monotonic())

    def by(self, host: int | None) -> list[str]:
        return [line for each, line in self.lines if each == host]

    def since(self, host: int | None, text: str) -> float:
        """Seconds since a line with this text was first heard; below 0 if it was not."""
        for (each, line), when in zip(self.lines, self.times, strict=True):
            if each == host and text in line:
                return time.monotonic() - when
        return -1.0


@contextmanager
def waiting_clock(*gates: tuple[float, Callable[[], bool]]) -> Iterator[list[int]]:
    """Let the clock of a run in hosts stand still at some moments, until what must have happened by then has happened.

    However slow the machine is, what a test does at such a moment comes after what it needs.

    Args:
        gates: seconds of the run, in order, and what must hold before they are over.

    Returns:
        A list with one entry: how many times the clock has been looked at.
    """
    ahead, looks = list(gates), [0]
    began = 0.0  # with the first look
    stood, waits_since = 0.0, 0.0  # for how long in all; since when, at the first gate

    def monotonic() -> float:
        nonlocal began, stood, waits_since
        looks[0] += 1
        now = time.monotonic()
        began = began or now
        while ahead and now - stood >= began + ahead[0][0]:
            moment, holds = ahead[0]
            waits_since = waits_since or now
            if not holds() and now < waits_since + 120.0:  # later the test fails for what did not happen
                time.sleep(0.005)
                return began + moment - 1e-3
            stood, waits_since = now - began - moment, 0.0
            del ahead[0]
        return now - stood

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "time", SimpleNamespace(monotonic=monotonic))
        yield looks


def reno(network: EmulatedNetwork) -> None:
    """Let the hosts keep a queue at the link, so that the link is measured and not what this machine's TCP thinks of
    it: bbr takes cores that are late for a slow link, and leaves up to a quarter of it unused."""
    for host in range(network.workers):
        with inside(network.namespace(host)):
            Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text("reno")


def measured(network: EmulatedNetwork, fits: Callable[[list[Measured]], bool], attempts: int = 12) -> list[Measured]:
    """Measure until it fits: others may use the cores for some seconds, but not every time."""
    for _ in range(attempts):
        links = measure(network, seconds=1.0)  # after the warm-up in which TCP finds the rate
        if fits(links):
            break
    return links


P = ParamSpec("P")


def on_time(test: Callable[P, None]) -> Callable[P, None]:
    """For a test of rates and shares, which fails where others use the cores: it must succeed once in some times."""

    @functools.wraps(test)
    def attempts(*args: P.args, **kwargs: P.kwargs) -> None:
        for _ in range(7):
            with suppress(AssertionError):
                return test(*args, **kwargs)
        return test(*args, **kwargs)

    return attempts


def left(name: str) -> list[str]:
    """What there still is of a run: namespaces, control groups, files."""
    found = [each for each in os.listdir("/run/netns") if each.startswith(f"{name}-")] if _namespaces() else []
    if exist(name):
        found.append("control groups")
    if (RUN_FOLDER / name).exists():
        found.append(str(RUN_FOLDER / name))
    return found


def _namespaces() -> bool:
    return Path("/run/netns").is_dir()


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
