"""Ports for workers of this machine."""

from __future__ import annotations

import random
import socket

_PORTS = range(10_000, 32_000)  # below those that Linux gives to whoever asks for any: 32768 to 60999
_RANDOM = random.SystemRandom()  # neither seeded by a test nor copied by a fork


def free_port() -> int:
    """Find a TCP port that is free, and that nobody gets by chance until it is used.

    Of the ports that the system gives out, one that was found free and closed may be another test's a moment later.
    """
    for _ in range(100):
        port = _RANDOM.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"Got 100 ports between {_PORTS[0]} and {_PORTS[-1]} that are in use, need a free one.")
