"""The largest values, or those above a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.sparse import (
    kept,
    largest_positions,
    positions_above,
    sparse_fields,
    sparse_tensors,
    write_sparse,
)
from lightning_decentral.compression.validation import require_positive, require_ratio


@final
@dataclass(frozen=True)
class TopK(AbstractCompressor):
    r"""The k values of largest magnitude and where they are; everything else is 0.

    Of all vectors with k non-zero elements the closest one. The error is exactly the part of `||x||^2` that is left
    out: never more than `1 - k / n` of it, and far less for gradients, whose values differ much. Biased: use error
    feedback, without which small coordinates are never updated.

    Cost: 64 bits per kept element of a float32 vector (a value in the vector's dtype, and a position in 32 bits).
    Messages cannot be added: workers keep different positions.

    Args:
        ratio: share of the elements to keep, in (0, 1]; at least one is kept. 0.01 is what the literature on error
            feedback mostly uses.

    Raises:
        ConfigurationError: for a ratio out of range.

    Example:
        >>> import torch
        >>> topk = TopK(ratio=0.5)
        >>> topk.decompress(topk.compress(torch.tensor([1.0, -5.0, 0.5, 2.0]))).tolist()
        [0.0, -5.0, 0.0, 2.0]

    References:
        Stich, Cordonnier, Jaggi, *Sparsified SGD with Memory*, NeurIPS 2018, arXiv:1809.07599. Aji, Heafield, *Sparse
        Communication for Distributed Gradient Descent*, EMNLP 2017, arXiv:1704.05021.
    """

    ratio: float = 0.01

    def __post_init__(self) -> None:
        require_ratio("TopK", self.ratio)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, keeps_dtype=True, sums_grow=True)

    def error_bound(self, numel: int) -> float:
        """Return `1 - k / n`, reached if all magnitudes are equal."""
        return 1.0 - kept(numel, self.ratio) / max(1, numel)

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return sparse_fields(kept(numel(shape), self.ratio), dtype)

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        return sparse_tensors(x, largest_positions(x, kept(x.numel(), self.ratio)))

    def _decode(self, payload: Payload, out: Tensor) -> None:
        write_sparse(payload.tensors, out)


@final
@dataclass(frozen=True)
class Threshold(AbstractCompressor):
    r"""All values of magnitude at least `threshold`, and where they are; everything else is 0.

    The size of a message depends on the vector, so that the receiver has to be told; `num_bits` is the size if all are
    sent. No value is off by more than the threshold. Biased: use error feedback.

    Cost: 64 bits per kept element of a float32 vector.

    Args:
        threshold: in the vector's units.

    Raises:
        ConfigurationError: if it is not positive.

    Example:
        >>> import torch
        >>> payload = Threshold(1.0).compress(torch.tensor([1.0, -5.0, 0.5, 2.0]))
        >>> Threshold(1.0).decompress(payload).tolist(), payload.num_bits
        ([1.0, -5.0, 0.0, 2.0], 192)

    References:
        Strom, *Scalable Distributed DNN Training Using Commodity GPU Cloud Computing*, Interspeech 2015, who sends the
        threshold's sign instead of the value. Dutta, Bergou, Abdelmoniem, et al., *On the Discrepancy between the
        Theoretical Analysis and Practical Implementations of Compressed Communication for Distributed Deep Learning*,
        AAAI 2020, arXiv:1911.08250.
    """

    threshold: float

    def __post_init__(self) -> None:
        require_positive("Threshold", "threshold", self.threshold)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, keeps_dtype=True, fixed_size=False, sums_grow=True)

    def error_bound(self, numel: int) -> float:
        """Return 1: all values may be below the threshold."""
        return 1.0

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return sparse_fields(numel(shape), dtype)

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        return sparse_tensors(x, positions_above(x, self.threshold))

    def _decode(self, payload: Payload, out: Tensor) -> None:
        write_sparse(payload.tensors, out)
