"""The mean of all workers' vectors in two phases of compressed parts: to the worker that owns a part, and from it."""

from __future__ import annotations

import dataclasses

from lightning_decentral.averaging.messages import add_decoded_, compressed, decoded, elements, message_like
from lightning_decentral.compression import AbstractCompressor
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import Receive, Send
from lightning_decentral.worker import Worker


def goes_in_parts(compressor: AbstractCompressor, value: AbstractVector, workers: int) -> bool:
    """Tell whether a mean in parts sends less than a message of each worker to each other one, and loses no more.

    Args:
        compressor: of fixed size.
        value: that is averaged.
        workers: how many.
    """
    traits = compressor.traits
    return workers > 2 and not traits.linear and not traits.sums_grow and sum(elements(value)) >= workers


class MeanInParts:
    r"""The mean over n workers of a vector in n parts, the same bits on each of them.

    Worker p owns part p. All send it theirs, compressed; it sends their mean to all, compressed once more::

        mean_p <- C((value_p,p + sum_{i != p} C(value_i,p)) / n)

    So each worker sends ``2 (n - 1) / n`` messages of the size of the whole vector's, as an all-reduce does of what is
    not compressed. What the messages leave out is for the next mean: ``value_i,p - C(value_i,p)`` of worker i, and of
    the owner n times what its second message leaves out, since the next mean counts the n-th part of that.

    Args:
        worker: that takes part. Its random numbers are drawn here, so that nothing depends on when the mean is awaited.
        compressor: for which `goes_in_parts`.
        value: its own; is used up here, and becomes the mean.
        left_out: becomes what the messages leave out; like ``value``. ``None``: nobody wants to know.
    """

    def __init__(
        self, worker: Worker, compressor: AbstractCompressor, value: AbstractVector, left_out: AbstractVector | None
    ) -> None:
        self._worker, self._compressor, self._value = worker, compressor, value
        size, rank = worker.world_size, worker.rank
        shared = compressor.traits.randomness == "shared"
        self._seed = worker.step if shared else None
        self._last_seed = worker.step if shared else worker.rng.getrandbits(62)
        self._parts = value.slices(size)
        self._left_out = None if left_out is None else left_out.slices(size)
        self._others = [(rank + distance) % size for distance in range(1, size)]  # not all begin with the same
        self._messages: dict[int, AbstractVector] = {}
        for owner in self._others:
            part = self._parts[owner]
            self._messages[owner] = compressed(compressor, part, worker, seed=self._seed).vector
            if self._left_out is not None:
                left = self._left_out[owner].copy_(part)
                add_decoded_(left, compressor, self._messages[owner], -1.0, self._seed)

    async def mean(self) -> AbstractVector:
        """Average; gives ``value``."""
        worker, compressor, seed = self._worker, self._compressor, self._seed
        share, own = 1.0 / worker.world_size, self._parts[worker.rank]
        like = message_like(compressor, own)
        for owner in self._others:
            await Send(owner, self._messages[owner])
        own.mul_(share)
        for receive in _one_after_the_other([Receive(source, like) for source in sorted(self._others)]):
            add_decoded_(own, compressor, await receive, share, seed)
        message = compressed(compressor, own, worker, seed=self._last_seed).vector
        if self._left_out is not None:
            left = self._left_out[worker.rank].copy_(own)
            add_decoded_(left, compressor, message, -1.0, seed)
            left.mul_(worker.world_size)
        for other in self._others:
            await Send(other, message)
        own.copy_(decoded(own, compressor, message, seed))
        sources = sorted(self._others)
        receives = [Receive(source, message_like(compressor, self._parts[source])) for source in sources]
        for receive in _one_after_the_other(receives):
            part = self._parts[receive.source]
            part.copy_(decoded(part, compressor, await receive, seed))
        return self._value


def _one_after_the_other(receives: list[Receive]) -> list[Receive]:
    """Let the first of them tell the others."""
    first, *others = receives
    return [dataclasses.replace(first, before=tuple(others)), *others]
