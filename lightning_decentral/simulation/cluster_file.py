"""Descriptions of clusters in YAML: one text for the simulator, the planner and the emulator."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.units import MOST_WORKERS, parse_bandwidth, parse_seconds

# A rate limits Ethernet frames, a message is payload. A full frame of a TCP stream has 1514 bytes: 14 of Ethernet, 20
# of IPv4, 20 of TCP, 12 of TCP's time stamps; the rest is payload.
FRAME_BYTES = 1514
PAYLOAD_BYTES = 1448
PAYLOAD_SHARE = PAYLOAD_BYTES / FRAME_BYTES

# What an emulated host is told of its slowdown, and the callback `Stragglers` obeys.
SLOWDOWN_VARIABLE = "LIGHTNING_DECENTRAL_SLOWDOWN"

_TOP_KEYS = ("description", "hosts", "rate", "delay", "cpu", "compute", "host", "sites", "wan")
_HOST_KEYS = ("rate", "delay", "cpu", "slowdown")
_WAN_KEYS = ("rate", "delay")
_Default = TypeVar("_Default")


@dataclass(frozen=True)
class Host:
    """One machine: its link and its speed.

    Args:
        rate_bytes_per_second: of its uplink and of its downlink, each; positive.
        delay_seconds: one way, of everything that it sends; 0 or more.
        cpu: cores that it may use at most: 0.25 is a quarter of one. ``None``: no limit. Only the emulator uses it.
        slowdown: its compute takes so many times as long; positive.

    Raises:
        ConfigurationError: if a number is out of its range.
    """

    rate_bytes_per_second: float = math.inf
    delay_seconds: float = 0.0
    cpu: float | None = None
    slowdown: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate_bytes_per_second > 0:
            raise ConfigurationError(
                f"A host got a rate of {self.rate_bytes_per_second} bytes per second, needs a positive one. "
                "Write for example 200mbit, or leave it out if there is no limit."
            )
        if not 0 <= self.delay_seconds < math.inf:
            raise ConfigurationError(
                f"A host got a delay of {self.delay_seconds} seconds, needs 0 or more. Write for example 5ms."
            )
        if self.cpu is not None and not 0 < self.cpu < math.inf:
            raise ConfigurationError(
                f"A host got {self.cpu} cores as its cpu, needs a positive number. "
                "Write 25% or 0.25 for a quarter of one core, or leave it out if there is no limit."
            )
        if not 0 < self.slowdown < math.inf:
            raise ConfigurationError(
                f"A host got the slowdown {self.slowdown}, needs a positive number. "
                "Write for example 4 if it takes four times as long."
            )


@dataclass(frozen=True)
class ClusterFile:
    """What a cluster file says.

    Args:
        name: of the cluster; that of its file without folder and ending.
        hosts: the machines, by rank; at least one. Each is one worker.
        sites: groups of ranks; a group shares one link to the others. Empty: all hosts are at one site. Otherwise every
            rank is in exactly one group.
        wan_rate_bytes_per_second: of each site's link to the others, each way; positive.
        wan_delay_seconds: one way, of everything that leaves a site, in addition to the host's; 0 or more.
        compute_seconds: of one gradient on a host with slowdown 1. ``None``: the file does not say.

    Raises:
        ConfigurationError: if a number is out of its range, or the sites do not fit the hosts.

    Example:
        >>> cluster = ClusterFile("pair", (Host(25e6), Host(25e6, slowdown=4.0)), compute_seconds=0.1)
        >>> cluster.model().slowdown
        {1: 4.0}
    """

    name: str
    hosts: tuple[Host, ...]
    sites: tuple[tuple[int, ...], ...] = ()
    wan_rate_bytes_per_second: float = math.inf
    wan_delay_seconds: float = 0.0
    compute_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ConfigurationError("A cluster got no hosts, needs at least 1. Write for example hosts: 8.")
        if not self.wan_rate_bytes_per_second > 0:
            raise ConfigurationError(
                f"wan got a rate of {self.wan_rate_bytes_per_second} bytes per second, needs a positive one. "
                "Write for example 50mbit, or leave it out if there is no limit."
            )
        if not 0 <= self.wan_delay_seconds < math.inf:
            raise ConfigurationError(
                f"wan got a delay of {self.wan_delay_seconds} seconds, needs 0 or more. Write for example 20ms."
            )
        if self.compute_seconds is not None and not 0 <= self.compute_seconds < math.inf:
            raise ConfigurationError(
                f"compute got {self.compute_seconds} seconds, needs 0 or more. Write for example 100ms."
            )
        ranks = [rank for site in self.sites for rank in site]
        if self.sites and (sorted(ranks) != list(range(len(self.hosts))) or not all(self.sites)):
            raise ConfigurationError(
                f"sites got {[list(site) for site in self.sites]}, needs every rank from 0 to {len(self.hosts) - 1} in "
                "exactly one site, and no empty site. List every host once, or leave sites out."
            )
        if not self.sites and (self.wan_rate_bytes_per_second < math.inf or self.wan_delay_seconds > 0):
            raise ConfigurationError(
                "wan got a rate or a delay, but there are no sites; it needs some, because it is the link between "
                "them. Write for example sites: [[0, 1], [2, 3]], or leave wan out."
            )

    @classmethod
    def read(cls, path: str | Path) -> ClusterFile:
        """Read a file; `docs/concepts/clusters.md` lists its keys.

        Args:
            path: of the YAML file.

        Raises:
            ConfigurationError: if there is no such file, if it is no valid YAML, or if a key or value is not one of a
                cluster file. The message names the file.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            _refuse_doubled_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
            content = yaml.safe_load(text)
        except OSError as error:
            raise ConfigurationError(
                f"{path}: got no file that can be read ({error.strerror}), needs a cluster file. "
                "Correct the path; it is relative to the current folder."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path}: got no valid YAML, needs it. Correct this: {error}") from error
        with _naming(str(path)):
            return _cluster(path.stem, content)

    def model(self, compute_seconds: float | None = None) -> Cluster:
        """Return the cluster as the simulator and the planner take it.

        A message is payload and a rate limits Ethernet frames, so bandwidths are ``1448 / 1514`` of the rates.

        Args:
            compute_seconds: of one gradient on a host with slowdown 1; in place of the file's.

        Raises:
            ConfigurationError: if neither the argument nor the file says how long a gradient takes, or if only some
                hosts have a rate.
        """
        compute = self.compute_seconds if compute_seconds is None else compute_seconds
        if compute is None:
            raise ConfigurationError(
                f"The cluster {self.name!r} got no compute time, needs one to be simulated. Write compute: 100ms into "
                "its file, or give it on the command line with --compute 100ms."
            )
        rates = [host.rate_bytes_per_second for host in self.hosts]
        if max(rates) == math.inf and min(rates) < math.inf:
            raise ConfigurationError(
                f"The cluster {self.name!r} got a rate for some hosts only, needs one for all or for none to be "
                "simulated. Write rate: 10gbit, or another, for the hosts without a limit."
            )
        delays = [host.delay_seconds for host in self.hosts]
        return Cluster(
            compute_seconds=compute,
            slowdown={rank: host.slowdown for rank, host in enumerate(self.hosts) if host.slowdown != 1.0},
            bandwidth_bytes_per_second=max(rates) * PAYLOAD_SHARE,
            slow_links={rank: max(rates) / rate for rank, rate in enumerate(rates) if rate < max(rates)},
            latency_seconds=min(delays),
            latencies={rank: delay for rank, delay in enumerate(delays) if delay > min(delays)},
            sites=self.sites,
            site_bandwidth_bytes_per_second=self.wan_rate_bytes_per_second * PAYLOAD_SHARE,
            site_latency_seconds=self.wan_delay_seconds,
        )


def parse_host(option: str, text: str, default: Host) -> tuple[int, Host]:
    """Rank and host of a text such as ``7:rate=20mbit,delay=5ms,cpu=25%,slowdown=4``.

    Args:
        option: what the text was given for, for the error: ``--host``.
        text: a rank, a colon, and some of ``rate``, ``delay``, ``cpu``, ``slowdown``, each at most once.
        default: what the host is where the text does not say.

    Raises:
        ConfigurationError: if it is anything else.

    Example:
        >>> parse_host("--host", "7:delay=5ms,cpu=25%", Host(rate_bytes_per_second=25e6))
        (7, Host(rate_bytes_per_second=25000000.0, delay_seconds=0.005, cpu=0.25, slowdown=1.0))
    """
    rank, _, settings = text.partition(":")
    pairs = [setting.partition("=") for setting in settings.split(",")]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    if not (
        re.fullmatch(r"[0-9]{1,9}", rank.strip())
        and all(equals for _, equals, _ in pairs)
        and len(values) == len(pairs)
    ):
        raise ConfigurationError(
            f"{option} got {text!r}, needs RANK:KEY=VALUE,... with every key at most once. "
            f"Write for example {option} 7:rate=20mbit,delay=5ms,cpu=25%,slowdown=4."
        )
    with _naming(f"{option} {text}"):
        return int(rank), _host(values, default)


def _cluster(name: str, content: Any) -> ClusterFile:
    values = _mapping("a cluster file", content, "hosts: 8")
    _check_keys("a cluster file", values, _TOP_KEYS)
    if "hosts" not in values:
        raise ConfigurationError("got no hosts, needs their number. Write for example hosts: 8.")
    if not isinstance(values.get("description", ""), str):
        raise ConfigurationError(f"description: got {values['description']!r}, needs text. Put it into quotes.")
    count = values["hosts"]
    if not _is_whole(count) or not 1 <= count <= MOST_WORKERS:
        raise ConfigurationError(
            f"hosts: got {count!r}, needs a whole number of at least 1 and at most {MOST_WORKERS}. Write for example "
            "hosts: 8."
        )
    default = _host({key: values[key] for key in _HOST_KEYS if key in values}, Host())
    hosts = [default] * count
    for rank, exception in _mapping("host", values.get("host", {}), "host: {7: {rate: 20mbit}}").items():
        if not _is_whole(rank) or not 0 <= rank < count:
            raise ConfigurationError(
                f"host: got the rank {rank!r}, needs ranks from 0 to {count - 1}. Correct it, or the number of hosts."
            )
        with _naming(f"host {rank}"):
            hosts[rank] = _host(_mapping("a host", exception, "7: {rate: 20mbit}"), default)
    wan = _mapping("wan", values.get("wan", {}), "wan: {rate: 50mbit, delay: 20ms}")
    with _naming("wan"):
        _check_keys("wan", wan, _WAN_KEYS)
        wan_rate = _parsed(wan, "rate", parse_bandwidth, math.inf)
        wan_delay = _parsed(wan, "delay", parse_seconds, 0.0)
    return ClusterFile(
        name=name,
        hosts=tuple(hosts),
        sites=_sites(values.get("sites", [])),
        wan_rate_bytes_per_second=wan_rate,
        wan_delay_seconds=wan_delay,
        compute_seconds=_parsed(values, "compute", parse_seconds, None),
    )


def _host(values: Mapping[str, Any], default: Host) -> Host:
    _check_keys("a host", values, _HOST_KEYS)
    return dataclasses.replace(
        default,
        rate_bytes_per_second=_parsed(values, "rate", parse_bandwidth, default.rate_bytes_per_second),
        delay_seconds=_parsed(values, "delay", parse_seconds, default.delay_seconds),
        cpu=_parsed(values, "cpu", _parse_cores, default.cpu),
        slowdown=_parsed(values, "slowdown", _parse_factor, default.slowdown),
    )


def _sites(content: Any) -> tuple[tuple[int, ...], ...]:
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, list) and all(_is_whole(rank) for rank in row) for row in rows):
        raise ConfigurationError(
            f"sites: got {content!r}, needs a list of lists of ranks. Write for example sites: [[0, 1], [2, 3]]."
        )
    return tuple(tuple(row) for row in rows)


def _parsed(
    values: Mapping[str, Any], key: str, parse: Callable[[str, str], float], default: _Default
) -> float | _Default:
    """Return the value of a key, or the default. YAML may have made a number of it, so it is turned back into text."""
    return parse(f"{key}:", str(values[key])) if key in values else default


def _parse_cores(option: str, text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigurationError(
            f"{option} got {text!r}, needs a share of one core, or a number of cores. Write for example {option} 25% "
            "or 0.25 for a quarter of one core."
        ) from None


def _parse_factor(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{option} got {text!r}, needs a number. Write for example {option} 4.") from None


def _mapping(what: str, content: Any, example: str) -> Mapping[Any, Any]:
    """Return the content if it is a mapping."""
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"got {content!r} as {what}, needs keys with values. Write for example {example}.")
    return content


def _check_keys(what: str, values: Mapping[Any, Any], keys: Collection[str]) -> None:
    for key in values:
        if key not in keys:
            closest = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)
            raise ConfigurationError(
                f"got the key {key!r}, but {what} has only {', '.join(keys)}. "
                f"Correct it (the closest is {closest[0]!r}), or leave it out."
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_doubled_keys(path: Path, node: Any, depth: int = 3) -> None:
    """Refuse what YAML's loader would silently take: the last of two equal keys; `depth` is that of a host's keys."""
    if depth == 0 or not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise ConfigurationError(
                f"{path}: got the key {key.value!r} twice (line {key.start_mark.line + 1}), needs every key once. "
                "Remove one of the two."
            )
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        _refuse_doubled_keys(path, value, depth - 1)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put in front of an error where it was found."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
