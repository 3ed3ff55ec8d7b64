"""The mean of all workers' compressed vectors: an all-reduce of the messages if they can be added, else a gathering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_decentral.averaging.messages import Message
from lightning_decentral.compression import Payload
from lightning_decentral.flat import AbstractVector, Vector
from lightning_decentral.protocol import AbstractRequest, AllReduce, NeighborExchange
from lightning_decentral.worker import Worker


@dataclass(frozen=True, slots=True, eq=False)
class CompressedMean:
    r"""The mean over all workers of what their messages stand for, the same bits on each of them.

    Messages of a *linear* compressor are added on their way: ``2 (n - 1) / n`` messages sent by each of n workers.
    Others cannot be added before they are decoded; each worker sends its own to all others, ``n - 1`` messages, and all
    decode in the order of the ranks.

    A method awaits `request`, best through `Start`, does what it can meanwhile, and passes the answer to `add_`.

    Args:
        worker: that sends.
        message: its own, with a compressor of fixed size.
    """

    worker: Worker
    message: Message

    def request(self) -> AbstractRequest[Any]:
        """Tell what has to be awaited. The message's payloads stay as they are and may be used meanwhile."""
        message, worker = self.message, self.worker
        if message.compressor.traits.linear:
            tensors = [tensor for payload in message.read(message.vector) for tensor in payload.tensors]
            return AllReduce(Vector(tensors) if tensors else message.vector)
        others = tuple(rank for rank in range(worker.world_size) if rank != worker.rank)
        return NeighborExchange(message.vector, others, others)

    def add_(self, value: AbstractVector, scratch: AbstractVector, answer: Any, alpha: float) -> None:
        """Add ``alpha`` times the mean to ``value``.

        Args:
            value: like the vector that was compressed, or of half precision where that was float32.
            scratch: like the vector that was compressed; is overwritten.
            answer: to `request`.
            alpha: the factor.
        """
        messages = self._messages(answer)
        for payloads in messages:
            self.message.decode_(payloads, scratch)
            value.add_(scratch, alpha=alpha / len(messages))

    def _messages(self, answer: Any) -> list[tuple[Payload, ...]]:
        message, worker = self.message, self.worker
        if message.compressor.traits.linear:
            return [message.read(message.vector)]  # the mean now, in the memory of the request's vector
        return [
            message.payloads if rank == worker.rank else message.read(answer[rank]) for rank in range(worker.world_size)
        ]
