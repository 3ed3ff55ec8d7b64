"""What an exchange sends: the ways of aggregation themselves, run on sizes.

Their tensors are of torch's `meta` device, which have a size and no values, so that what is counted here cannot drift
from what is sent in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_decentral.compression import PowerSGD
from lightning_decentral.compression.grid import AbstractGrid
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.gradient_compression.aggregation import AnyWay, exchanged
from lightning_decentral.gradient_compression.groups import Group
from lightning_decentral.gradient_compression.requests import (
    AbstractRequest,
    AllGather,
    AllGatherNumber,
    AllReduce,
    AllToAll,
    Spread,
)
from lightning_decentral.gradient_compression.scheme import Scheme, Way, ways
from lightning_decentral.gradient_compression.step import Exchange, Step
from lightning_decentral.traffic import all_reduce_bytes

NUMBER_BYTES = 8  # of a size that is told to all
_AFTER_WARM_UP = 1 << 30  # an epoch
_META = torch.device("meta")


@dataclass(frozen=True)
class Round:
    """One request of an exchange.

    Attributes:
        pattern: who sends to whom, and so how many latencies follow each other: twice around the ring of workers, once
            around it, or straight to everybody.
        bytes_sent: by a worker, on average over all.
    """

    pattern: Literal["twice_around", "once_around", "to_all"]
    bytes_sent: float


def rounds(
    scheme: Scheme, way: Way, elements: int, workers: int, dtype: torch.dtype = torch.float32
) -> list[list[Round]]:
    """Run an exchange on sizes.

    Args:
        scheme: how the vector is exchanged.
        way: in which messages become their mean.
        elements: of the vector.
        workers: how many.
        dtype: of the vector.

    Returns:
        What follows each other, for each of the coroutines, which run beside each other.
    """
    group = Group(scheme, ["vector"], [0], [0], [elements], way)
    if way == "two_phase":
        group.cut(scheme, workers, 0, dtype)
    if scheme.feedback:
        group.remember(dtype, _META)
    vector = torch.empty(elements, dtype=dtype, device=_META)
    exchange = Exchange(Step(rank=0, workers=workers, epoch=_AFTER_WARM_UP), group, vector, [vector])
    return [_run(coroutine, workers) for coroutine in exchanged([exchange])]


def _run(coroutine: AnyWay, workers: int) -> list[Round]:
    made: list[Round] = []
    answer: Any = None
    while True:
        try:
            request: AbstractRequest[Any] = coroutine.send(answer)
        except StopIteration:
            return made
        answer, one = _answered(request, workers)
        made.append(one)


def _answered(request: AbstractRequest[Any], workers: int) -> tuple[Any, Round]:
    """Answer a request of worker 0 with tensors of the right sizes."""
    others = workers - 1
    match request:
        case AllReduce(tensors):
            return None, Round("twice_around", sum(all_reduce_bytes(tensor.nbytes, workers) for tensor in tensors))
        case AllGather(message):
            return [message] * workers, Round("once_around", others * message.nbytes)
        case AllGatherNumber(number):
            return [number] * workers, Round("once_around", others * NUMBER_BYTES)
        case AllToAll(_, sizes):
            return _bytes(workers, sizes[0]), Round("to_all", others / workers * sum(sizes))
        case Spread(_, sizes):
            return [_bytes(size) for size in sizes], Round("to_all", others / workers * sum(sizes))
    raise ConfigurationError(f"Got {request}, need a request of gradient_compression.requests. Teach `sizes` this one.")


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device=_META)


def bytes_sent(scheme: Scheme, way: Way, elements: int, workers: int, dtype: torch.dtype = torch.float32) -> float:
    """Count the bytes that a worker sends in one exchange of a vector; on average over the workers."""
    return sum(one.bytes_sent for each in rounds(scheme, way, elements, workers, dtype) for one in each)


def chosen(scheme: Scheme, elements: int, workers: int, dtype: torch.dtype = torch.float32) -> Way:
    """Choose the way for a vector of so many elements.

    With ``"auto"`` the one that sends least. Two phases only where compressing the mean once more does no harm that
    matters: with error feedback, or if the compressor is unbiased and its error at most the vector itself
    (`error_bound` at most 1). The error of the workers' messages is divided by their number when they are averaged;
    that of the second time is not.

    Raises:
        ConfigurationError: if the way that was asked for is not possible with so many workers.
    """
    compressor, asked = scheme.compressor, scheme.aggregation
    too_many = isinstance(compressor, AbstractGrid) and not compressor.can_add(workers)
    if asked != "auto":
        if asked == "all_reduce" and too_many:
            raise ConfigurationError(
                f"Got aggregation='all_reduce' with {compressor} and {workers} workers, whose sum does not fit into a "
                "byte; need 2 x levels x workers below 256. Use 'auto'."
            )
        return asked
    if compressor.traits.linear or isinstance(compressor, PowerSGD):
        return "all_reduce"
    mild = scheme.feedback or (compressor.traits.unbiased and compressor.error_bound(elements) <= 1)
    possible = [
        way for way in ways(scheme) if not (way == "two_phase" and not mild) and not (way == "all_reduce" and too_many)
    ]
    if len(possible) == 1:
        return possible[0]
    return min(possible, key=lambda way: bytes_sent(scheme, way, elements, workers, dtype))


def sends_more(scheme: Scheme, elements: int, workers: int) -> float:
    """Compare with an uncompressed all-reduce of float32: how many times its bytes a worker sends with this scheme."""
    sent = bytes_sent(scheme, chosen(scheme, elements, workers), elements, workers)
    return sent / max(1, all_reduce_bytes(4 * elements, workers))
