"""Modular quantization: which lattice point, but only its last digits; the receiver knows the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.memory import uninitialized
from lightning_decentral.compression.packing import Packer, Unpacker, packed_bytes
from lightning_decentral.compression.tiles import (
    Scratch,
    chunk_of,
    largest_magnitudes,
    num_buckets,
    rows_of,
    tiles,
)
from lightning_decentral.compression.validation import require_one_of, require_positive
from lightning_decentral.errors import CompressionError, ConfigurationError, DecodingError

_BLOCK = 4096  # elements that share a check sum
_CPU_CHUNK = 1 << 18  # elements to work on at once: more than others do, as most of it is in bytes
_LARGEST = 1 << 23  # lattice points on either side of zero that float32 can tell apart, with a bit to spare
_ROUNDING = 1.5 * 2**23  # what is added to a float32 below 2^22 has no place for a fraction in the sum
_ROUNDING_BITS = 0x4B400000  # of this number; those of the sum are larger by the whole number that was added


@final
@dataclass(frozen=True)
class Lattice(AbstractCompressor):
    r"""Rounds to multiples of a step and sends them modulo `q`; decoded to the candidate nearest to a reference.

    z = round((x - theta) / s);   sent: z mod q;   decoded: s z' + theta, z' the number nearest to
    (reference - theta) / s with z' = z (mod q)

    The error is at most `s / 2` per value, and up to a step where float32 rounds so much (values above 2^22 steps),
    however long the vectors are: what counts is that the receiver's own vector is near, within `s (q - 1) / 2` in every
    coordinate. That is so for the models of gossiping workers, which differ far less than they are large.
    `decompress_near` decodes and verifies: check sums over the full `z` tell if the reference was too far, where
    without them the result would be off by multiples of `s q`, unnoticed. Who needs a difference of two such vectors,
    as gossip does, has it without decoding either: `steps_between`.

    For Moniqua with the bound `theta` on the distance of two workers use `Lattice.within(theta, levels)`.

    Cost: `log2 q` bits per element (8, 4, 2 or 1, as packed) and 32 of check sum for every 4096 elements. No memory of
    the peers' models.

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
        if not self.step >= torch.finfo(torch.float32).tiny:
            raise ConfigurationError(
                f"Lattice got step={self.step!r}, needs at least {torch.finfo(torch.float32).tiny:.2g}, the smallest "
                "number with all of float32's digits. Use a larger step."
            )
        require_one_of("Lattice", "levels", self.levels, (2, 4, 16, 256))
        require_one_of("Lattice", "dither", self.dither, (True, False))

    @staticmethod
    def within(distance: float, levels: int = 256, dither: bool = False) -> Lattice:
        """Return the finest lattice that decodes whatever is within so much of the reference, in every coordinate.

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

    _shows_what_is_not_finite = True  # it is refused, as whatever is too large

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        return ((torch.int32, num_buckets(n, _BLOCK)), (torch.uint8, packed_bytes(n, self.levels)))

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

    @torch.no_grad()
    def steps_between(self, payload: Payload, own: Payload, near: Tensor) -> Tensor:
        """Tell how many steps of the lattice a worker's rounded vector is above one's own rounded one; for
        `add_steps_`.

        Two points differ by what their digits differ by, modulo q: neither is decoded. The other end of an exchange
        gets the same number with the opposite sign. The check sums tell where that was not the right number. There,
        mostly because a difference of exactly `q / 2` steps has two signs, the points themselves are decoded, as by
        `decompress_near`.

        Args:
            payload: of a worker whose vector is within `reach` of one's own.
            own: of one's own vector, with the same dither.
            near: one's own vector.

        Returns:
            Whole numbers, of the vector's shape, contiguous: int8, or int16 if one of them needs it.

        Raises:
            CompressionError: if shapes or dithers differ.
            DecodingError: if the vectors were too far from each other.

        Example:
            >>> import torch
            >>> lattice, mine = Lattice(step=0.1, levels=16), torch.tensor([100.3, -7.5])
            >>> theirs = lattice.compress(torch.tensor([100.02, -7.0]))
            >>> lattice.steps_between(theirs, lattice.compress(mine), mine)
            tensor([-3,  5], dtype=torch.int8)
        """
        if not (payload.shape == own.shape == tuple(near.shape) and payload.seed == own.seed):
            raise CompressionError(
                f"Lattice got messages of shapes {payload.shape} and {own.shape} with dithers {payload.seed} and "
                f"{own.seed}, and a vector of shape {tuple(near.shape)}, needs the same shape and dither everywhere. "
                "Pass one's own message of the same step, and the vector that it was made of."
            )
        mine = near.detach().reshape(-1)
        result = torch.empty(mine.shape, dtype=torch.int8, device=mine.device)
        chunk = _chunk_of(mine)
        theirs_sent, own_sent = (Unpacker(one.tensors[1], self.levels, chunk) for one in (payload, own))
        checks = payload.tensors[0] - own.tensors[0]  # [blocks], what the differences' check sums have to be
        check = _CheckSum(mine.device)
        scratch = Scratch(mine, torch.int32, torch.int8, chunk=chunk)
        for tile in tiles(mine, _BLOCK, chunk):
            whole = scratch[0, tile]
            theirs, own_codes = (sent.codes(tile.start, tile.stop) for sent in (theirs_sent, own_sent))
            target = rows_of(result, tile)
            steps = self._signed_(target if target.dtype == torch.int8 else scratch[1, tile], theirs, own_codes)
            due = checks[tile.row : tile.row + tile.rows]
            if not torch.equal(check.of_(whole.copy_(steps)), due):
                steps = self._difference_near(theirs, own_codes, rows_of(mine, tile).float(), self._theta(own.seed))
                if not torch.equal(check.of_(whole.copy_(steps)), due):
                    raise self._too_far()
                lowest, highest = steps.aminmax()
                if result.dtype == torch.int8 and (int(lowest) < -128 or int(highest) > 127):
                    result = result.short()
            if steps is not target:
                rows_of(result, tile).copy_(steps)
        return result.view(near.shape)

    @torch.no_grad()
    def add_steps_(self, out: Tensor, terms: Sequence[tuple[Tensor, float]]) -> Tensor:
        """Add so many steps of the lattice to ``out``, which is rounded once: `out + s sum_k weight_k steps_k`.

        Args:
            out: contiguous.
            terms: what `steps_between` gave, and its weight, for each neighbour.

        Returns:
            ``out``.

        Raises:
            CompressionError: if shapes differ, or ``out`` is not contiguous.
        """
        if not out.is_contiguous() or any(steps.shape != out.shape for steps, _ in terms):
            raise CompressionError(
                f"Lattice got steps of shapes {[tuple(steps.shape) for steps, _ in terms]} for a vector of shape "
                f"{tuple(out.shape)}, needs a contiguous one of the same shape. Pass the vector that they belong to."
            )
        flat = out.view(-1)
        chunk = _chunk_of(flat)
        scratch = Scratch(flat, torch.float64 if flat.dtype == torch.float64 else torch.float32, chunk=chunk)
        for tile in tiles(flat, _BLOCK, chunk):
            values, target = scratch[0, tile], rows_of(flat, tile)
            if len(terms) == 1:
                steps, weight = terms[0]
                target.add_(values.copy_(rows_of(steps.view(-1), tile)), alpha=weight * self.step)
                continue
            values.zero_()
            for steps, weight in terms:
                values.add_(rows_of(steps.view(-1), tile), alpha=weight)
            target.add_(values, alpha=self.step)
        return out

    def _difference_near(self, theirs: Tensor, own: Tensor, near: Tensor, theta: float) -> Tensor:
        """Subtract from the points with these digits that are nearest to ``near``, [blocks, elements] in float32."""
        work = torch.empty_like(near)
        points = self._nearest_(theirs.float().view_as(near), near, theta, work)
        return points.sub_(self._nearest_(own.float().view_as(near), near, theta, work))

    def _signed_(self, out: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
        """Return the differences of digits modulo q from `-q / 2` to `q / 2 - 1`; ``out``, of int8."""
        digits = out.view(torch.uint8)
        torch.sub(plus, minus, out=digits.view(-1))
        if self.levels < 256:
            digits.mul_(256 // self.levels)
            out.bitwise_right_shift_(9 - self.levels.bit_length())
        return out

    def _theta(self, seed: int) -> float:
        return self.step * Random(seed).random() if self.dither else 0.0

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        # `torch.add(shift, x, alpha=scale)` is `shift + scale x` in one pass.
        shift = torch.full((1, 1), -self._theta(seed) / self.step, device=x.device)
        check = _CheckSum(x.device)
        # One memory for all that travels: then a message of it need not be put together.
        sums_bytes = 4 * num_buckets(x.numel(), _BLOCK)
        size = sums_bytes + packed_bytes(x.numel(), self.levels)
        message = torch.empty(size, dtype=torch.uint8, device=x.device)
        sums = message[:sums_bytes].view(torch.int32)
        packer = Packer(x.numel(), self.levels, x.device, message[sums_bytes:])
        chunk = _chunk_of(x)
        scratch = Scratch(x, torch.float32, torch.uint8, chunk=chunk)
        half_way = (self.step * _LARGEST / 2) ** 2
        if half_way < torch.finfo(torch.float32).tiny:
            half_way = 0.0  # squares of such values vanish
        for tile in tiles(x, _BLOCK, chunk):
            values = scratch[0, tile]
            points = values.view(torch.int32)  # in the same memory: more of the rest stays in the cache
            mine = x[tile.start : tile.stop]
            # No value is larger than the root of the sum of squares, which costs a third of a look at each.
            surely_near = float(torch.dot(mine, mine)) < half_way
            torch.add(shift, rows_of(x, tile), alpha=1 / self.step, out=values)
            if surely_near:  # then this rounds, and the sum's bits are those of the rounded number, and of `_ROUNDING`
                values.add_(_ROUNDING)
            else:
                points.copy_(values.round_())
                self._require_near(mine, points)
                points.add_(_ROUNDING_BITS)
            if self.levels == 256:  # a byte is what is left of a number modulo 256
                packer.packed[tile.start : tile.stop].copy_(points.view(-1))
            else:
                packer.write(tile.start, scratch[1, tile].copy_(points).bitwise_and_(self.levels - 1))
            check.of_(points, out=sums[tile.row : tile.row + tile.rows])
        check.leave_out_(sums, _ROUNDING_BITS, x.numel())
        return sums, packer.packed

    def _require_near(self, values: Tensor, points: Tensor) -> None:
        lowest, highest = points.aminmax()  # far beyond int32's range they are its ends
        if int(lowest) < -_LARGEST or int(highest) > _LARGEST or not bool(values.isfinite().all()):
            raise CompressionError(
                f"{self} got a value of magnitude {float(largest_magnitudes(values, None)[0]):g}, needs less than 2^23 "
                "steps, all that float32 resolves. Use a larger step."
            )

    def _decode(self, payload: Payload, out: Tensor) -> None:
        self._decode_near(payload, None, out)

    def _decode_near(self, payload: Payload, reference: Tensor | None, out: Tensor) -> None:
        sent, packed = payload.tensors
        theta = self._theta(payload.seed)
        shift = torch.full((1, 1), theta, device=out.device)
        unpacker = Unpacker(packed, self.levels, chunk_of(out))
        check = _CheckSum(out.device)
        sums = torch.empty_like(sent)
        scratch = Scratch(out, torch.float32, torch.int32)
        for tile in tiles(out, _BLOCK):
            points, whole, mine = scratch[0, tile], scratch[1, tile], rows_of(out, tile)
            unpacker.read(tile.start, points)
            near = None if reference is None else rows_of(reference, tile)
            self._nearest_(points, near, theta, mine)  # `out` may be the reference
            torch.add(shift, points, alpha=self.step, out=mine)
            check.of_(whole.copy_(points), out=sums[tile.row : tile.row + tile.rows])
        if not torch.equal(sums, sent):
            raise self._too_far()

    def _nearest_(self, points: Tensor, reference: Tensor | None, theta: float, work: Tensor) -> Tensor:
        """Make of digits the points with these digits that are nearest to the reference, or to zero.

        All are [blocks, elements] in float32. ``work``, which may be the reference, is overwritten.
        """
        cell = self.step * self.levels
        before = torch.full((1, 1), -theta / cell, device=points.device)
        # How many cells to go: round((reference - theta - s z) / (s q)).
        if reference is None:
            torch.mul(points, -self.step, out=work)
        else:
            torch.sub(reference, points, alpha=self.step, out=work)
        torch.add(before, work, alpha=1 / cell, out=work).round_()
        return points.add_(work, alpha=self.levels)

    def _too_far(self) -> DecodingError:
        return DecodingError(
            f"{self} got a message that does not decode near its reference, needs one within {self.reach:g} "
            "in every coordinate. Use a larger step or more levels, or bring the workers together first (average "
            "the models)."
        )


def _chunk_of(x: Tensor) -> int:
    return max(chunk_of(x), _CPU_CHUNK)


@cache
def _check_weights(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or they could not be used outside of that
        return torch.arange(1, _BLOCK + 1, dtype=torch.int32, device=device).mul_(-1640531535).bitwise_or_(1)


class _CheckSum:
    """A sum of a block's lattice points with odd weights, modulo 2^32: that of a difference is the sums' difference.

    Wrong points are off by multiples of the number of levels; with equal weights, two that are off in opposite
    directions would not be noticed.
    """

    def __init__(self, device: torch.device) -> None:
        self._weights = _check_weights(device)

    def of_(self, points: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum up int32 points [blocks, elements], which are overwritten: [blocks]."""
        weights = self._weights if points.shape[1] == _BLOCK else self._weights[: points.shape[1]]
        return torch.sum(points.mul_(weights), 1, dtype=torch.int32, out=out)

    def leave_out_(self, sums: Tensor, offset: int, numel: int) -> None:
        """Make of the sums of points that are all too large by ``offset`` those of the points."""
        full, rest = divmod(numel, _BLOCK)
        sums[:full] -= self._weights.sum(dtype=torch.int32).mul_(offset)
        sums[full:] -= self._weights[:rest].sum(dtype=torch.int32).mul_(offset)
