"""Calls of a server that carry less: messages of a compressor in both directions, with error feedback."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from lightning_decentral.algorithms.base import as_written
from lightning_decentral.averaging.messages import (
    Message,
    add_decoded_,
    compressed,
    require_compressor,
    require_contraction,
    require_fixed_size,
    same_types,
)
from lightning_decentral.compression import AbstractCompressor
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.worker import Worker

Place = Literal["beside", "dedicated"]
SERVER = 0
"""The rank that serves; of several servers the first."""


@dataclass(frozen=True, repr=False)
class AbstractCompressedCalls(AbstractAsynchronousAlgorithm):
    """What all methods with a server have in common: where it is, and how its messages are compressed.

    With a compressor there are in ``worker.state``: ``calls``, how many a worker has made, and ``calls of``, how many a
    server has answered, by caller. From such a number both ends draw what they draw alike.

    Args:
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only, and has no data.
        compressor: of what workers send: a contraction with messages of fixed size. ``None``: it is sent as it is.
        model_compressor: of what the server answers; the same. ``None``: it is sent as it is.
    """

    server: Place = field(default="beside", kw_only=True)
    compressor: AbstractCompressor | None = field(default=None, kw_only=True, repr=False)
    model_compressor: AbstractCompressor | None = field(default=None, kw_only=True, repr=False)

    def __repr__(self) -> str:
        """Write it as a program does; compressors only where there are some."""
        return as_written(self)

    @property
    def compressors(self) -> list[AbstractCompressor]:
        """The compressors that there are."""
        return [each for each in (self.compressor, self.model_compressor) if each is not None]

    def check_calls(self) -> None:
        """Refuse what is no place of a server, and compressors that it could not use."""
        require_place(type(self).__name__, self.server)
        for compressor in self.compressors:
            require_compressor(type(self).__name__, compressor)
            require_fixed_size(type(self).__name__, compressor)

    def callers(self, worker: Worker) -> list[int]:
        """Return who may call a worker."""
        return [rank for rank in range(worker.world_size) if worker.rank in self.peers(rank)]

    def init_calls(self, worker: Worker, compressed: Iterable[AbstractVector]) -> None:
        """Count calls from here on; refuse compressors that lose too much.

        Args:
            worker: that calls others, or is called.
            compressed: vectors of the sizes that are.
        """
        for vector in compressed:
            for compressor in self.compressors:
                require_contraction(type(self).__name__, compressor, vector)
        if self.compressors and self.peers(worker.rank):
            worker.state["calls"] = 0
        if self.compressors and (callers := self.callers(worker)):
            worker.state["calls of"] = dict.fromkeys(callers, 0)

    def next_call(self, worker: Worker) -> int:
        """Return the number of the call that a worker makes now; 0 without a compressor."""
        number: int = worker.state.get("calls", 0)
        if self.compressors:
            worker.state["calls"] = number + 1
        return number

    def next_answer(self, worker: Worker, source: int) -> int:
        """Return the number that the call of ``source`` has, which is answered now; 0 without a compressor."""
        if not self.compressors:
            return 0
        number: int = worker.state["calls of"][source]
        worker.state["calls of"][source] = number + 1
        return number


def message(compressor: AbstractCompressor, value: AbstractVector, worker: Worker, number: int) -> Message:
    """Make a message of the call of a number, from which both ends draw what they draw alike."""
    shared = compressor.traits.randomness == "shared"
    return compressed(compressor, value, worker, seed=number if shared else None)


def with_rest(
    compressor: AbstractCompressor, rest: AbstractVector, value: AbstractVector, worker: Worker, number: int
) -> AbstractVector:
    """Return the message of a value and of what was left out before; ``rest`` becomes what is left out now.

    Args:
        compressor: that makes it.
        rest: of messages before, in float32 at least.
        value: may be overwritten.
        worker: that sends it.
        number: of its call.
    """
    rest.add_(value)
    if same_types(rest, value):
        sent = message(compressor, rest, worker, number).vector
        add_decoded_(rest, compressor, sent, -1.0, number)
        return sent
    made = message(compressor, value.copy_(rest), worker, number)  # half precision
    made.decode_(made.payloads, value)
    rest.add_(value, alpha=-1.0)
    return made.vector


def news(
    compressor: AbstractCompressor, known: AbstractVector, value: AbstractVector, worker: Worker, number: int
) -> AbstractVector:
    """Return the message of what a receiver does not know yet of a value; ``known`` becomes what it knows then.

    Args:
        compressor: that makes it.
        known: the value as the receiver knows it, which adds the message to it as well.
        value: of the types of ``known``; is not changed.
        worker: that sends it.
        number: of the call.
    """
    sent = message(compressor, value.clone().add_(known, alpha=-1.0), worker, number).vector
    add_decoded_(known, compressor, sent, 1.0, number)
    return sent


def require_place(method: str, server: object) -> None:
    """Refuse what is no place of a server.

    Args:
        method: for the message.
        server: where it is.
    """
    if server not in ("beside", "dedicated"):
        raise ConfigurationError(
            f"{method}(server={server!r}): needs 'beside' or 'dedicated'. Leave it out to let worker 0 train and serve."
        )
