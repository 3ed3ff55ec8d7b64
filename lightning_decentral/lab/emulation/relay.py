"""A wire with delay in user space: for kernels without netem.

Run by path as a process of its own, with the standard library alone, so that it starts at once. Every wire is a pair of
TAP devices; what is read from the first is written to the second after the wire's delay, and what is read from the
second is written to the first at once. With virtio headers the kernel hands over, and takes back, segments of up to
64 KB, so that a few thousand of them per second fill a fast link.

    relay.py FIRST,SECOND,DELAY_SECONDS ...      file descriptors of the TAP devices, inherited
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections import deque

_LARGEST = 65536 + 64
_AT_ONCE = 16  # packets read from one device before the others have their turn
_QUEUED_BYTES = 256 << 20  # on one wire: more can only be a mistake, as the limits of the links come before the wire


def main(arguments: list[str]) -> None:
    """Relay until the parent process closes standard input."""
    targets: dict[int, tuple[int, float]] = {}
    for argument in arguments:
        one, other, seconds = argument.split(",")
        targets[int(one)] = (int(other), float(seconds))
        targets[int(other)] = (int(one), 0.0)
    waiting: dict[int, deque[tuple[float, bytes]]] = {first: deque() for first, (_, delay) in targets.items() if delay}
    held = dict.fromkeys(waiting, 0)
    readable = [*targets, 0]
    for descriptor in targets:
        os.set_blocking(descriptor, False)
    while True:
        due = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        ready, _, _ = select.select(readable, [], [], None if due is None else max(0.0, due - time.monotonic()))
        if 0 in ready:
            return
        now = time.monotonic()
        for first, queue in waiting.items():
            second = targets[first][0]
            while queue and queue[0][0] <= now:
                packet = queue.popleft()[1]
                held[first] -= len(packet)
                _write(second, packet)
        for first in ready:
            second, delay = targets[first]
            for _ in range(_AT_ONCE):
                try:
                    packet = os.read(first, _LARGEST)
                except (BlockingIOError, OSError):  # nothing more, or the device is down
                    break
                if not delay:
                    _write(second, packet)
                elif held[first] < _QUEUED_BYTES:
                    held[first] += len(packet)
                    waiting[first].append((time.monotonic() + delay, packet))


def _write(descriptor: int, packet: bytes) -> None:
    try:
        os.write(descriptor, packet)
    except OSError:  # the device is down or its queue full: the packet is lost, as on a real wire
        return


if __name__ == "__main__":
    main(sys.argv[1:])
