"""The store that a run's workers meet on, where it is no worker's."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from lightning_decentral.errors import ConfigurationError


@contextmanager
def serve(host: str, port: int) -> Iterator[int]:
    """Keep a store in this process, under this.

    Args:
        host: the interface to listen on.
        port: 0: a free one.

    Yields:
        The port.

    Raises:
        ConfigurationError: if it cannot listen there.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ConfigurationError(
            f"rendezvous got {host}:{port}, where it cannot listen; it needs an interface of this machine and a free "
            f"port. Choose another port, or end what is there. ({error})"
        ) from error
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host),
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
        master_listen_fd=listening.detach(),
    )
    try:
        yield port
    finally:
        del store
