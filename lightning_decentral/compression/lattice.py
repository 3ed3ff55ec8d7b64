"""Modular quantization: which lattice point, but only its last digits; the receiver knows the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.memory import uninitialized
from lightning_decentral.compression.packing import Packer, Unpacker, packed_bytes
from lightning_decentral.compression.tiles import Scratch, chunk_of, largest_magnitudes, rows_of, tiles
from lightning_decentral.compression.validation import require_one_of, require_positive
from lightning_decentral.errors import CompressionError, DecodingError

_BLOCK = 4096  # elements that share the weights of the check sum
_LARGEST = 1 << 23  # lattice points on either side of zero that float32 can tell apart, with a bit to spare


@final
@dataclass(frozen=True)
class Lattice(AbstractCompressor):
    r"""Rounds to multiples of a step and sends them modulo `q`; decoded to the candidate nearest to a reference.

    z = round((x - theta) / s);   sent: z mod q;   decoded: s z' + theta, z' the number nearest to
    (reference - theta) / s with z' = z (mod q)

    The error is at most `s / 2` per value, however long the vectors are: what counts is that the receiver's own
    vector is near, within `s (q - 1) / 2` in every coordinate. That is so for the models of gossiping workers, which
    differ far less than they are large. `decompress_near` decodes and verifies: a check sum over the full `z` tells
    if the reference was too far, where without it the result would be off by multiples of `s q`, unnoticed.

    For Moniqua with the bound `theta` on the distance of two workers use `Lattice.within(theta, levels)`.

    Cost: `log2 q` bits per element (8, 4, 2 or 1, as packed) and 64 for the check sum. No memory of the peers' models.

    Args:
        step: `s`, in the vector's units.
        levels: `q`: 2, 4, 16 or 256.
        dither: shift the lattice by a random `theta` in [0, s), the same on all workers: unbiased. Otherwise 0.

    Raises:
        ConfigurationError: for other numbers.

    Example:
        >>> import torch
        >>> lattice = Lattice(step=0.1, levels=16)
        >>> payload = lattice.compress(torch.tensor([100.02, -7.0]))
        >>> lattice.decompress_near(payload, torch.tensor([100.3, -7.5])).round(decimals=3).tolist()
        [100.0, -7.0]
        >>> lattice.decompress_near(payload, torch.tensor([101.3, -7.5]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_decentral.errors.DecodingError: ...

    References:
        Davies, Gurunanthan, Moshrefi, Ashkboos, Alistarh, *New Bounds for Distributed Mean Estimation and Variance
        Reduction*, ICLR 2021, arXiv:2002.09268. Lu, De Sa, *Moniqua: Modulo Quantized Communication in Decentralized
        SGD*, ICML 2020, arXiv:2002.11787.
    """

    step: float
    levels: int = 256
    dither: bool = False

    def __post_init__(self) -> None:
        require_positive("Lattice", "step", self.step)
        require_one_of("Lattice", "levels", self.levels, (2, 4, 16, 256))
        require_one_of("Lattice", "dither", self.dither, (True, False))

    @staticmethod
    def within(distance: float, levels: int = 256, dither: bool = False) -> Lattice:
        """The finest lattice that decodes whatever is within so much of the reference, in every coordinate.

        The step is `2 distance / (q - 1)`. It is Moniqua's quantizer with `delta = 1 / (2 q)`, whose cells have the
        width `B = 2 distance / (1 - 2 delta) = q s`.
        """
        require_positive("Lattice.within", "distance", distance)
        require_one_of("Lattice", "levels", levels, (2, 4, 16, 256))
        return Lattice(2 * distance / (levels - 1), levels, dither)

    @property
    def reach(self) -> float:
        """How far, in any coordinate, the reference may be from the vector that was sent: `s (q - 1) / 2`."""
        return self.step * (self.levels - 1) / 2

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.dither, randomness="shared" if self.dither else "none")

    def error_bound(self, numel: int) -> float:
        """Infinite: the error, at most `n s^2 / 4` (dithered `n s^2 / 12` on average), has the step's size."""
        return torch.inf

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        return ((torch.int64, min(1, n)), (torch.uint8, packed_bytes(n, self.levels)))

    def decompress_near(self, payload: Payload, reference: Tensor, out: Tensor | None = None) -> Tensor:
        """Decode to what is nearest to the reference.

        Args:
            payload: of any worker.
            reference: within `reach` of the vector that was sent; of its shape.
            out: as for `decompress`; it may be the reference itself.

        Raises:
            DecodingError: if the reference was too far from the vector, so that the result is not what was sent.
        """
        if tuple(reference.shape) != payload.shape:
            raise CompressionError(
                f"Lattice got a reference of shape {tuple(reference.shape)}, needs {payload.shape}. Pass one's own "
                "vector of the kind that the peer sent."
            )
        flat = reference.detach().reshape(-1).float().contiguous()
        result = uninitialized(payload.shape, payload.dtype, flat.device) if out is None else out
        if flat.numel():
            wide = result.view(-1) if result.dtype == torch.float32 else torch.empty_like(flat)
            self._decode_near(payload, flat, wide)
            if wide.dtype != result.dtype:
                result.view(-1).copy_(wide)
        return result

    def _theta(self, seed: int) -> float:
        return self.step * Random(seed).random() if self.dither else 0.0

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        largest = float(largest_magnitudes(x, None)[0])
        if largest >= self.step * (_LARGEST - 1):
            raise CompressionError(
                f"{self} got a value of magnitude {largest:g}, needs less than 2^23 steps, all that float32 resolves. "
                "Use a larger step."
            )
        theta = self._theta(seed)
        packer = Packer(x.numel(), self.levels, x.device)
        check = _CheckSum(x)
        scratch = Scratch(x, torch.float32, torch.int32, torch.uint8)
        for tile in tiles(x, _BLOCK):
            values, points, codes = (scratch[i, tile] for i in range(3))
            torch.sub(rows_of(x, tile), theta, out=values) if theta else values.copy_(rows_of(x, tile))
            points.copy_(values.div_(self.step).round_())
            check.add(tile.row, points, values)
            packer.write(tile.start, codes.copy_(points.bitwise_and_(self.levels - 1)))
        return check.total(), packer.packed

    def _decode(self, payload: Payload, out: Tensor) -> None:
        self._decode_near(payload, None, out)

    def _decode_near(self, payload: Payload, reference: Tensor | None, out: Tensor) -> None:
        sent, packed = payload.tensors
        theta = self._theta(payload.seed)
        cell = self.step * self.levels
        # `torch.add(shift, x, alpha=scale)` is `shift + scale x` in one pass.
        shift, before = (torch.full((1, 1), value, device=out.device) for value in (theta, -theta / cell))
        unpacker = Unpacker(packed, self.levels, chunk_of(out))
        check = _CheckSum(out)
        scratch = Scratch(out, torch.float32, torch.int32)
        for tile in tiles(out, _BLOCK):
            points, whole, wraps = scratch[0, tile], scratch[1, tile], rows_of(out, tile)
            unpacker.read(tile.start, points)
            # How many cells to go: round((reference - theta - s z) / (s q)). `out` may be the reference.
            if reference is None:
                torch.mul(points, -self.step, out=wraps)
            else:
                torch.sub(rows_of(reference, tile), points, alpha=self.step, out=wraps)
            torch.add(before, wraps, alpha=1 / cell, out=wraps).round_()
            points.add_(wraps, alpha=self.levels)
            torch.add(shift, points, alpha=self.step, out=wraps)
            check.add(tile.row, whole.copy_(points), whole)
        if not torch.equal(check.total(), sent):
            raise DecodingError(
                f"{self} got a message that does not decode near its reference, needs one within {self.reach:g} "
                "in every coordinate. Use a larger step or more levels, or bring the workers together first (average "
                "the models)."
            )


class _CheckSum:
    """A sum of the lattice points with odd weights, in whole numbers that may overflow, equal on both sides.

    Wrong points are off by multiples of the number of levels; with equal weights, two that are off in opposite
    directions would not be noticed.
    """

    def __init__(self, x: Tensor) -> None:
        weights = torch.arange(1, _BLOCK + 1, device=x.device) * 2654435761 % (1 << 31) | 1
        self._weights = weights.to(torch.int32)
        self._sums = torch.zeros(-(-x.numel() // _BLOCK), dtype=torch.int32, device=x.device)

    def add(self, row: int, points: Tensor, work: Tensor) -> None:
        """Take in whole rows [blocks, elements]; ``work``, which may be ``points``, is overwritten."""
        products = torch.mul(points, self._weights[: points.shape[1]], out=work.view(torch.int32))
        torch.sum(products, 1, dtype=torch.int32, out=self._sums[row : row + points.shape[0]])

    def total(self) -> Tensor:
        """One number."""
        weights = torch.arange(1, self._sums.numel() + 1, device=self._sums.device) * 0x9E3779B97F4A7C1 | 1
        return (self._sums * weights).sum().view(1)
