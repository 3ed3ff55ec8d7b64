"""One bit per value: scaled sign, sign with a majority vote, and 1-bit SGD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.binary import pack_signs, unpack_levels
from lightning_decentral.compression.packing import packed_bytes
from lightning_decentral.compression.tiles import (
    Scratch,
    column_of,
    num_buckets,
    per_bucket,
    rows_of,
    sizes_of_buckets,
    sums_of_magnitudes,
    tiles,
    unless_infinite,
)
from lightning_decentral.compression.validation import require_bucket
from lightning_decentral.errors import CompressionError


@final
@dataclass(frozen=True)
class ScaledSign(AbstractCompressor):
    r"""The signs, and the mean magnitude: `C(x) = (||x||_1 / n) sign(x)`, with `sign(0) = 1`, for -0.0 too.

    The error is exactly `1 - ||x||_1^2 / (n ||x||_2^2)` of `||x||^2`: a third for Gaussian values, nearly everything
    for a sparse vector. With `||x||_2 / sqrt(n)` as the scale, as DeepSpeed has it, it could be twice `||x||^2`, so
    that error feedback would not converge. Biased: use error feedback.

    Cost: 1 bit per element and 32 per bucket.

    Args:
        bucket: elements that share a scale; ``None``, the paper's, is one for the whole tensor.

    Raises:
        ConfigurationError: for a bucket that is no positive number.

    Example:
        >>> import torch
        >>> sign = ScaledSign()
        >>> sign.decompress(sign.compress(torch.tensor([1.0, -2.0, 0.0, 5.0]))).tolist()
        [2.0, -2.0, 2.0, 2.0]

    References:
        Karimireddy, Rebjock, Stich, Jaggi, *Error Feedback Fixes SignSGD and other Gradient Compression Schemes*, ICML
        2019, arXiv:1901.09847.
    """

    _shows_what_is_not_finite = True  # in the mean magnitudes

    bucket: int | None = None

    def __post_init__(self) -> None:
        require_bucket("ScaledSign", self.bucket)

    @torch.no_grad()
    def subtract_(self, payload: Payload, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float32 or payload.dtype != torch.float32:  # its signs need not be those of the message
            return super().subtract_(payload, x, scratch)
        flat, twice = x.view(-1), 2 * payload.tensors[0]
        decoded = Scratch(flat, torch.float32)
        for tile in tiles(flat, self.bucket):
            values = rows_of(flat, tile)
            half_signs = torch.ge(values, 0.0, out=decoded[0, tile]).sub_(0.5)
            values.addcmul_(half_signs, column_of(twice, tile), value=-1.0)
        return x

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, unit=self.bucket or 8)  # whole bytes

    def error_bound(self, numel: int) -> float:
        """Return `1 - 1 / d` for buckets of d elements; exactly `1 - ||x||_1^2 / (d ||x||_2^2)`."""
        width = numel if self.bucket is None else min(self.bucket, numel)
        return 1.0 - 1.0 / max(1, width)

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n = numel(shape)
        return ((torch.float32, num_buckets(n, self.bucket)), (torch.uint8, packed_bytes(n, 2)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        sizes = sizes_of_buckets(x.numel(), self.bucket, x.device)
        scale = (sums_of_magnitudes(x, self.bucket) / sizes).float()
        return unless_infinite(scale, 2 * scale), pack_signs(x)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        scale, signs = payload.tensors
        unpack_levels(signs, scale, -scale, self.bucket, out)


@final
@dataclass(frozen=True)
class SignSGD(AbstractCompressor):
    r"""The signs alone: `C(x) = sign(x)`, 1 or -1, with `sign(0) = 1`, for -0.0 too; `majority_vote` combines those of
    all workers.

    Not an approximation of `x` in any norm: the learning rate has to make up for the lost scale, and error feedback
    does not work with it (use `ScaledSign`). With a majority vote over workers with equal data it converges, and a
    minority of liars cannot stop it; with unequal data it may not converge at all.

    Cost: 1 bit per element.

    Example:
        >>> import torch
        >>> votes = [SignSGD().compress(torch.tensor(v)) for v in ([1.0, -3.0], [2.0, 0.5], [-1.0, -0.1])]
        >>> SignSGD().decompress(majority_vote(votes)).tolist()
        [1.0, -1.0]

    References:
        Bernstein, Wang, Azizzadenesheli, Anandkumar, *signSGD: Compressed Optimisation for Non-Convex Problems*, ICML
        2018, arXiv:1802.04434; the vote also in *signSGD with Majority Vote is Communication Efficient and Fault
        Tolerant*, ICLR 2019, arXiv:1810.05291.
    """

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, unit=8)  # whole bytes

    def error_bound(self, numel: int) -> float:
        """Infinite: a small vector becomes a long one."""
        return torch.inf

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return ((torch.uint8, packed_bytes(numel(shape), 2)),)

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        return (pack_signs(x),)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        one = torch.ones(1, device=out.device)
        unpack_levels(payload.tensors[0], one, -one, None, out)


def majority_vote(payloads: Sequence[Payload]) -> Payload:
    """Tell what most workers say about each sign, as a message of the same kind; a tie is +1.

    Args:
        payloads: messages of `SignSGD`, of at most 127 workers.

    Raises:
        CompressionError: for no message, or too many.
    """
    if not 1 <= len(payloads) <= 127:
        raise CompressionError(f"majority_vote got {len(payloads)} messages, needs 1 to 127. Vote in groups.")
    packed = [payload.tensors[0] for payload in payloads]
    result = torch.zeros_like(packed[0])
    for bit in range(8):
        votes = sum((((one >> bit) & 1) for one in packed), torch.zeros_like(packed[0]))
        result |= (2 * votes >= len(packed)).to(torch.uint8) << bit
    return payloads[0].replace([result])


@final
@dataclass(frozen=True)
class OneBitSGD(AbstractCompressor):
    r"""The signs, and two levels: the mean of the values that are not negative, and the mean of those that are.

    C(x) = mean(x; x >= 0) where x >= 0, mean(x; x < 0) elsewhere

    The best two levels for a threshold at 0, which -0.0 is too; its error is never larger than that of `ScaledSign`.
    Biased: use error feedback.

    Cost: 1 bit per element and 64 per bucket.

    Args:
        bucket: elements that share the two levels; ``None`` for all. The paper has one pair for each column of a
            weight matrix.

    Raises:
        ConfigurationError: for a bucket that is no positive number.

    Example:
        >>> import torch
        >>> onebit = OneBitSGD()
        >>> onebit.decompress(onebit.compress(torch.tensor([1.0, -2.0, 3.0, -4.0]))).tolist()
        [2.0, -3.0, 2.0, -3.0]

    References:
        Seide, Fu, Droppo, Li, Yu, *1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed
        Training of Speech DNNs*, Interspeech 2014.
    """

    _shows_what_is_not_finite = True  # in the levels

    bucket: int | None = 2048

    def __post_init__(self) -> None:
        require_bucket("OneBitSGD", self.bucket)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, unit=self.bucket or 1)

    def error_bound(self, numel: int) -> float:
        """Return `1 - 1 / d` for buckets of d elements, as for `ScaledSign`, which is never better."""
        width = numel if self.bucket is None else min(self.bucket, numel)
        return 1.0 - 1.0 / max(1, width)

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        n, buckets = numel(shape), num_buckets(numel(shape), self.bucket)
        return ((torch.float32, buckets), (torch.float32, buckets), (torch.uint8, packed_bytes(n, 2)))

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        above, below, negative = self._sums(x, torch.float32)
        if bool((above - below).isinf().any()):  # of large values, which float64 can add
            above, below, negative = self._sums(x, torch.float64)
        sizes = sizes_of_buckets(x.numel(), self.bucket, x.device)
        high = (above / (sizes - negative).clamp_(min=1.0)).float()
        low = (below / negative.clamp(min=1.0)).float()
        return unless_infinite(high, high - low), low, pack_signs(x)

    def _sums(self, x: Tensor, within_tiles: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Give of every bucket the sum of the values above zero, of those below, and how many are below; in float64."""
        above, below, negative = (per_bucket(x, self.bucket).double() for _ in range(3))
        scratch = Scratch(x, torch.float32)
        for tile in tiles(x, self.bucket):
            values, work = rows_of(x, tile), scratch[0, tile]
            for sums, limits in ((above, {"min": 0.0}), (below, {"max": 0.0})):
                part = torch.clamp(values, **limits, out=work).sum(1, keepdim=True, dtype=within_tiles)
                column_of(sums, tile).add_(part)
            column_of(negative, tile).add_(torch.lt(values, 0.0, out=work).sum(1, keepdim=True))
        return above, below, negative

    def _decode(self, payload: Payload, out: Tensor) -> None:
        high, low, signs = payload.tensors
        unpack_levels(signs, high, low, self.bucket, out)
