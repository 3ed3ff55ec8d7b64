"""What a way of aggregation asks of the other workers.

A way awaits these, and whoever runs it answers: `hook` over process groups, `sizes` with the number of bytes alone.
Every worker makes the same requests in the same order.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Self, TypeVar

from torch import Tensor

T = TypeVar("T")


class AbstractRequest(ABC, Generic[T]):
    """Something that all workers do together. `await` gives the answer."""

    __slots__ = ()

    alone: ClassVar[bool] = False
    """Whether the next bucket waits until the answer was used, because it takes much memory."""

    def __await__(self) -> Generator[Self, T, T]:
        return (yield self)


@dataclass(frozen=True, slots=True, eq=False)
class AllReduce(AbstractRequest[None]):
    """Sum tensors over all workers, in place.

    Args:
        tensors: of the same sizes on all workers; they are not read or written until the answer has come.
        largest: take the largest values in the place of the sum.
    """

    tensors: Sequence[Tensor]
    largest: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class AllGather(AbstractRequest[list[Tensor]]):
    """Give everybody's message to all, in the order of the ranks, each in memory of its own.

    Args:
        message: of the same size on all workers.
    """

    alone: ClassVar[bool] = True

    message: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AllGatherNumber(AbstractRequest[list[int]]):
    """Give everybody's number to all, in the order of the ranks.

    Args:
        number: of this worker.
    """

    alone: ClassVar[bool] = True

    number: int


@dataclass(frozen=True, slots=True, eq=False)
class AllToAll(AbstractRequest[Tensor]):
    """Send every worker something else. The answer has a row from every worker [workers, bytes], in order of the ranks.

    Args:
        outgoing: bytes for all workers, one after the other.
        sizes: of what is sent to each; the same on all workers.
    """

    outgoing: Tensor
    sizes: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class Spread(AbstractRequest[list[Tensor]]):
    """Send all workers the same. The answer is what came from every worker, in the order of the ranks.

    It needs two buffers, which are lost, because the system would have to clear new memory first.

    Args:
        message: bytes, in a buffer as long as the longest message of any worker.
        sizes: of everybody's message; the same on all workers.
        room: for as many messages as there are workers, each as long as the longest one; the answer lies there.
        copies: for as many copies of this worker's message.
    """

    message: Tensor
    sizes: Sequence[int]
    room: Tensor
    copies: Tensor
