"""A few coordinates of vectors, drawn with replacement, in the place of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_decentral.flat import Vector


def drawn(numel: int, sample: int, seed: int) -> Tensor:
    """Draw coordinates with replacement: ``[sample]``, in order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(numel, (sample,), generator=generator).sort().values


def places_in(vectors: Sequence[Vector], places: Tensor) -> list[Tensor]:
    """Divide places in vectors, in order, among their buffers: for each buffer those that lie in it, on its device."""
    inside, first = [], 0
    for buffer in (buffer for vector in vectors for buffer in vector.buffers):
        begin, end = torch.searchsorted(places, torch.tensor([first, first + buffer.numel()])).tolist()
        inside.append((places[begin:end] - first).to(buffer.device))
        first += buffer.numel()
    return inside


def sampled(vectors: Sequence[Vector], places: Tensor) -> Tensor:
    """Take the coordinates at some places of vectors: ``[sample]``, of float64, on the CPU."""
    buffers = [buffer for vector in vectors for buffer in vector.buffers]
    inside = places_in(vectors, places)
    return torch.cat([b[own].to("cpu", torch.float64) for b, own in zip(buffers, inside, strict=True)])
