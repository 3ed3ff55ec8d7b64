"""Values that workers leave for others to read, who need not meet them for it."""

from __future__ import annotations

from lightning_decentral.transport.connections import AbstractConnections


class Board:
    """What workers have posted in the store on worker 0, by name: of each worker its last value.

    Nobody waits for a reader, nor a reader for a value. Each method may be called from any thread.

    Args:
        links: of this worker.
    """

    def __init__(self, links: AbstractConnections) -> None:
        self._links = links

    def post(self, name: str, value: bytes) -> None:
        """Leave a value in the place of the last one; it is counted as traffic, but for worker 0's.

        Args:
            name: of what it is.
            value: what others read.

        Raises:
            PeerLost: if worker 0, which has the store, is lost.
        """
        links = self._links
        if links.rank:
            links.count(len(value), messages=1)
        with links.failures((0,)):
            links.store.set(f"board/{name}/{links.rank}", value)

    def read(self, name: str, rank: int) -> bytes | None:
        """Return what a worker has posted last; ``None``: nothing yet.

        Args:
            name: of what it is.
            rank: whose.
        """
        key, links = f"board/{name}/{rank}", self._links
        with links.failures((0,)):
            return bytes(links.store.get(key)) if links.store.check([key]) else None
