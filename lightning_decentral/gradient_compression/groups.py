"""What a bucket of gradients is cut into: groups, pieces of these, and the workers' parts of pieces.

======== ==============================================================================================================
bucket   the gradients that DDP hands over together
group    those parameters of a bucket that are compressed as one vector
piece    neighbouring elements of a group that travel together in two phases
part     what one worker owns of a piece: it averages that
unit     elements that a compressor does not separate: pieces and parts end between two
======== ==============================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from lightning_decentral.compression import AbstractCompressor, ErrorFeedback
from lightning_decentral.gradient_compression.scheme import Scheme, Way

_SMALLEST_PIECE = 1 << 21  # bytes of its messages: 84 ms at 200 Mbit/s
_MOST_PIECES = 3
ALIGNED = 8  # parts of a message begin at multiples of so many bytes: they are seen as tensors of any dtype


@dataclass(slots=True)
class Piece:
    """Neighbouring elements of a group that travel together in two phases.

    Attributes:
        borders: of the workers' parts of it, in the group's vector.
        owned: where this worker's part is in the memory of what it owns of the group.
    """

    borders: list[int]
    owned: slice

    @property
    def whole(self) -> slice:
        """The elements of the group's vector that it has."""
        return slice(self.borders[0], self.borders[-1])

    def part(self, owner: int) -> slice:
        """Find the elements of the group's vector that a worker owns."""
        return slice(self.borders[owner], self.borders[owner + 1])

    @property
    def elements(self) -> list[int]:
        """The number of elements of each worker's part."""
        return [stop - start for start, stop in pairwise(self.borders)]


@dataclass(slots=True, eq=False)
class Group:
    """The parameters of one bucket that are compressed as one vector.

    Attributes:
        scheme: how it is exchanged; ``None``: by an all-reduce of the gradients as they are.
        names: of the parameters.
        numbers: of the parameters in the model: random numbers depend on them.
        places: of the parameters in the bucket.
        sizes: their elements.
        way: in which messages become their mean.
        pieces: in two phases.
        memory: of what this worker's messages left out, with error feedback.
        owner: of what the second compression left out of this worker's parts of the mean, with error feedback.
    """

    scheme: Scheme | None
    names: list[str]
    numbers: list[int]
    places: list[int]
    sizes: list[int]
    way: Way = "all_reduce"
    pieces: list[Piece] = field(default_factory=list)
    memory: ErrorFeedback | None = None
    owner: ErrorFeedback | None = None

    @property
    def memories(self) -> list[ErrorFeedback]:
        """The memories that there are."""
        return [memory for memory in (self.memory, self.owner) if memory is not None]

    @property
    def neighbours(self) -> bool:
        """Whether nothing else of the bucket lies between these parameters."""
        return self.places[-1] - self.places[0] == len(self.places) - 1

    @property
    def elements(self) -> int:
        """The length of the vector."""
        return sum(self.sizes)

    @property
    def borders(self) -> list[tuple[int, int]]:
        """The first element of each parameter, and the one after its last."""
        return list(pairwise(accumulate(self.sizes, initial=0)))

    def cut(self, scheme: Scheme, workers: int, rank: int, dtype: torch.dtype) -> None:
        """Exchange it in two phases, by this scheme."""
        self.scheme, self.way = scheme, "two_phase"
        owned = 0
        for borders in pieces_of(scheme.compressor, self.elements, workers, dtype):
            own = borders[rank + 1] - borders[rank]
            self.pieces.append(Piece(borders, slice(owned, owned + own)))
            owned += own

    def remember(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the memories that error feedback needs, with nothing in them."""
        assert self.scheme is not None
        compressor, wide = self.scheme.compressor, ErrorFeedback.dtype_of(dtype)
        self.memory = ErrorFeedback(compressor, torch.zeros(self.elements, dtype=wide, device=device))
        if self.way == "two_phase":
            owned = torch.zeros(self.pieces[-1].owned.stop, dtype=wide, device=device)
            self.owner = ErrorFeedback(compressor, owned)


def pieces_of(compressor: AbstractCompressor, elements: int, workers: int, dtype: torch.dtype) -> list[list[int]]:
    """Cut a vector for two phases: the borders of the workers' parts (`cuts`) of each piece; at least one piece.

    Pieces overlap: while one is on its way others are compressed and averaged. They are as even as possible, and their
    messages have at least `_SMALLEST_PIECE` bytes together, because each piece costs the handling of two messages to
    every other worker, which saves nothing where all is sent in no time. There are at most `_MOST_PIECES`.
    """
    unit, size = compressor.traits.unit, compressor.num_bits(elements, dtype) // 8
    ends = cuts(elements, max(1, min(_MOST_PIECES, size // _SMALLEST_PIECE)), unit)
    return [[start + border for border in cuts(stop - start, workers, unit)] for start, stop in pairwise(ends)]


def cuts(elements: int, workers: int, unit: int) -> list[int]:
    """Find the borders of the workers' parts of a vector: ``workers + 1`` positions between units, evenly spread."""
    units = -(-elements // unit)
    return [min(elements, unit * (units * worker // workers)) for worker in range(workers + 1)]


def aligned(num_bytes: int) -> int:
    """Round up, so that what follows in a message can be seen as a tensor of any dtype."""
    return -(-num_bytes // ALIGNED) * ALIGNED
