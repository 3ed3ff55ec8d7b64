"""Whether workers reach each other: each has a socket to which others connect for no other purpose.

It is asked before connections are made for good, for two reasons: who does not reach whom is known of each two, and
gloo may end the process where a connection that it tries to make comes to no end.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BACKLOG = 128
_MOST_THREADS = 64
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of Linux
_UNREACHED = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class Door:
    """A socket to which others connect to see whether they reach this worker. Nothing is read from it.

    Args:
        towards: host and port of somebody whom all reach, for the address of this worker, if the environment names no
            interface (``GLOO_SOCKET_IFNAME``).

    Attributes:
        address: for the others, ``host:port``; empty if none was found.
    """

    def __init__(self, towards: tuple[str, int]) -> None:
        self._listening = socket.create_server(("", 0), backlog=_BACKLOG)
        self._listening.setblocking(False)
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        host = _address_of(interface) if interface else _address_towards(towards)
        self.address = f"{host}:{self._listening.getsockname()[1]}" if host else ""

    def clear(self) -> None:
        """Let go of those that have come: the system keeps so many only."""
        while True:
            try:
                self._listening.accept()[0].close()
            except OSError:  # nobody is left
                return

    def close(self) -> None:
        """Let nobody come any more."""
        self._listening.close()


def unreached(doors: Mapping[int, str], seconds: Mapping[int, float]) -> list[int]:
    """List whom this worker does not reach. Who is reached and refuses is reached, for its network works.

    Args:
        doors: addresses, by who has them.
        seconds: that each has to answer.
    """
    if not doors:
        return []
    with ThreadPoolExecutor(min(len(doors), _MOST_THREADS), "decentral-doors") as threads:
        asked = {other: threads.submit(_is_reached, door, seconds[other]) for other, door in doors.items()}
    return [other for other, future in asked.items() if not future.result()]


def _is_reached(door: str, seconds: float) -> bool:
    host, _, port = door.rpartition(":")
    if not host:
        return True  # as far as is known
    try:
        socket.create_connection((host, int(port)), timeout=seconds).close()
    except TimeoutError:
        return False
    except OSError as error:
        return error.errno not in _UNREACHED
    return True


def _address_of(interface: str) -> str:
    if fcntl is None:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            found = fcntl.ioctl(asked.fileno(), _ADDRESS_OF_INTERFACE, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # another system, or an interface with addresses of IPv6 only
            return ""
    return socket.inet_ntoa(found[20:24])


def _address_towards(towards: tuple[str, int]) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(towards)  # which sends nothing
        except OSError:
            return ""
        host: str = asked.getsockname()[0]
    return host
