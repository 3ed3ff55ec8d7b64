"""Count sketch: a linear map to a short vector from which every coordinate can be estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.sparse import kept, largest_positions
from lightning_decentral.compression.tiles import Tile, rows_of, tiles
from lightning_decentral.compression.validation import require_at_least, require_ratio
from lightning_decentral.errors import ConfigurationError

_PRIME = 2**31 - 1


@final
@dataclass(frozen=True)
class CountSketch(AbstractCompressor):
    r"""Adds every value, with a random sign, to one random cell in each row of a table; a coordinate is estimated by
    the median over the rows of its cell times its sign.

    S[r, h_r(i)] += g_r(i) x_i;     C(x)_i = median over r of g_r(i) S[r, h_r(i)]

    *Linear*: tables add up to the table of the sum, so an all-reduce works, and what is large in the sum is found even
    where no worker alone has it large. Small values drown in the noise of their cells: with `keep` only the largest
    estimates are used. Without, every estimate is unbiased.

    Cost: 32 bits per cell. All workers draw the same hashes, from the seed, so they need not be sent. Slow: two
    polynomials modulo a prime and a scattered access per value and row.

    Args:
        ratio: cells, as a share of the elements, in (0, 1].
        rows: odd; the sketched-SGD paper has 5.
        keep: share of the elements to keep, the rest is set to 0; ``None`` for all.

    Raises:
        ConfigurationError: for a number out of range.

    Example:
        >>> import torch
        >>> x = torch.zeros(1000)
        >>> x[[3, 500]] = torch.tensor([5.0, -7.0])
        >>> sketch = CountSketch(ratio=0.1, keep=0.002)
        >>> payload = sketch.compress(x, torch.Generator().manual_seed(0))
        >>> torch.equal(sketch.decompress(payload), x), payload.num_bits
        (True, 3200)

    References:
        Charikar, Chen, Farach-Colton, *Finding Frequent Items in Data Streams*, ICALP 2002. Ivkin, Rothchild, Ullah,
        Braverman, Stoica, Arora, *Communication-efficient Distributed SGD with Sketching*, NeurIPS 2019,
        arXiv:1903.04488.
    """

    _may_overflow = True  # cells are sums

    ratio: float = 0.1
    rows: int = 5
    keep: float | None = None

    def __post_init__(self) -> None:
        require_ratio("CountSketch", self.ratio)
        require_at_least("CountSketch", "rows", self.rows, 1)
        if self.rows % 2 == 0:
            raise ConfigurationError(
                f"CountSketch got rows={self.rows}, needs an odd number, for a median. Use {self.rows + 1}."
            )
        if self.keep is not None:
            require_ratio("CountSketch", self.keep)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.keep is None, linear=True, randomness="shared")

    def error_bound(self, numel: int) -> float:
        """Return `(n - 1) / c` for one row of c cells; twice that for more, as a median is far off only if half its
        values are.

        Infinite with `keep`, for which nothing is known.
        """
        if self.keep is not None:
            return torch.inf
        return (1 if self.rows == 1 else 2) * max(0, numel - 1) / max(1, self._columns(numel))

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return ((torch.float32, self.rows * self._columns(numel(shape))),)

    def _columns(self, n: int) -> int:
        return min(n, max(1, int(self.ratio * n / self.rows)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        columns = self._columns(x.numel())
        table = torch.zeros(self.rows, columns, device=x.device)
        for tile in tiles(x):
            values = rows_of(x, tile).view(-1)
            for row, (cells, signs) in zip(table, self._hashes(seed, tile, columns, x.device), strict=True):
                row.index_add_(0, cells, values * signs)
        return (table.view(-1),)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        table = payload.tensors[0].view(self.rows, -1)
        for tile in tiles(out):
            hashes = self._hashes(payload.seed, tile, table.shape[1], out.device)
            estimates = [row[cells] * signs for row, (cells, signs) in zip(table, hashes, strict=True)]
            rows_of(out, tile).view(-1).copy_(torch.stack(estimates).median(0).values)
        if self.keep is not None:
            positions = largest_positions(out, kept(out.numel(), self.keep))
            values = out[positions]
            out.zero_()[positions] = values

    def _hashes(self, seed: int, tile: Tile, columns: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Hash a tile's elements to cells and signs, for each row: by polynomials of degree 3, so any four elements are
        independent."""
        random = Random(seed)
        index = torch.arange(tile.start + 1, tile.stop + 1, device=device) % _PRIME
        result = []
        for _ in range(self.rows):
            both = []
            for _ in range(2):
                value = torch.full_like(index, random.randrange(1, _PRIME))
                for _ in range(3):
                    value = (value * index + random.randrange(_PRIME)) % _PRIME
                both.append(value)
            result.append((both[0] % columns, (both[1] & 1).mul_(2).sub_(1).to(torch.float32)))
        return result
