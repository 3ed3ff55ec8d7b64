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
    """What something that was started waits for now. A thing of its own: who runs it must not keep the ticket.

    Attributes:
        word: what it has asked for, as ``Call``; empty before it has.
        peers: see `awaited`.
    """

    __slots__ = ("peers", "word")

    def __init__(self) -> None:
        self.word = ""
        self.peers: tuple[int, ...] | None = ()

    def begin(self, request: AbstractRequest[Any]) -> None:
        """Something is asked for."""
        self.word, self.peers = type(request).__name__, awaited(request)
