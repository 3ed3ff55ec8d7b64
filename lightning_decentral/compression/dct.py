"""DeMo's operator: the largest coefficients of a cosine transform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, sqrt
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.tiles import chunk_elements, unless_infinite
from lightning_decentral.compression.validation import require_at_least
from lightning_decentral.errors import ConfigurationError


@final
@dataclass(frozen=True)
class DCTTopK(AbstractCompressor):
    r"""Cuts the vector into squares, takes the cosine transform (DCT-II, orthonormal) of each, and sends its `top`
    largest coefficients and where they are.

    The transform changes no lengths, so it is top-k in another basis: in each square the error is what is left out,
    at most `1 - top / side^2`. Fast-moving parts of a momentum are thought to be few in this basis. Biased: the
    method that it belongs to keeps what was not sent in the momentum (decoupled momentum).

    Cost: 48 bits per coefficient sent (16 for the position): 0.375 per element with the defaults. Two small matrix
    products per square.

    Args:
        side: of the squares, 1 to 181; the reference code has 64.
        top: coefficients of each; the reference code has 32.

    Raises:
        ConfigurationError: for a number out of range.

    Example:
        >>> import torch
        >>> dct = DCTTopK(side=4, top=1)
        >>> dct.decompress(dct.compress(torch.full((16,), 2.0))).round(decimals=4).tolist() == [2.0] * 16
        True

    References:
        Peng, Quesnelle, Kingma, *DeMo: Decoupled Momentum Optimization*, 2024, arXiv:2411.19870.
    """

    _may_overflow = True

    side: int = 64
    top: int = 32

    def __post_init__(self) -> None:
        require_at_least("DCTTopK", "side", self.side, 1, 181)  # positions are 16-bit numbers
        require_at_least("DCTTopK", "top", self.top, 1)
        if self.top > self.side**2:
            raise ConfigurationError(
                f"DCTTopK got top={self.top}, needs at most side^2 = {self.side**2}. Use a smaller one."
            )

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, unit=self.side**2, sums_grow=True)

    def error_bound(self, numel: int) -> float:
        """Return `1 - top / side^2`."""
        return 1.0 - self.top / self.side**2

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        count = self.top * -(-numel(shape) // self.side**2)
        return ((torch.float32, count), (torch.int16, count))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        basis = cosine_basis(self.side, x.device)
        values, positions = [], []
        for part in torch.split(x, self._elements_at_once(x)):
            missing = -part.numel() % self.side**2
            squares = (torch.cat([part, part.new_zeros(missing)]) if missing else part).view(-1, self.side, self.side)
            coefficients = (basis @ squares @ basis.t()).view(squares.shape[0], -1)
            chosen = coefficients.abs().topk(self.top, dim=1, sorted=False).indices
            largest = coefficients.gather(1, chosen)
            most = largest.abs().sum(1, keepdim=True, dtype=torch.float64) * min(1.0, sqrt(2 / self.side))
            values.append(unless_infinite(largest, most.float()).view(-1))  # of what is decoded
            positions.append(chosen.to(torch.int16).view(-1))
        return torch.cat(values), torch.cat(positions)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        values, positions = payload.tensors
        basis = cosine_basis(self.side, out.device)
        step = self._elements_at_once(out) // self.side**2 * self.top
        pairs = ((out, self._elements_at_once(out)), (values, step), (positions, step))
        parts = zip(*(torch.split(*pair) for pair in pairs), strict=True)
        for part, mine, chosen in parts:
            flat = torch.zeros(mine.numel() // self.top, self.side**2, device=out.device)
            flat.scatter_(1, chosen.view(-1, self.top).long(), mine.view(-1, self.top))
            squares = basis.t() @ flat.view(-1, self.side, self.side) @ basis
            part.copy_(squares.reshape(-1)[: part.numel()])

    def _elements_at_once(self, x: Tensor) -> int:
        square = self.side**2
        return max(1, chunk_elements(x.device) // square) * square


def cosine_basis(size: int, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II: row k has `sqrt(2 / n) cos(pi (2 i + 1) k / (2 n))`, row 0 divided by
    `sqrt(2)`."""
    index = torch.arange(size, dtype=torch.float64, device=device)
    basis = torch.cos(pi / (2 * size) * (2 * index + 1) * index.unsqueeze(1)).mul_(sqrt(2 / size))
    basis[0] /= sqrt(2)
    return basis.float()
