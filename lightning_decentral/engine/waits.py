"""For whom a worker waits, by what it has asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_decentral.protocol import (
    AbstractRequest,
    AllReduce,
    Call,
    NeighborAverage,
    NeighborExchange,
    Receive,
    Send,
    Until,
)

PEERS: dict[type, Callable[[Any], tuple[int, ...] | None]] = {
    NeighborExchange: lambda request: tuple(request.receive_from),
    NeighborAverage: lambda request: tuple(request.weights),
    AllReduce: lambda request: request.among,
    Call: lambda request: (request.peer,),
    Until: lambda request: (),
    Send: lambda request: (request.to,),
    Receive: lambda request: (request.source,),
}
"""Of each word that a worker waits for by itself."""


def awaited(request: AbstractRequest[Any]) -> tuple[int, ...] | None:
    """Tell who has to answer a request: their ranks; nobody that is known; or none, which is all others."""
    return PEERS[type(request)](request)


class Awaited:
    """For whom something that was started waits now. A thing of its own: who runs it must not keep the ticket.

    Args:
        peers: see `awaited`.
    """

    __slots__ = ("peers",)

    def __init__(self, peers: tuple[int, ...] | None) -> None:
        self.peers = peers
