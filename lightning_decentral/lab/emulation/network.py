"""Hosts on one Linux machine: network namespaces joined by limited links.

Every host is a network namespace with one interface, ``eth0``. A further namespace, the switch, has a bridge for each
site and, if there are several sites, one for the wide area between them::

    host 0  eth0 ---- port0 \
    host 1  eth0 ---- port1  - site 0 ---- wan0 - wide area - wan1 ---- site 1 - port2 ---- eth0  host 2

Token buckets (htb) at each end of a link limit both directions; what a host or a site sends is delayed by netem, or,
where the kernel has none, by a relay in user space. The rest is the kernel's own TCP.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lightning_decentral.errors import ConfigurationError, EmulationError, to_install
from lightning_decentral.lab.emulation import cgroups
from lightning_decentral.simulation.cluster_file import ClusterFile

RUN_FOLDER = Path("/run/lightning-decentral")
INTERFACE = "eth0"
_HOLE = "cut0"  # packets that are routed here vanish
_PREFIX_LENGTH = 16
_BURST_SECONDS = 0.005
_BURST_BYTES = (16 << 10, 128 << 10)  # smallest and largest
_QUEUE_SECONDS = 0.2  # how long a packet waits for its link before it is dropped; TCP fills a shorter queue in bursts
_NETEM_PACKETS = 1_000_000
_IP_VERSION_4 = 0x0800
_RATES = (1e3 / 8, 2.0**32 - 1)  # bytes per second that tbf can be given
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_RESERVE = 6  # files that removing may need when the run has opened as many as it may
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what a user or a scheduler ends a run with
_KILL_SECONDS = 10.0  # a process that has been killed is gone by then, however much memory it gives back
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_OFFLOAD_CHECKSUM, _OFFLOAD_TCP4, _OFFLOAD_TCP6 = 0x01, 0x02, 0x04


class EmulatedNetwork:
    """Namespaces, links and their limits; a context manager that leaves nothing behind.

    Args:
        cluster: the hosts, their links and sites.
        name: of the run; its namespaces are called ``<name>-host0`` and so on. Two runs need two names.

    Raises:
        ConfigurationError: if the name has other signs than letters and digits, or a rate cannot be emulated.
        EmulationError: on another system than Linux, without root, without pyroute2, when something that is needed is
            missing in the kernel, or if the name is in use or left over from a run that crashed.

    Example:
        >>> with EmulatedNetwork(ClusterFile.read("clusters/two_sites.yaml")) as network:  # doctest: +SKIP
        ...     print(network.address(0))
        10.77.0.1
    """

    def __init__(self, cluster: ClusterFile, name: str = "emulated") -> None:
        check_machine()
        if not name.isalnum() or len(name) > 40:
            raise ConfigurationError(
                f"An emulated network got the name {name!r}, needs up to 40 letters and digits. Choose another --name."
            )
        for rate in (*(host.rate_bytes_per_second for host in cluster.hosts), cluster.wan_rate_bytes_per_second):
            if rate != float("inf") and not _RATES[0] <= rate <= _RATES[1]:
                raise ConfigurationError(
                    f"An emulated link got the rate {rate * 8e-9:.3g} Gbit/s, needs one from 1kbit to 34gbit, which "
                    "is what Linux's token bucket takes here. Correct it, or leave it out if there is no limit."
                )
        self.cluster = cluster
        self.name = name
        self.delay_by = "no delays"  # or "delays by netem", or "delays by a relay in user space"
        self._relay: subprocess.Popen[bytes] | None = None
        self._wires: list[tuple[int, int, float]] = []
        self._lock: IO[str] | None = None
        self._reserve: list[int] = []
        self._routes: Any = {}
        self._cuts: Counter[tuple[int, int]] = Counter()  # how many partitions part these two

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """The number of hosts."""
        return len(self.cluster.hosts)

    @property
    def folder(self) -> Path:
        """Where the run keeps its files while it lasts."""
        return RUN_FOLDER / self.name

    def address(self, host: int) -> str:
        """Return the IPv4 address of a host."""
        return f"10.77.{host // 250}.{host % 250 + 1}"

    def namespace(self, host: int) -> str:
        """Return the network namespace of a host, as ``ip netns`` lists it."""
        return f"{self.name}-host{host}"

    @property
    def switch(self) -> str:
        """The namespace that joins the hosts."""
        return f"{self.name}-switch"

    # -- making and removing ------------------------------------------------------------------------------------------

    def __enter__(self) -> EmulatedNetwork:
        self.create()
        self.limit()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def create(self) -> None:
        """Make hosts, switch and links; with no limits and delays yet (`limit`)."""
        try:
            with _explained():
                self._claim()
        except BaseException:
            self._give_reserve()
            raise
        try:
            with _explained():
                for namespace in (*map(self.namespace, range(self.workers)), self.switch):
                    with undisturbed():
                        self._make_namespace(namespace)
                self._build()
            hosts = "".join(
                f"{self.address(host)} host{host}\n::ffff:{self.address(host)} host{host}\n"
                for host in range(self.workers)
            )
            (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
            cgroups.create(self.name, [host.cpu for host in self.cluster.hosts])
        except BaseException:
            self.remove()
            raise

    def limit(self) -> None:
        """Limit the rates of all links, and delay what they carry."""
        if self._wires:
            with undisturbed():
                self._stop_relay()
                self._start_relay([delay for _, _, delay in self._wires])
        with _explained():
            for rank, host in enumerate(self.cluster.hosts):
                rate = host.rate_bytes_per_second
                with undisturbed():
                    self._limit(self.namespace(rank), INTERFACE, rate, host.delay_seconds)
                    self._limit(self.switch, f"port{rank}", rate, 0.0)
            if self.cluster.sites:
                rate = self.cluster.wan_rate_bytes_per_second
                for site in range(len(self.cluster.sites)):
                    with undisturbed():
                        self._limit(self.switch, f"wan{site}", rate, self.cluster.wan_delay_seconds)
                        self._limit(self.switch, f"far{site}", rate, 0.0)

    def remove(self) -> None:
        """Kill what still runs in the hosts, and remove them. Ctrl-C waits until that is done."""
        if self._lock is None:  # nothing was made; what has this name belongs to another run
            return
        with undisturbed():
            self._give_reserve()
            for route in self._routes.values():
                route.close()
            self._routes.clear()
            self._stop_relay()
            for first, second, _ in self._wires:
                os.close(first)
                os.close(second)
            self._wires.clear()
            self._cuts.clear()
            remove(self.name)
            self._lock.close()
            self._lock = None

    # -- while it runs ------------------------------------------------------------------------------------------------

    def cut(self, groups: Sequence[Sequence[int]]) -> None:
        """Partition: hosts of different groups lose every packet that they send to each other, silently."""
        pairs = _parted(groups)
        self._route_pairs("replace", [pair for pair in pairs if not self._cuts[pair]])
        self._cuts.update(pairs)

    def heal(self, groups: Sequence[Sequence[int]] | None = None) -> None:
        """End a partition into these groups; other partitions last on. ``None``: end all."""
        pairs = list(self._cuts) if groups is None else _parted(groups)
        left = Counter() if groups is None else self._cuts - Counter(pairs)
        self._route_pairs("del", [pair for pair in pairs if self._cuts[pair] and not left[pair]])
        self._cuts = left

    def _route_pairs(self, action: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Send what is on its way from a host to a peer into the hole, or no longer."""
        for host, peer in pairs:
            with undisturbed():
                route = self._route(self.namespace(host))
                hole = route.link_lookup(ifname=_HOLE)[0]
                route.route(action, dst=f"{self.address(peer)}/32", oif=hole)

    def bytes_sent(self, host: int) -> int:
        """Return bytes that a host's interface has sent since it was made.

        With headers, as the kernel counts them: one of 66 bytes for each segment that TCP gives to the interface, which
        has up to 64 KB; the limits count one for every 1448 bytes.
        """
        with undisturbed():
            link = self._route(self.namespace(host)).get_links(ifname=INTERFACE)[0]
        return int(link.get_attr("IFLA_STATS64")["tx_bytes"])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Take the name; the lock on its file tells others whether this process is alive."""
        for _ in range(_RESERVE):
            self._reserve.append(os.open(os.devnull, os.O_RDONLY))
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the lock, and looking at what there is
            os.close(self._reserve.pop())
        lock = open(self.folder / "lock", "a+")  # noqa: SIM115  it stays open until the network is removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise EmulationError(
                f"The name {self.name!r} is in use by process {lock.read() or '?'}. Choose another one with --name."
            ) from None
        if _namespaces(self.name) or cgroups.exist(self.name):
            lock.close()
            raise EmulationError(
                f"There are namespaces or control groups of a run called {self.name!r} that did not end properly. "
                "Remove them with: lightning-decentral emulate --clean"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def _give_reserve(self) -> None:
        while self._reserve:
            os.close(self._reserve.pop())

    def _route(self, namespace: str) -> Any:
        from pyroute2 import IPRoute

        if namespace not in self._routes:
            with inside(namespace):  # IPRoute(netns=...) would fork this process, with its handlers of signals
                self._routes[namespace] = IPRoute()
        return self._routes[namespace]

    def _make_namespace(self, namespace: str) -> None:
        _create(namespace)
        with inside(namespace):
            version_6 = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
            if version_6.exists():  # not in every kernel
                version_6.write_text("1")
        self._route(namespace).link("set", index=1, state="up")  # lo

    def _build(self) -> None:
        sites = self.cluster.sites or (tuple(range(self.workers)),)
        with undisturbed():
            netem = any(self._delays()) and self._has_netem()
            if any(self._delays()):
                self.delay_by = "delays by netem" if netem else "delays by a relay in user space"
            self._build_switch(len(sites), netem)
        for site, ranks in enumerate(sites):
            for rank in ranks:
                with undisturbed():
                    self._build_host(rank, site, netem)
        if self._wires:
            with undisturbed():
                self._start_relay([0.0] * len(self._wires))

    def _build_switch(self, sites: int, netem: bool) -> None:
        switch = self._route(self.switch)
        for site in range(sites):
            _bridge(switch, f"site{site}")
        if self.cluster.sites:
            _bridge(switch, "wan")
            for site in range(sites):
                delay = 0.0 if netem else self.cluster.wan_delay_seconds
                self._wire(self.switch, f"wan{site}", self.switch, f"far{site}", delay)
                _plug(switch, f"wan{site}", f"site{site}")
                _plug(switch, f"far{site}", "wan")

    def _build_host(self, rank: int, site: int, netem: bool) -> None:
        delay = 0.0 if netem else self.cluster.hosts[rank].delay_seconds
        self._wire(self.namespace(rank), INTERFACE, self.switch, f"port{rank}", delay)
        _plug(self._route(self.switch), f"port{rank}", f"site{site}")
        host = self._route(self.namespace(rank))
        index = host.link_lookup(ifname=INTERFACE)[0]
        host.addr("add", index=index, address=self.address(rank), prefixlen=_PREFIX_LENGTH)
        host.link("set", index=index, state="up")
        _hole(host)

    def _delays(self) -> Iterator[float]:
        yield from (host.delay_seconds for host in self.cluster.hosts)
        yield self.cluster.wan_delay_seconds

    def _wire(self, first_namespace: str, first: str, second_namespace: str, second: str, delay: float) -> None:
        if not delay:
            route = self._route(first_namespace)
            route.link("add", ifname=first, kind="veth", peer={"ifname": second, "net_ns_fd": second_namespace})
            return
        self._wires.append((_tap(first_namespace, first), _tap(second_namespace, second), delay))

    def _start_relay(self, delays: Sequence[float]) -> None:
        descriptors = [descriptor for wire in self._wires for descriptor in wire[:2]]
        wires = [f"{wire[0]},{wire[1]},{delay}" for wire, delay in zip(self._wires, delays, strict=True)]
        relay = Path(__file__).with_name("relay.py")
        self._relay = subprocess.Popen(
            [sys.executable, "-S", "-E", str(relay), *wires],
            stdin=subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C must not end it before the hosts
        )

    def _stop_relay(self) -> None:
        if self._relay is not None:
            assert self._relay.stdin is not None
            self._relay.stdin.close()  # which tells it to end
            self._relay.wait()
            self._relay = None

    def _limit(self, namespace: str, interface: str, rate: float, delay: float) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        route = self._route(namespace)
        index = route.link_lookup(ifname=interface)[0]
        parent = {}
        if delay and self.delay_by == "delays by netem":  # first: inside of tbf its queue would take the place of tbf's
            route.tc("add", "netem", index=index, handle="1:", delay=int(delay * 1e6), limit=_NETEM_PACKETS)
            parent = {"parent": "1:1"}
        if rate != float("inf"):
            burst = int(min(max(rate * _BURST_SECONDS, _BURST_BYTES[0]), _BURST_BYTES[1]))
            limit = int(rate * _QUEUE_SECONDS) + burst
            try:
                _short_packets_first(route, index, int(rate), burst, limit, parent)
            except NetlinkError:  # a kernel without htb or u32
                with suppress(NetlinkError):
                    route.tc("del", "htb", index=index, handle="2:", **parent)
                route.tc("add", "tbf", index=index, handle="2:", rate=int(rate), burst=burst, limit=limit, **parent)

    def _has_netem(self) -> bool:
        from pyroute2.netlink.exceptions import NetlinkError

        switch = self._route(self.switch)
        switch.link("add", ifname="probe", kind="bridge")
        index = switch.link_lookup(ifname="probe")[0]
        try:
            switch.tc("add", "netem", index=index, handle="1:", delay=1000)
        except NetlinkError:
            return False
        finally:
            switch.link("del", index=index)
        return True


def _short_packets_first(route: Any, index: int, rate: int, burst: int, limit: int, parent: dict[str, str]) -> None:
    """Limit an interface to a rate, at which packets of less than 128 bytes do not wait behind the others.

    So do the fair queues (fq_codel, fq) that Linux hosts have by default. In a single queue the acknowledgements of
    what a host receives wait behind all that it sends, and two hosts that send to each other slow each other down.
    """
    shared = {"burst": burst, "cburst": burst, "quantum": 60_000}
    route.tc("add", "htb", index=index, handle="2:", default=0x20, **parent)
    route.tc("add-class", "htb", index=index, handle="2:1", parent="2:", rate=rate, ceil=rate, **shared)
    short, rest = max(1, rate // 5), max(1, rate - rate // 5)
    route.tc("add-class", "htb", index=index, handle="2:10", parent="2:1", rate=short, ceil=rate, prio=0, **shared)
    route.tc("add-class", "htb", index=index, handle="2:20", parent="2:1", rate=rest, ceil=rate, prio=1, **shared)
    # A queue that is limited in bytes; pyroute2 knows no bfifo, so one that is never slow. It splits segments that are
    # larger than a burst: at a low rate one of 64 KB would pass in a fraction of the time that it takes.
    at_once = {"rate": int(_RATES[1]), "burst": burst}
    route.tc("add", "tbf", index=index, handle="20:", parent="2:20", limit=limit, **at_once)
    short_ip = "0x0000/0xff80+2"  # the upper bits of IP's total length
    route.tc(
        "add-filter", "u32", index=index, parent="2:", prio=1, protocol=_IP_VERSION_4, target="2:10", keys=[short_ip]
    )


def check_machine() -> None:
    """Refuse machines on which hosts cannot be emulated.

    Raises:
        EmulationError: says what is missing and what to do.
    """
    if sys.platform != "linux":
        raise EmulationError(
            f"Emulated hosts need Linux (network namespaces), this is {sys.platform}. Use a Linux machine or a virtual "
            "one; without either, `SimulatedStrategy(cluster=...)` simulates the same cluster files."
        )
    if os.geteuid() != 0:
        raise EmulationError(
            "Emulated hosts need root (to make network namespaces and limit links), got user "
            f"{os.geteuid()}. Run the command with sudo, or in a container started with --privileged."
        )
    try:
        import pyroute2  # noqa: F401
    except ImportError:
        raise EmulationError(
            f"Emulated hosts need pyroute2, which is not installed. Install it: {to_install('emulation')}."
        ) from None


def leftovers() -> list[str]:
    """Names of runs that have ended without cleaning up behind them."""
    return list(_ended())


def remove_leftovers() -> list[str]:
    """Remove what such runs left; returns their names."""
    names = []
    for name in _ended():
        remove(name)
        names.append(name)
    return names


def _ended() -> Iterator[str]:
    """Names of runs that have ended and left something; no other run can take a name while it is looked at."""
    for folder in sorted(RUN_FOLDER.iterdir()) if RUN_FOLDER.exists() else []:
        if not _namespaces(folder.name) and not cgroups.exist(folder.name):
            continue  # it may be starting right now: do not touch its lock
        with open(folder / "lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # alive
            yield folder.name


def remove(name: str) -> None:
    """Kill the processes of a run's hosts; remove its namespaces, control groups and files."""
    from pyroute2 import netns

    for namespace in _namespaces(name):
        kill_all(namespace)
    for namespace in _namespaces(name):
        netns.remove(namespace)
    cgroups.remove(name)
    shutil.rmtree(RUN_FOLDER / name, ignore_errors=True)


def processes(namespace: str) -> list[int]:
    """Process numbers of all that runs in a network namespace."""
    inode = os.stat(f"/run/netns/{namespace}").st_ino
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.stat(f"/proc/{entry}/ns/net").st_ino == inode:
                    found.append(int(entry))
            except OSError:  # it has just ended
                continue
    return found


def signal_all(namespace: str, number: signal.Signals) -> None:
    """Send a signal to all that runs in a network namespace."""
    for process in processes(namespace):
        if process != os.getpid():
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue


def kill_all(namespace: str) -> None:
    """Kill all that runs in a network namespace, also what is being started meanwhile; wait until it is gone."""
    deadline = time.monotonic() + _KILL_SECONDS
    while processes(namespace) and time.monotonic() < deadline:
        signal_all(namespace, signal.SIGKILL)
        time.sleep(0.002)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Let the calling thread use another network namespace."""
    with _coming_home():
        _set_namespace(f"/run/netns/{namespace}")
        yield


@contextmanager
def _coming_home() -> Iterator[None]:
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        yield
    finally:
        _libc_call("setns", home, _NEW_NETWORK)
        os.close(home)


def _create(namespace: str) -> None:
    """Make a network namespace; pyroute2's way would fork this process, with its handlers of signals."""
    from pyroute2 import netns

    with _coming_home():
        _libc_call("unshare", _NEW_NETWORK)
        netns.attach(namespace, "thread-self")


def _set_namespace(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _libc_call("setns", descriptor, _NEW_NETWORK)
    finally:
        os.close(descriptor)


def enter(namespace: str, hostname: str, hosts_file: str, control_group: Path | None) -> None:
    """Make the calling process a process of a host, for good. Runs between fork and exec."""
    if control_group is not None:
        (control_group / "cgroup.procs").write_text(str(os.getpid()))
    _set_namespace(f"/run/netns/{namespace}")
    _libc_call("unshare", 0x04000000 | 0x00020000)  # a host name and mounts of its own (CLONE_NEWUTS, CLONE_NEWNS)
    _libc_call("sethostname", hostname.encode(), len(hostname))
    _libc_call("mount", b"none", b"/", None, 1 << 14 | 1 << 18, None)  # MS_REC, MS_PRIVATE: seen by nobody else
    _libc_call("mount", hosts_file.encode(), b"/etc/hosts", None, 1 << 12, None)  # MS_BIND
    _libc_call("prctl", 1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG: nothing outlives the emulator


def _parted(groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(a, b) for group in groups for other in groups if group is not other for a in group for b in other]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let signals that would end this process wait; they do what they would have done when the block is left.

    Python runs their handlers in the main thread, between two of its instructions. pyroute2 has an event loop: an
    exception out of the middle of that is printed by asyncio, and leaves coroutines that complain. The mask of signals
    would not help, for the system then gives them to another thread, and what is started would inherit it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers do not run here
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in handlers.items():
        if handler not in (signal.SIG_IGN, None):  # None: not Python's, and cannot be put back
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, handler)
        for waited in dict.fromkeys(came):
            signal.raise_signal(waited)


def too_many_files(error: Exception) -> EmulationError | None:
    """Tell what to do if there are more hosts than this process may have files open; ``None`` if it is another
    error."""
    if getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE):
        return None
    return EmulationError(
        f"So many hosts got the error {error}, they need about five open files each. Allow more before the command: "
        "ulimit -n 10000"
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Say what is needed where the kernel, or a container, refuses something."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except (NetlinkError, OSError) as error:
        raise too_many_files(error) or EmulationError(
            f"Emulated hosts cannot be made on this machine: got {error}. They need all rights of root, also in a "
            "container (start it with --privileged), and a kernel with network namespaces, veth, bridge and tbf (load "
            "what is missing: modprobe veth bridge sch_tbf)."
        ) from error


_LIBC = ctypes.CDLL(None, use_errno=True)


def _libc_call(name: str, *arguments: Any) -> None:
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _namespaces(name: str) -> list[str]:
    from pyroute2 import netns

    return [namespace for namespace in netns.listnetns() if namespace.startswith((f"{name}-host", f"{name}-switch"))]


def _bridge(route: Any, name: str) -> None:
    route.link("add", ifname=name, kind="bridge")
    route.link("set", index=route.link_lookup(ifname=name)[0], state="up")


def _plug(route: Any, port: str, bridge: str) -> None:
    index = route.link_lookup(ifname=port)[0]
    route.link("set", index=index, master=route.link_lookup(ifname=bridge)[0], state="up")


def _hole(route: Any) -> None:
    """Make an interface that drops what it is given; which kinds there are depends on the kernel."""
    from pyroute2.netlink.exceptions import NetlinkError

    for kind in ("dummy", "ifb"):
        try:
            route.link("add", ifname=_HOLE, kind=kind)
        except NetlinkError:
            continue
        route.link("set", index=route.link_lookup(ifname=_HOLE)[0], state="up")
        return
    raise EmulationError("This kernel has neither dummy nor ifb devices: load one with `modprobe dummy`.")


def _tap(namespace: str, name: str) -> int:
    """Return a TAP device that hands over large segments; it exists for as long as its file is open."""
    with inside(namespace):
        try:
            descriptor = os.open("/dev/net/tun", os.O_RDWR)
        except OSError as error:
            missing = error.errno in (errno.ENOENT, errno.ENODEV)
            raise EmulationError(
                f"Delays need netem or TUN devices, this kernel has no netem and /dev/net/tun "
                f"{'does not exist' if missing else f'cannot be opened ({error.strerror})'}. Run `modprobe sch_netem`, "
                "or `modprobe tun`."
            ) from error
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _OFFLOAD_CHECKSUM | _OFFLOAD_TCP4 | _OFFLOAD_TCP6)
    return descriptor
