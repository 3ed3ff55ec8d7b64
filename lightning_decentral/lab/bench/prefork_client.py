"""Runs a worker in a process that has imported everything already; run by path, with the standard library alone.

    prefork_client.py SOCKET ARGUMENT ...

Hands its arguments, environment, output and namespaces to `prefork`, and ends with the status of the worker that was
forked there: a race starts many workers, and importing torch and Lightning takes longer than some races.
"""

from __future__ import annotations

import json
import os
import socket
import sys

NAMESPACES = ("net", "uts", "mnt")


def main(arguments: list[str]) -> int:
    """Have a worker run, and wait until it has ended; 1 if it was killed."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(arguments[0])
        request = json.dumps([arguments[1:], dict(os.environ), os.getcwd()]).encode()
        namespaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [1, 2, *namespaces])
        connection.sendall(request)
        status = connection.recv(1)
    return status[0] if status else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
