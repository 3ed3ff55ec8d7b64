"""Small whole numbers, several to a byte.

Numbers below `base` are digits: a byte holds the largest number `D` of them with `base^D <= 256`, so 8 signs, 5 of
three levels, 3 of five, 2 of nine or sixteen. Digit `p` of byte `j` belongs to element `p * num_bytes + j`: a *plane*
of digits is contiguous in memory, which makes packing and unpacking a few operations on contiguous bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def digits_per_byte(base: int) -> int:
    """Tell how many numbers below ``base`` (2 to 256) fit into a byte."""
    digits = 1
    while base ** (digits + 1) <= 256:
        digits += 1
    return digits


def packed_bytes(numel: int, base: int) -> int:
    """Return bytes of so many numbers."""
    return -(-numel // digits_per_byte(base))


def _pieces(start: int, stop: int, plane_size: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range of elements where planes end: plane, first byte, offset from ``start``, length."""
    position = start
    while position < stop:
        plane, byte = divmod(position, plane_size)
        length = min(stop - position, plane_size - byte)
        yield plane, byte, position - start, length
        position += length


class Packer:
    """Writes numbers into packed bytes, piece by piece, in the order of the elements.

    Args:
        numel: how many numbers in all.
        base: they are below it.
        device: of the result.
        packed: where to; new memory by default.
    """

    def __init__(self, numel: int, base: int, device: torch.device, packed: Tensor | None = None) -> None:
        self._base = base
        size = packed_bytes(numel, base)
        self.packed = torch.empty(size, dtype=torch.uint8, device=device) if packed is None else packed

    def write(self, start: int, codes: Tensor) -> None:
        """Store the codes (uint8) of the elements from ``start`` on."""
        codes = codes.view(-1)
        for plane, byte, offset, length in _pieces(start, start + codes.numel(), self.packed.numel()):
            target, source = self.packed[byte : byte + length], codes[offset : offset + length]
            if plane == 0:
                target.copy_(source)
            else:
                target.add_(source, alpha=self._base**plane)


class Unpacker:
    """Reads what a `Packer` wrote.

    Args:
        packed: the bytes.
        base: of the numbers.
        chunk: the largest number of elements that is read at once.
    """

    def __init__(self, packed: Tensor, base: int, chunk: int) -> None:
        self._packed = packed
        self._base = base
        self._bits = base.bit_length() - 1 if base & (base - 1) == 0 else 0
        narrow = self._bits and digits_per_byte(base) > 1
        self._narrow = torch.empty(chunk, dtype=torch.uint8, device=packed.device) if narrow else None
        self._wide = None if self._bits else torch.empty(chunk, dtype=torch.float32, device=packed.device)

    def read(self, start: int, out: Tensor) -> None:
        """Write the numbers of the elements from ``start`` on into ``out`` (float32, contiguous), as many as it has."""
        out = out.view(-1)
        for plane, byte, offset, length in _pieces(start, start + out.numel(), self._packed.numel()):
            source, target = self._packed[byte : byte + length], out[offset : offset + length]
            if digits_per_byte(self._base) == 1:
                target.copy_(source)
            elif self._narrow is not None:
                target.copy_(self._digits(source, plane, self._narrow[:length]))
            elif self._wide is not None:
                # Whole-number division is slow; floor((byte + 1/2) / base^p) in float32 is exact for bytes.
                higher = self._wide[:length]
                target.copy_(source)
                torch.add(target, 0.5, out=higher).mul_(1.0 / self._base ** (plane + 1)).floor_()
                if plane:
                    target.add_(0.5).mul_(1.0 / self._base**plane).floor_()
                target.sub_(higher, alpha=self._base)

    def codes(self, start: int, stop: int) -> Tensor:
        """Return the numbers of some elements as bytes, for a base that is a power of two; right until the next
        call."""
        if digits_per_byte(self._base) == 1:
            return self._packed[start:stop]
        assert self._narrow is not None
        for plane, byte, offset, length in _pieces(start, stop, self._packed.numel()):
            self._digits(self._packed[byte : byte + length], plane, self._narrow[offset : offset + length])
        return self._narrow[: stop - start]

    def _digits(self, source: Tensor, plane: int, out: Tensor) -> Tensor:
        """Return one plane of some bytes, for a base that is a power of two."""
        if plane == 0:
            return torch.bitwise_and(source, self._base - 1, out=out)
        torch.bitwise_right_shift(source, self._bits * plane, out=out)
        if plane < digits_per_byte(self._base) - 1:  # nothing is left above the last one
            out.bitwise_and_(self._base - 1)
        return out
