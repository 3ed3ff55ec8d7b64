"""How long a worker's updates are, from a few coordinates: what the distance between workers is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_decentral.engine.sampling import drawn, places_in
from lightning_decentral.flat import Vector

SAMPLE = 256  # coordinates: the square of a length is then right within a few tens of percent


class UpdateLengths:
    """Estimates the squared length of each update, of coordinates that are drawn once, and keeps the largest.

    Nothing waits for the device before `take`.

    Args:
        vector: of the form of those that are updated.
        seed: of the draw.
    """

    def __init__(self, vector: Vector, seed: int = 0) -> None:
        self._scale = vector.numel / SAMPLE
        self._places = places_in([vector], drawn(vector.numel, SAMPLE, seed))
        self._largest: Tensor | None = None

    @contextmanager
    def around(self, vector: Vector) -> Iterator[None]:
        """Measure what a block does to a vector."""
        before = self._sampled(vector)
        yield
        with torch.no_grad():
            squared = sum(
                (now - then).double().square().sum() for now, then in zip(self._sampled(vector), before, strict=True)
            )
            assert isinstance(squared, Tensor)
            self._largest = squared if self._largest is None else torch.maximum(self._largest, squared)

    def take(self) -> float:
        """Return the largest square since this was last asked, and forget it; 0 if there was no update."""
        largest, self._largest = self._largest, None
        return 0.0 if largest is None else self._scale * float(largest)

    def _sampled(self, vector: Vector) -> list[Tensor]:
        return [
            buffer.detach()[places] for buffer, places in zip(vector.buffers, self._places, strict=True) if len(places)
        ]
