"""What a host does while its link is measured; run by path, with the standard library alone.

    probe.py SELF NEXT PORT PINGS PINGING SECONDS WARM_UP GO

Every host answers one neighbour and measures to another. It prints "ready" when it is connected to it, and waits for
the file GO, which has a moment of the monotonic clock, which all hosts of one machine share. From then on it measures
the round trips of single bytes, and from PINGING seconds later, the payload that arrives per second while all of them
send. Prints the round trip's median in seconds, and the bytes per second that this host received.
"""

from __future__ import annotations

import socket
import statistics
import sys
import threading
import time
from pathlib import Path

_CHUNK = 1 << 18


def main(arguments: list[str]) -> None:
    """Measure and print."""
    own, other, port, pings, pinging, seconds_text, warm_up_text, go = arguments
    seconds, warm_up = float(seconds_text), float(warm_up_text)
    listener = socket.create_server((own, int(port)))
    connections: list[socket.socket] = []
    accepting = threading.Thread(target=lambda: connections.append(listener.accept()[0]))
    accepting.start()
    connection = _connect(other, int(port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    accepting.join()
    print("ready", flush=True)
    start = _moment(Path(go))
    begin = start + float(pinging)
    received: list[float] = []
    server = threading.Thread(target=_serve, args=(connections[0], int(pings), begin + warm_up, seconds, received))
    server.start()
    time.sleep(max(0.0, start - time.monotonic()))
    times = []
    for _ in range(int(pings)):
        began = time.monotonic()
        connection.sendall(b"?")
        connection.recv(1)
        times.append(time.monotonic() - began)
    time.sleep(max(0.0, begin - time.monotonic()))
    chunk = bytes(_CHUNK)
    while time.monotonic() < begin + warm_up + seconds + 0.1:
        connection.sendall(chunk)
    connection.shutdown(socket.SHUT_WR)
    server.join()
    print(f"probe {statistics.median(times) if times else 0.0} {received[0]}", flush=True)


def _moment(file: Path) -> float:
    while not file.exists():
        time.sleep(0.005)
    return float(file.read_text())


def _serve(connection: socket.socket, pings: int, begin: float, seconds: float, received: list[float]) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(pings):
        connection.sendall(connection.recv(1))
    count = 0
    buffer = bytearray(_CHUNK)
    while size := connection.recv_into(buffer):  # to the end, so that the sender is not held up
        if begin < time.monotonic() < begin + seconds:
            count += size
    received.append(count / seconds)


def _connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((address, port), timeout=20)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1:])
