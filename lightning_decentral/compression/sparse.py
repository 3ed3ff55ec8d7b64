"""Messages of values and their positions, and how the largest values are found."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_decentral.compression.base import Field
from lightning_decentral.compression.tiles import Scratch, rows_of, tiles
from lightning_decentral.errors import CompressionError

_SMALL = 1 << 16  # below, torch.topk is fast enough
_SAMPLE = 1 << 16  # elements that the first guess of the threshold is made from


def kept(numel: int, ratio: float) -> int:
    """Tell how many of so many elements a share is: at least one, if there are any."""
    return min(numel, max(1, round(ratio * numel)))


def sparse_fields(count: int, dtype: torch.dtype) -> tuple[Field, ...]:
    """Values and 32-bit positions, the wider ones first."""
    pair = ((dtype, count), (torch.int32, count))
    return pair if dtype.itemsize >= 4 else pair[::-1]


def sparse_tensors(x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Return the message that has the values at these positions."""
    if x.numel() > 2**31 - 1:
        raise CompressionError(
            f"Got {x.numel()} elements, need fewer than 2^31 for 32-bit positions. Split the vector."
        )
    pair = (x[positions], positions.to(torch.int32))
    return pair if x.dtype.itemsize >= 4 else pair[::-1]


def values_and_positions(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Tell what `sparse_tensors` made, positions as 64-bit numbers."""
    first, second = tensors
    values, positions = (second, first) if first.dtype == torch.int32 else (first, second)
    return values, positions.long()


def write_sparse(tensors: tuple[Tensor, ...], out: Tensor) -> None:
    """Tell what such a message stands for: its values at their positions, and 0 elsewhere."""
    values, positions = values_and_positions(tensors)
    out.zero_().scatter_(0, positions, values)


def positions_above(x: Tensor, limit: float) -> Tensor:
    """Tell where `|x| >= limit`, in increasing order."""
    found = []
    scratch = Scratch(x, x.dtype)
    for tile in tiles(x):
        magnitudes = torch.abs(rows_of(x, tile), out=scratch[0, tile]).view(-1)
        found.append((magnitudes >= limit).nonzero().view(-1).add_(tile.start))
    return torch.cat(found)


def largest_positions(x: Tensor, count: int) -> Tensor:
    """Tell where the ``count`` largest magnitudes are, in no particular order. Exact.

    On a CPU a full selection would go through new memory of the vector's size several times. So a threshold that a
    little more than ``count`` magnitudes exceed is guessed from a sample; the selection is made among those. If it was
    too high, it is lowered until there are enough.
    """
    numel = x.numel()
    if count >= numel:
        return torch.arange(numel, device=x.device)
    if numel <= _SMALL or x.device.type != "cpu" or count > numel // 4:
        return x.abs().topk(count, sorted=False).indices
    sample = x[:: numel // _SAMPLE].abs()
    expected = count / numel * sample.numel()
    wanted = expected + 4 * expected**0.5 + 4  # four standard deviations: rarely too few
    while wanted < sample.numel():
        limit = float(sample.topk(int(wanted), sorted=False).values.min())
        candidates = positions_above(x, limit)
        if candidates.numel() >= count:
            return candidates[x[candidates].abs_().topk(count, sorted=False).indices]
        wanted *= 2
    return x.abs().topk(count, sorted=False).indices
