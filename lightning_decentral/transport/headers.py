"""Headers: what a message is, in a few whole numbers, so that its receiver checks it before it takes any bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_decentral.flat import Vector

_LENGTH = 64  # whole numbers in a header
_TYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)


def form_of(vector: Vector) -> list[int]:
    """Return the type and the number of elements of each buffer, as whole numbers."""
    return [number for buffer in vector.buffers for number in (_TYPES.index(buffer.dtype), buffer.numel())]


def header_of(vector: Vector, *numbers: int) -> Tensor:
    """Return the form of a vector, and a few numbers before it."""
    layout = form_of(vector)
    room = _LENGTH - len(numbers) - 2
    if len(layout) > room:  # the others as one number
        most = room // 2 * 2 - 2
        layout = [*layout[:most], digest(layout[most:])]
    values = [*numbers, len(vector.buffers), *layout]
    return torch.tensor([*values, *[0] * (_LENGTH - len(values))], dtype=torch.int64)


def empty_header() -> Tensor:
    """Tell where a header is received."""
    return torch.zeros(_LENGTH, dtype=torch.int64)


def is_of(header: Tensor, like: Vector, *numbers: int) -> bool:
    """Tell whether a header is of a vector of this form, with these numbers before it."""
    return torch.equal(header, header_of(like, *numbers))


def described(header: Tensor, numbers: int) -> Vector:
    """Return a vector of the form that a header tells, without memory; as far as a header tells it.

    Args:
        header: as received.
        numbers: how many stand before the form.
    """
    count, *layout = header[numbers:].tolist()
    buffers = []
    for kind, numel in list(zip(layout[::2], layout[1::2], strict=False))[: max(0, min(count, _LENGTH))]:
        if 0 <= kind < len(_TYPES) and numel >= 0:
            buffers.append(torch.empty(numel, dtype=_TYPES[kind], device="meta"))
    return Vector(buffers)


def digest(numbers: Sequence[int]) -> int:
    """Return a number from 0 to ``2**62 - 1`` for a sequence of numbers, equal for equal ones, and for others hardly
    ever."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 2
