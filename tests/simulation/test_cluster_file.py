"""Proved here: a cluster file is read as it is written, becomes the cluster that the simulator and the planner take,
and is refused with its name, what it got, what it needs and what to do; every file of the project is read and planned,
and says what its name says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.planning.planner import compare_plans
from lightning_decentral.simulation.cluster_file import PAYLOAD_SHARE, ClusterFile, Host, parse_host

CLUSTERS = Path(__file__).parents[2] / "clusters"
MBIT = 1e6 / 8
EVERYTHING = """\
description: Every key once.
hosts: 8
rate: 200mbit
delay: 1ms
cpu: 50%
compute: 100ms
host:
  6: {slowdown: 1.5}
  7: {rate: 20mbit, delay: 5ms, cpu: 0.25, slowdown: 4}
sites:
  - [0, 1, 2, 3]
  - [4, 5, 6, 7]
wan: {rate: 50mbit, delay: 20ms}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    usual = Host(200 * MBIT, 0.001, 0.5)
    assert ClusterFile.read(written(tmp_path, EVERYTHING)) == ClusterFile(
        name="some",
        hosts=(*[usual] * 6, replace(usual, slowdown=1.5), Host(20 * MBIT, 0.005, 0.25, 4.0)),
        sites=((0, 1, 2, 3), (4, 5, 6, 7)),
        wan_rate_bytes_per_second=50 * MBIT,
        wan_delay_seconds=0.02,
        compute_seconds=0.1,
    )


def test_only_the_number_of_hosts_is_needed(tmp_path: Path) -> None:
    read = ClusterFile.read(str(written(tmp_path, "hosts: 3")))
    assert read == ClusterFile("some", (Host(),) * 3)
    assert read.hosts[0] == Host(math.inf, 0.0, None, 1.0)


def test_the_model_has_the_payload_of_the_rates_and_the_exceptions() -> None:
    hosts = (Host(100 * MBIT, 0.002), Host(200 * MBIT, 0.005, slowdown=4.0), Host(200 * MBIT, 0.002))
    cluster = ClusterFile("c", hosts, compute_seconds=0.1).model()
    cluster.check_ranks(3)
    # 1448 bytes of payload in each frame of 1514: a message takes 4.6 % longer than its bytes by the rate.
    assert cluster.transfer_seconds(1448, 1, 2) == pytest.approx(1514 / (200 * MBIT))
    assert cluster.transfer_seconds(1448, 0, 2) == pytest.approx(1514 / (100 * MBIT))
    assert [cluster.message_latency_seconds(rank, (rank + 1) % 3) for rank in range(3)] == [0.002, 0.005, 0.002]
    assert (cluster.compute_seconds, cluster.slowdown, cluster.sites) == (0.1, {1: 4.0}, ())


def test_the_model_has_the_sites() -> None:
    sites = ((0, 1), (2, 3))
    file = ClusterFile("c", (Host(),) * 4, sites, 50 * MBIT, 0.02, compute_seconds=0.1)
    cluster = file.model()
    assert cluster.transfer_seconds(1448, 0, 1) == 0.0
    assert cluster.transfer_seconds(1448, 1, 2) == pytest.approx(1514 / (50 * MBIT))
    assert cluster.message_latency_seconds(1, 2) == 0.02
    assert cluster.message_latency_seconds(1, 0) == 0.0


def test_compute_is_of_the_argument_then_of_the_file() -> None:
    file = ClusterFile("c", (Host(),), compute_seconds=0.1)
    assert (file.model().compute_seconds, file.model(compute_seconds=0.0).compute_seconds) == (0.1, 0.0)
    with pytest.raises(ConfigurationError, match=r"'c' got no compute time, needs one .* Write compute: 100ms"):
        replace(file, compute_seconds=None).model()
    assert replace(file, compute_seconds=None).model(compute_seconds=0.2).compute_seconds == 0.2


def test_some_links_without_a_limit_cannot_be_modelled() -> None:
    with pytest.raises(ConfigurationError, match=r"a rate for some hosts only, .* Write rate: 10gbit"):
        ClusterFile("c", (Host(), Host(20 * MBIT)), compute_seconds=0.1).model()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7:rate=20mbit,delay=5ms,cpu=25%,slowdown=4", (7, Host(20 * MBIT, 0.005, 0.25, 4.0))),
        ("0:delay=5ms", (0, Host(200 * MBIT, 0.005))),
        ("12: rate = 1gbit , cpu = 1.5", (12, Host(1000 * MBIT, 0.0, 1.5))),
        ("3:cpu=150%", (3, Host(200 * MBIT, 0.0, 1.5))),
        ("3:rate=inf", (3, Host())),
    ],
)
def test_a_host_on_the_command_line(text: str, expected: tuple[int, Host]) -> None:
    assert parse_host("--host", text, Host(200 * MBIT)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", r"--host got '7', needs RANK:KEY=VALUE,.* Write for example --host 7:rate=20mbit"),
        ("7:", "needs RANK:KEY=VALUE"),
        ("7:rate", "needs RANK:KEY=VALUE"),
        ("x:rate=1gbit", "needs RANK:KEY=VALUE"),
        ("-1:rate=1gbit", "needs RANK:KEY=VALUE"),
        ("7:rate=1gbit,rate=2gbit", "every key at most once"),
        (
            "7:latency=5ms",
            "--host 7:latency=5ms: got the key 'latency', but a host has only rate, delay, cpu",
        ),
        ("7:delay=5", "delay: got '5', needs a duration"),
        ("7:rate=0mbit", "rate of 0.0 bytes per second, needs a positive one"),
        ("7:cpu=lots", "cpu: got 'lots', needs a share of one core"),
        ("7:cpu=0", "got 0.0 cores as its cpu, needs a positive number"),
        ("7:slowdown=often", "slowdown: got 'often', needs a number"),
        ("7:slowdown=nan", "got the slowdown nan, needs a positive number"),
    ],
)
def test_a_wrong_host_on_the_command_line_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_host("--host", text, Host())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["got None as a cluster file", "hosts: 8"]),
        ("[1, 2]", ["got [1, 2] as a cluster file", "needs keys with values"]),
        ("rate: 1gbit", ["got no hosts", "needs their number", "hosts: 8"]),
        ("hosts: 0", ["got 0", "at least 1", "Write"]),
        ("hosts: -1", ["got -1", "at least 1"]),
        ("hosts: true", ["got True", "a whole number"]),
        ("hosts: 2.5", ["got 2.5", "a whole number"]),
        ("hosts: many", ["got 'many'", "a whole number"]),
        ("hosts: 2\nhots: {}", ["got the key 'hots'", "Correct it (the closest is 'hosts')"]),
        ("hosts: 2\nlatency: 5ms", ["got the key 'latency'", "only description, hosts, rate, delay"]),
        ("hosts: 2\n3: 4", ["got the key 3", "a cluster file has only"]),
        ("hosts: 2\nslowdown: 4", ["got the key 'slowdown'", "a cluster file has only"]),
        ("hosts: 2\nrate: 200mb", ["rate: got '200mb'", "needs a bandwidth", "Write for example rate: 1gbit"]),
        ("hosts: 2\nrate: 200", ["rate: got '200'", "needs a bandwidth"]),
        ("hosts: 2\nrate: [1gbit]", ["rate: got \"['1gbit']\"", "needs a bandwidth"]),
        ("hosts: 2\nrate: 0mbit", ["a rate of 0.0", "needs a positive one", "200mbit"]),
        ("hosts: 2\ndelay: 5", ["delay: got '5'", "needs a duration", "Write for example delay: 250ms"]),
        ("hosts: 2\ndelay: -5ms", ["delay: got '-5ms'", "needs a duration"]),
        ("hosts: 2\ncompute: fast", ["compute: got 'fast'", "needs a duration"]),
        ("hosts: 2\ncpu: yes", ["cpu: got 'True'", "a share of one core", "25%"]),
        ("hosts: 2\ncpu: 0%", ["0.0 cores", "needs a positive number", "25%"]),
        ("hosts: 2\ndescription: [a]", ["description: got ['a']", "needs text", "quotes"]),
        ("hosts: 2\nhost: [1]", ["got [1] as host", "needs keys with values", "host: {7: {rate: 20mbit}}"]),
        ("hosts: 2\nhost:", ["got None as host", "needs keys with values"]),
        ("hosts: 2\nhost: {2: {rate: 1gbit}}", ["got the rank 2", "from 0 to 1", "Correct it"]),
        ("hosts: 2\nhost: {'1': {rate: 1gbit}}", ["got the rank '1'", "from 0 to 1"]),
        ("hosts: 2\nhost: {true: {rate: 1gbit}}", ["got the rank True", "from 0 to 1"]),
        ("hosts: 2\nhost: {1: 20mbit}", ["host 1: got '20mbit' as a host", "Write for example 7: {rate: 20mbit}"]),
        ("hosts: 2\nhost: {1: {bandwidth: 1gbit}}", ["host 1: got the key 'bandwidth'", "only rate, delay, cpu"]),
        ("hosts: 2\nhost: {1: {rat: 1gbit}}", ["host 1: got the key 'rat'", "the closest is 'rate'"]),
        ("hosts: 2\nhost: {1: {slowdown: 0}}", ["host 1: ", "got the slowdown 0.0", "needs a positive number"]),
        ("hosts: 2\nhost: {1: {slowdown: .nan}}", ["host 1: ", "got the slowdown nan", "needs a positive number"]),
        ("hosts: 2\nsites: 2", ["sites: got 2", "a list of lists of ranks", "[[0, 1], [2, 3]]"]),
        ("hosts: 2\nsites: [0, 1]", ["sites: got [0, 1]", "a list of lists of ranks"]),
        ("hosts: 2\nsites: [[0], [one]]", ["sites: got [[0], ['one']]", "a list of lists of ranks"]),
        ("hosts: 2\nsites: [[0]]", ["sites got [[0]]", "every rank from 0 to 1 in exactly one site", "List every"]),
        ("hosts: 2\nsites: [[0, 1], [1]]", ["sites got [[0, 1], [1]]", "in exactly one site"]),
        ("hosts: 2\nsites: [[0, 1], [2]]", ["sites got [[0, 1], [2]]", "every rank from 0 to 1"]),
        ("hosts: 2\nsites: [[0, 1], []]", ["sites got [[0, 1], []]", "no empty site"]),
        ("hosts: 2\nwan: {rate: 1gbit}", ["there are no sites", "needs some", "leave wan out"]),
        ("hosts: 2\nsites: [[0], [1]]\nwan: 1gbit", ["got '1gbit' as wan", "wan: {rate: 50mbit, delay: 20ms}"]),
        ("hosts: 2\nsites: [[0], [1]]\nwan: {cpu: 1}", ["wan: got the key 'cpu'", "wan has only rate, delay"]),
        ("hosts: 2\nsites: [[0], [1]]\nwan: {rate: 0mbit}", ["wan got a rate of 0.0", "needs a positive one"]),
        ("hosts: 2\nsites: [[0], [1]]\nwan: {delay: x}", ["wan: delay: got 'x'", "needs a duration"]),
        ("hosts: [", ["got no valid YAML", "needs it", "line 1"]),
        ("hosts: 2\nrate: 1gbit\nrate: 2gbit", ["got the key 'rate' twice (line 3)", "every key once", "Remove"]),
        ("hosts: 2\nhost:\n  1: {cpu: 1}\n  1: {cpu: 2}", ["got the key '1' twice (line 4)", "Remove"]),
        ("hosts: 2\nhost: {1: {cpu: 1, cpu: 2}}", ["got the key 'cpu' twice (line 2)"]),
        ("!!python/object:os.system {}", ["got no valid YAML"]),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, parts: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError) as error:
        ClusterFile.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigurationError) as error:
            ClusterFile.read(path)
        assert str(error.value).startswith(f"{path}: got no file that can be read")
        assert "needs a cluster file. Correct the path" in str(error.value)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="got no valid YAML"):
        ClusterFile.read(binary)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hosts": ()}, "no hosts"),
        ({"wan_delay_seconds": -1.0, "sites": ((0, 1),)}, "wan got a delay"),
        ({"wan_delay_seconds": 1.0}, "there are no sites"),
        ({"compute_seconds": -1.0}, "compute got -1"),
        ({"compute_seconds": math.inf}, "compute got inf"),
    ],
)
def test_impossible_clusters_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClusterFile(**({"name": "c", "hosts": (Host(), Host())} | values))
    with pytest.raises(ConfigurationError, match="delay of inf seconds"):
        Host(delay_seconds=math.inf)


# -- the files of the project ------------------------------------------------------------------------------------------

FILES = sorted(CLUSTERS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_the_project_is_read_planned_and_described(path: Path) -> None:
    file = ClusterFile.read(path)
    assert path.read_text(encoding="utf-8").startswith("description: ")
    assert f"`{path.name}`" in (CLUSTERS / "README.md").read_text(encoding="utf-8")
    workers = {"gigabit_4_hosts": 4, "six_hosts": 6}.get(path.stem, 8)
    assert (len(file.hosts), file.compute_seconds) == (workers, 0.1)
    plans = compare_plans(workers, 4_000_000, file.model(), steps=2)
    # A difference of simulated times, so that computing alone may be 0.1 less a rounding error.
    assert all(0.1 - 1e-12 <= plan.seconds_per_step < math.inf for plan in plans)


def test_the_files_of_the_project_are_what_their_names_say() -> None:
    files = {path.stem: ClusterFile.read(path) for path in FILES}
    assert set(files) == {
        "homogeneous", "gigabit", "slow_network", "one_slow_link", "one_slow_host", "one_slow_host_4x", "two_sites",
        "near", "far_apart", "far_apart_thin", "mixed_gpus", "gigabit_4_hosts", "two_slow_hosts", "six_hosts",
    }  # fmt: skip
    usual = Host(200 * MBIT)
    changed = {
        "homogeneous": (usual,) * 8,
        "gigabit": (Host(1000 * MBIT),) * 8,
        "gigabit_4_hosts": (Host(1000 * MBIT),) * 4,
        "slow_network": (Host(20 * MBIT),) * 8,
        "one_slow_link": (*[usual] * 7, Host(20 * MBIT)),
        "one_slow_host": (*[usual] * 7, replace(usual, slowdown=10.0)),
        "one_slow_host_4x": (*[usual] * 7, replace(usual, slowdown=4.0)),
        "two_slow_hosts": (*[usual] * 6, *[replace(usual, slowdown=10.0)] * 2),
        "six_hosts": (usual,) * 6,
        "two_sites": (usual,) * 8,
        "near": (replace(usual, delay_seconds=0.005),) * 8,
        "far_apart": (replace(usual, delay_seconds=0.05),) * 8,
        "far_apart_thin": (Host(20 * MBIT, 0.05),) * 8,
    }
    for name, hosts in changed.items():
        assert files[name].hosts == hosts
    assert files["two_sites"].model().site_bandwidth_bytes_per_second == 50 * MBIT * PAYLOAD_SHARE
    assert files["two_sites"].wan_delay_seconds == 0.02
    assert [host.slowdown for host in files["mixed_gpus"].hosts] == [1, 1, 1, 1, 1.6, 1.6, 2.5, 4]
