"""What an exchange was like: bytes, norms, and where the time went."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from lightning_decentral.compression import ErrorFeedback
from lightning_decentral.compression.tiles import norms, tiles

Part = Literal["compress", "communicate", "decompress"]


@dataclass(slots=True)
class Measured:
    """What one step's exchange was like on this worker.

    Attributes:
        elements: of all gradients.
        bytes: handed to the collectives.
        input_norm: of what was compressed.
        error_norm: of what compression left out of it.
        residual_norm: of what is remembered; 0 without error feedback.
        compress_seconds: in compressors; with error feedback including the decoding of the own message.
        communicate_seconds: in collectives, waiting for others included.
        decompress_seconds: in decoding and averaging.
    """

    elements: int = 0
    bytes: int = 0
    input_norm: float = 0.0
    error_norm: float = 0.0
    residual_norm: float = 0.0
    compress_seconds: float = 0.0
    communicate_seconds: float = 0.0
    decompress_seconds: float = 0.0


class Measuring:
    """Takes the figures of one step, while several lanes work on it.

    Args:
        everything: whether also what costs a few passes over the gradients is measured, and the time.
        on_gpu: whether times are those of a GPU's stream.
    """

    def __init__(self, everything: bool = False, on_gpu: bool = False) -> None:
        self.everything = everything
        self._on_gpu = on_gpu
        self._measured = Measured()
        self._lock = threading.Lock()
        self._squares: list[tuple[Tensor, Tensor]] = []  # of the input and the error
        self._events: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []

    def count(self, elements: int = 0, handed: int = 0) -> None:
        """Note so many elements of gradients, or bytes that were handed to a collective."""
        with self._lock:
            self._measured.elements += elements
            self._measured.bytes += handed

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """Add the time of what is inside to a part; nothing in it may wait for another lane."""
        if not self.everything:
            yield
        elif not self._on_gpu:
            start = time.perf_counter()
            yield
            self._add_seconds(part, time.perf_counter() - start)
        else:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            yield
            after.record()
            self._events.append((part, before, after))

    def compare(self, memory: ErrorFeedback | None, x: Tensor, sent: Tensor, where: slice = slice(None)) -> None:
        """Note how much a message left out.

        Args:
            memory: which has been told what the message stands for, if there is one.
            x: what was compressed, if there is no memory.
            sent: what the message stands for.
            where: these elements are in the memory.
        """
        if not self.everything:
            return
        for tile in tiles(x):
            here = slice(tile.start, tile.stop)
            left = x[here] - sent[here] if memory is None else memory.left[where][here]
            total = x[here] if memory is None else left + sent[here]
            self._squares.append((sum_of_squares(total), sum_of_squares(left)))

    def result(self, residual_norm: float = 0.0) -> Measured:
        """Give the figures, once all lanes are done.

        Args:
            residual_norm: of what is remembered now.
        """
        measured = self._measured
        if self.everything:
            measured.input_norm = sqrt(sum(float(square) for square, _ in self._squares))
            measured.error_norm = sqrt(sum(float(square) for _, square in self._squares))
            measured.residual_norm = residual_norm
            for part, start, end in self._events:
                end.synchronize()
                self._add_seconds(part, start.elapsed_time(end) / 1e3)
        return measured

    def _add_seconds(self, part: Part, seconds: float) -> None:
        measured = self._measured
        with self._lock:
            if part == "compress":
                measured.compress_seconds += seconds
            elif part == "communicate":
                measured.communicate_seconds += seconds
            else:
                measured.decompress_seconds += seconds


def sum_of_squares(x: Tensor) -> Tensor:
    """Compute `||x||^2` in float64, of which there is never more than a tile."""
    return norms(x, None).double().square().sum()
