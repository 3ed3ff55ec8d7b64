"""New memory for long vectors."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_NEVER_KEPT = 1 << 25  # bytes: glibc gives larger blocks back to the system at once, so that they are always new memory


def uninitialized(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `torch.empty`, with huge pages for long vectors on a CPU under Linux.

    The system clears new memory page by page when it is first written to. With pages of 4 KiB that takes longer than
    most schemes take to decode; with pages of 2 MiB, where the system has them, a third of it.
    """
    count = prod(shape)
    size = count * dtype.itemsize
    if sys.platform != "linux" or device.type != "cpu" or size <= _NEVER_KEPT:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without huge pages: the small ones do
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))
