"""How the messages of several workers become their mean, and what each way sends: arithmetic, no tensors.

================ ============================================================ =======================================
way              what happens                                                 bytes each of `n` workers sends, for
                                                                              messages of `c` bytes
================ ============================================================ =======================================
``all_reduce``   messages are added on their way: those of linear             `2 (n-1)/n c`; on a grid `c` is that of
                 compressors, or whole numbers on a grid with a shared scale  numbers with head room for the sum
``all_gather``   all workers get all messages and decode them                 `(n-1) c`
``two_phase``    every worker owns a part: it gets all messages of that part, `2 (n-1)/n c`
                 averages them and sends the mean, compressed once more
================ ============================================================ =======================================
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

import torch

from lightning_decentral.compression import AbstractCompressor, Identity, PowerSGD
from lightning_decentral.compression import compressor as by_name
from lightning_decentral.compression.grid import AbstractGrid
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.simulation.cluster import Cluster, all_reduce_bytes

Way = Literal["all_gather", "two_phase", "all_reduce"]
WAYS: tuple[Way, ...] = ("all_gather", "two_phase", "all_reduce")
_TYPICAL = 1 << 20  # elements for which a compressor's constant is looked at
_SMALLEST_PIECE = 1 << 21  # bytes of its messages: 84 ms at 200 Mbit/s
_MOST_PIECES = 3
_ALIGNED = 8  # parts of a message begin at multiples of so many bytes: they are seen as tensors of any dtype


@dataclass(frozen=True)
class Scheme:
    """How a parameter's gradient is exchanged.

    Args:
        compressor: the operator.
        feedback: whether what it leaves out is remembered.
        aggregation: how messages become their mean; ``"auto"`` leaves it to `chosen`.

    Raises:
        ConfigurationError: for a way that this compressor's messages cannot take.
    """

    compressor: AbstractCompressor
    feedback: bool
    aggregation: Literal["auto"] | Way = "auto"

    def __post_init__(self) -> None:
        if self.aggregation not in ("auto", *WAYS):
            raise ConfigurationError(
                f"Got aggregation={self.aggregation!r}, need 'auto' or one of {', '.join(map(repr, WAYS))}. Use 'auto'."
            )
        if self.aggregation != "auto" and self.aggregation not in ways(self):
            raise ConfigurationError(
                f"Got aggregation={self.aggregation!r} with {self.compressor}, need "
                f"{' or '.join(map(repr, ways(self)))}{_why_not(self)}. Use 'auto'."
            )


def helps_feedback(compressor: AbstractCompressor) -> bool:
    """Whether error feedback is on unless somebody says otherwise: for what is biased and a contraction."""
    return not compressor.traits.unbiased and compressor.error_bound(_TYPICAL) <= 1


def scheme_of(name: str) -> Scheme:
    """The scheme of a compressor with its defaults.

    Raises:
        ConfigurationError: if there is none of that name, or it needs options.
    """
    made = by_name(name)
    return Scheme(made, helps_feedback(made))


def ways(scheme: Scheme) -> tuple[Way, ...]:
    """The ways that are possible for a compressor's messages."""
    compressor = scheme.compressor
    if isinstance(compressor, PowerSGD):
        return ("all_reduce",)
    if compressor.traits.linear:
        return ("all_reduce", "all_gather")
    if not compressor.traits.fixed_size:
        return ("all_gather",)
    # A memory would need what a worker's own numbers on a shared grid stand for; grids are unbiased and need none.
    if isinstance(compressor, AbstractGrid) and not scheme.feedback:
        return WAYS
    return ("all_gather", "two_phase")


def _why_not(scheme: Scheme) -> str:
    if scheme.compressor.traits.linear:
        return ": its messages are added on their way, which is never more"
    if scheme.aggregation == "two_phase":
        return ": the size of its messages is not known beforehand"
    if isinstance(scheme.compressor, AbstractGrid):
        return ": error feedback cannot be had with a shared scale"
    return ": its messages cannot be added"


def chosen(scheme: Scheme, elements: int, workers: int, dtype: torch.dtype = torch.float32) -> Way:
    """The way for a vector of so many elements.

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
    mild = scheme.feedback or (compressor.traits.unbiased and compressor.error_bound(elements) <= 1)
    possible = [
        way for way in ways(scheme) if not (way == "two_phase" and not mild) and not (way == "all_reduce" and too_many)
    ]
    if compressor.traits.linear or isinstance(compressor, PowerSGD):
        return "all_reduce"
    return min(possible, key=lambda way: bytes_sent(scheme, way, elements, workers, dtype))


def bytes_sent(scheme: Scheme, way: Way, elements: int, workers: int, dtype: torch.dtype = torch.float32) -> float:
    """Bytes that a worker sends in one exchange of a vector of so many elements; on average over the workers."""
    compressor = scheme.compressor
    if way == "two_phase":
        borders = chain.from_iterable(map(pairwise, pieces_of(compressor, elements, workers, dtype)))
        parts = [aligned(compressor.num_bits(stop - start, dtype) // 8) + _ALIGNED for start, stop in borders]
        return 2 * (workers - 1) * sum(parts) / workers
    if way == "all_gather":
        return (workers - 1) * (compressor.num_bits(elements, dtype) // 8 + 1)
    if isinstance(compressor, AbstractGrid):
        fields = compressor.shared_fields(elements, workers)
        return sum(all_reduce_bytes(field.itemsize * count, workers) for field, count in fields)
    return all_reduce_bytes(compressor.num_bits(elements, dtype) // 8, workers)


def sends_more(scheme: Scheme, elements: int, workers: int) -> float:
    """How many times the bytes of an uncompressed all-reduce of float32 a worker sends with this scheme."""
    sent = bytes_sent(scheme, chosen(scheme, elements, workers), elements, workers)
    return sent / max(1, all_reduce_bytes(4 * elements, workers))


def exchange_seconds(scheme: Scheme, elements: int, workers: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds of one exchange of a float32 vector on a cluster once everybody is there: of sending, and of latencies
    that follow each other.

    An all-to-all is one latency, a ring as many as it has steps.
    """
    way = chosen(scheme, elements, workers)
    sent = bytes_sent(scheme, way, elements, workers)
    if way == "two_phase":
        return cluster.all_to_all_transfer_seconds(sent, workers), 2 * cluster.largest_latency_seconds(workers)
    around = cluster.all_reduce_transfer_seconds(1 << 30, workers) * sent / max(1, all_reduce_bytes(1 << 30, workers))
    latency = cluster.all_reduce_seconds(0, workers)  # twice around
    if way == "all_gather":
        return around, latency / 2
    return around, 2 * latency if isinstance(scheme.compressor, AbstractGrid) else latency


def pieces_of(compressor: AbstractCompressor, elements: int, workers: int, dtype: torch.dtype) -> list[list[int]]:
    """How a vector is cut for two phases: the borders of the workers' parts (`cuts`) of each piece; at least one piece.

    Pieces overlap: while one is on its way others are compressed and averaged. They are as even as possible, and their
    messages have at least `_SMALLEST_PIECE` bytes together, because each piece costs the handling of two messages to
    every other worker, which saves nothing where all is sent in no time. There are at most `_MOST_PIECES`.
    """
    unit, size = compressor.traits.unit, compressor.num_bits(elements, dtype) // 8
    ends = cuts(elements, max(1, min(_MOST_PIECES, size // _SMALLEST_PIECE)), unit)
    return [[start + border for border in cuts(stop - start, workers, unit)] for start, stop in pairwise(ends)]


def cuts(elements: int, workers: int, unit: int) -> list[int]:
    """The borders of the workers' parts of a vector, between units, as even as possible: ``workers + 1`` positions."""
    units = -(-elements // unit)
    return [min(elements, unit * (units * worker // workers)) for worker in range(workers + 1)]


def aligned(num_bytes: int) -> int:
    """Rounded up, so that what follows in a message can be seen as a tensor of any dtype."""
    return -(-num_bytes // _ALIGNED) * _ALIGNED


UNCOMPRESSED = Scheme(Identity(), False)
"""What is sent as it is."""
