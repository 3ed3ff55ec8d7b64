"""Every worker owns a part: it averages all messages of that, and sends everybody the mean, compressed once more.

In each step the pieces of a bucket travel one after the other, so that one is on its way while others are worked on::

    lane 0    compress 1 | compress 2 | compress 3 |
    lane 1               | average 1  | average 2  | average 3 |
    lane 2                            | decode 1   | decode 2  | decode 3

What is worked on stays in the processor's cache, whatever the sizes of the layers. Pieces of several groups travel
together. So what a bucket has of uncompressed parameters is in the same messages: an all-reduce of a few kilobytes
would cost as many latencies in sequence as there are workers, twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from lightning_decentral.compression import AbstractCompressor, ErrorFeedback, Payload
from lightning_decentral.errors import CompressionError
from lightning_decentral.gradient_compression.finite import is_set
from lightning_decentral.gradient_compression.groups import ALIGNED, Piece, aligned
from lightning_decentral.gradient_compression.momentum import mask
from lightning_decentral.gradient_compression.requests import AllToAll, Spread
from lightning_decentral.gradient_compression.step import Exchange

_STATUS = ALIGNED  # bytes at the end of a message; the first says whether the gradient was not finite


async def two_phase(parcel: Parcel) -> None:
    """Average one piece of every group of a bucket.

    All workers see the same status bytes, so they go on together, or none does.
    """
    timed = parcel.step.measuring.timed
    with timed("compress"):
        room, outgoing = parcel.compress()
    incoming = await AllToAll(outgoing, parcel.sizes)
    if is_set(incoming[:, -_STATUS]):
        parcel.refuse()
        return
    with timed("decompress"):
        message = parcel.average(incoming)
    means = await Spread(message, parcel.sizes, room, incoming)
    if any(is_set(mean[-_STATUS]) for mean in means):
        parcel.refuse()
        return
    with timed("decompress"):
        parcel.decode(means)


def parcels(exchanges: Sequence[Exchange]) -> Iterator[Parcel]:
    """Pack a bucket's groups: the first pieces of all travel together, then the second ones."""
    packed = [[_Content.of(exchange, piece) for piece in exchange.group.pieces] for exchange in exchanges]
    for contents in zip_longest(*packed):
        yield Parcel([content for content in contents if content is not None])


@dataclass(slots=True, eq=False)
class _Content:
    """A piece of one group in a parcel."""

    exchange: Exchange
    piece: Piece
    compressor: AbstractCompressor
    generator: torch.Generator | None
    sizes: list[int]  # of the messages of the owners' parts, in bytes

    @classmethod
    def of(cls, exchange: Exchange, piece: Piece) -> _Content:
        compressor, dtype = exchange.compressor, exchange.x.dtype
        sizes = [compressor.num_bits(elements, dtype) // 8 for elements in piece.elements]
        return cls(exchange, piece, compressor, exchange.generator(compressor, piece.borders[0]), sizes)

    def encode(self, places: Sequence[Tensor]) -> bool:
        """Write the messages of all parts, each to its place, and say whether the gradient is finite.

        Afterwards this worker's own part of the vector is what its message stands for; with error feedback the other
        parts have no meaning.
        """
        compressor, rank = self.compressor, self.exchange.step.rank
        try:
            if compressor.traits.divisible:  # at once: of a small part, calling the operations is most of the work
                payloads = compressor.split(self._encoded(self.piece.whole), self.piece.elements)
            else:
                payloads = [self._encoded(self.piece.part(owner)) for owner in range(len(places))]
        except CompressionError:
            self.exchange.blame()
            return False
        for payload, place in zip(payloads, places, strict=True):
            _write(payload, place)
        compressor.decompress(payloads[rank], out=self.exchange.x[self.piece.part(rank)])
        return True

    def _encoded(self, where: slice) -> Payload:
        """Compress some elements of the vector; with error feedback these have no meaning afterwards."""
        exchange, compressor = self.exchange, self.compressor
        step, memory, x = exchange.step, exchange.group.memory, exchange.x[where]
        if memory is None:
            payload = compressor.compress(x, self.generator)
            if step.measuring.everything:
                step.measuring.compare(None, x, compressor.decompress(payload))
            return payload
        values = memory.add(x, exchange.factor_of(where), where)
        payload = compressor.compress(values.to(x.dtype), self.generator)
        if step.measuring.everything or step.velocities:
            memory.remove(compressor.decompress(payload, out=x), where)
            mask(step.velocities, exchange.group, compressor, x, where.start)
            step.measuring.compare(memory, x, x, where)
        else:
            memory.leave(payload, x, where)  # nobody looks at what the message stands for
        return payload

    def average(self, messages: Tensor, place: Tensor) -> bool:
        """Write the message of the mean of this worker's part, and say whether that is finite.

        Args:
            messages: of this part, from all workers [workers, bytes].
            place: where to.
        """
        exchange, compressor, step = self.exchange, self.compressor, self.exchange.step
        here = self.piece.part(step.rank)
        own = exchange.x[here]  # what this worker's message stands for
        total = own.to(ErrorFeedback.dtype_of(own.dtype)).mul_(step.share)
        scratch = torch.empty_like(own)
        for rank, message in enumerate(messages):
            if rank != step.rank:
                payload = compressor.from_buffer(message, own.shape, own.dtype)
                total.add_(compressor.decompress(payload, out=scratch), alpha=step.share)
        total.div_(step.workers * step.share)
        try:
            if exchange.group.owner is None:
                _write(compressor.compress(total.to(own.dtype), self.generator), place)
            else:
                owner, owned = exchange.group.owner, self.piece.owned
                values = owner.add(total, exchange.factor_of(here), owned)
                payload = compressor.compress(values.to(own.dtype), self.generator)
                _write(payload, place)
                owner.leave(payload, scratch, owned)
        except CompressionError:
            return False
        return True

    def decode(self, owner: int, message: Tensor) -> None:
        """Put an owner's mean into its place."""
        part = self.exchange.x[self.piece.part(owner)]
        self.compressor.decompress(self.compressor.from_buffer(message, part.shape, part.dtype), out=part)

    def refuse(self) -> None:
        self.exchange.step.refused = True
        self.exchange.x[self.piece.whole] = torch.nan  # a loss scaler skips, on all workers


class Parcel:
    """Pieces of several groups that travel in the same messages.

    Args:
        contents: at least one.

    Attributes:
        step: the step.
        sizes: of the message of every owner's part, in bytes: its contents follow each other, and a status.
    """

    def __init__(self, contents: Sequence[_Content]) -> None:
        self.step = contents[0].exchange.step
        self._contents = contents
        self._device = contents[0].exchange.x.device
        owners = range(self.step.workers)
        self.sizes = [sum(aligned(each.sizes[owner]) for each in contents) + _STATUS for owner in owners]

    def compress(self) -> tuple[Tensor, Tensor]:
        """Make the messages of all parts.

        Returns:
            A buffer for as many messages as there are workers, each as long as the longest one; and the messages, which
            lie at its beginning, one after the other.
        """
        room = self._empty(self.step.workers * max(self.sizes))
        outgoing = room[: sum(self.sizes)]
        slots = torch.split(outgoing, self.sizes)
        bad, first = False, [0] * self.step.workers
        for each in self._contents:
            places = [slot[start : start + size] for slot, start, size in zip(slots, first, each.sizes, strict=True)]
            bad |= not each.encode(places)
            first = [start + aligned(size) for start, size in zip(first, each.sizes, strict=True)]
        for slot in slots:
            slot[-_STATUS] = bad
        return room, outgoing

    def average(self, incoming: Tensor) -> Tensor:
        """Make the message of the mean of this worker's part, out of everybody's [workers, bytes]."""
        rank = self.step.rank
        message = self._empty(max(self.sizes))
        bad, first = False, 0
        for each in self._contents:
            place = slice(first, first + each.sizes[rank])
            bad |= not each.average(incoming[:, place], message[place])
            first += aligned(each.sizes[rank])
        message[self.sizes[rank] - _STATUS] = bad  # the mean is too large, though no gradient was
        return message

    def decode(self, means: Sequence[Tensor]) -> None:
        """Put every owner's mean into its place."""
        for owner, mean in enumerate(means):
            first = 0
            for each in self._contents:
                each.decode(owner, mean[first : first + each.sizes[owner]])
                first += aligned(each.sizes[owner])

    def refuse(self) -> None:
        """Put NaN in the place of the mean."""
        for each in self._contents:
            each.refuse()

    def _empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


def _write(payload: Payload, place: Tensor) -> None:
    """Put what travels of a message into its place among others."""
    torch.cat([tensor.view(torch.uint8) for tensor in payload.tensors], out=place)
