"""The largest values of each chunk, in 2 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.packing import Packer, Unpacker, packed_bytes
from lightning_decentral.compression.validation import require_at_least

_BINS = 4
_BIN_WIDTH = 6.0 / _BINS  # standard deviations


@final
@dataclass(frozen=True)
class ChunkTopK(AbstractCompressor):
    r"""The values of largest magnitude of each chunk, each in 2 bits, and where they are; everything else is 0.

    The values that are kept, of all chunks together, are sorted into 4 bins of 1.5 standard deviations around their
    mean, the outer two without an end; what travels of a value is its bin, and of a bin the mean of its values. A
    position takes 12 bits in a chunk of 4096, and the selection is a partial sort of each chunk by itself. Biased: use
    error feedback.

    Cost: 14 bits per kept element, for 64 of 4096 1/146 of float32; and 128 bits. Positions take 4 bits for each factor
    of 16 of the chunk, rounded up.

    Args:
        keep: values of a chunk; of the last one, which may be shorter, as many, if it has them.
        chunk: elements of a chunk, at most 65536.

    Raises:
        ConfigurationError: for numbers out of range.

    Example:
        >>> import torch
        >>> chunked = ChunkTopK(keep=2, chunk=4)
        >>> chunked.decompress(chunked.compress(torch.tensor([3.0, 0.1, -1.0, 0.2, 0.0, 3.0, 0.0, -1.0]))).tolist()
        [3.0, 0.0, -1.0, 0.0, 0.0, 3.0, 0.0, -1.0]

    References:
        Sarfi, Therien, Lidin, Belilovsky, *Communication Efficient LLM Pre-training with SparseLoCo*, 2025,
        arXiv:2508.15706.
    """

    keep: int = 64
    chunk: int = 4096

    def __post_init__(self) -> None:
        require_at_least("ChunkTopK", "chunk", self.chunk, 1, 1 << 16)
        require_at_least("ChunkTopK", "keep", self.keep, 1, self.chunk)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, unit=self.chunk, sums_grow=True)

    def error_bound(self, numel: int) -> float:
        r"""Return `1 - (9 / 16) keep / (chunk m)` for m kept values.

        Of them, the one that is farthest from the mean is in a bin whose mean is at least 3/4 of a standard deviation
        away, so that bins lose at most `1 - (9 / 16) / m` of the variance. Gradients are far from this vector.
        """
        kept = self._kept(numel)
        share = min(self.keep, numel) / max(1, min(self.chunk, numel))
        return 1.0 - share * (_BIN_WIDTH / 2) ** 2 / kept if kept > 1 else 1.0 - share

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        kept = self._kept(numel(shape))
        return (
            (torch.float32, _BINS if kept else 0),
            (torch.uint8, packed_bytes(self._digits * kept, 16)),
            (torch.uint8, packed_bytes(kept, _BINS)),
        )

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        kept, digits = self._kept(x.numel()), self._digits
        positions = torch.cat(
            [part.abs().topk(min(self.keep, part.shape[1]), 1).indices.view(-1) for part in self._parts(x)]
        )
        values = x[positions + self._starts(x)].double()
        mean, deviation = values.mean(), values.std(correction=0)
        bins = (
            ((values - mean) / (_BIN_WIDTH * deviation)).nan_to_num_(0.0).add_(_BINS // 2).round_().clamp_(0, _BINS - 1)
        )
        bins = bins.long()
        counts = torch.bincount(bins, minlength=_BINS)
        means = torch.zeros(_BINS, dtype=torch.float64, device=x.device).index_add_(0, bins, values)
        packer = Packer(digits * kept, 16, x.device)
        for digit in range(digits):
            packer.write(digit * kept, positions.bitwise_right_shift(4 * digit).bitwise_and_(15).to(torch.uint8))
        codes = Packer(kept, _BINS, x.device)
        codes.write(0, bins.to(torch.uint8))
        return means.div_(counts.clamp_(min=1)).float(), packer.packed, codes.packed

    def _decode(self, payload: Payload, out: Tensor) -> None:
        means, places, codes = payload.tensors
        kept, digits = self._kept(out.numel()), self._digits
        reader = Unpacker(places, 16, kept)
        positions = self._starts(out)
        for digit in range(digits):
            positions += reader.codes(digit * kept, (digit + 1) * kept).long() << (4 * digit)
        out.zero_()[positions] = means[Unpacker(codes, _BINS, kept).codes(0, kept).long()]

    @property
    def _digits(self) -> int:
        """The half bytes of a position."""
        return max(1, -(-(self.chunk - 1).bit_length() // 4))

    def _kept(self, numel: int) -> int:
        whole, rest = divmod(numel, self.chunk)
        return whole * self.keep + min(self.keep, rest)

    def _parts(self, x: Tensor) -> list[Tensor]:
        """Return the whole chunks as rows, and the last one that is shorter; those that there are."""
        whole = x.numel() // self.chunk * self.chunk
        parts = [x[:whole].view(-1, self.chunk), x[whole:].view(1, -1)]
        return [part for part in parts if part.numel()]

    def _starts(self, x: Tensor) -> Tensor:
        """Tell where the chunk of each kept value begins."""
        kept = torch.arange(self._kept(x.numel()), device=x.device)
        return kept // self.keep * self.chunk
