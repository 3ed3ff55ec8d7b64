"""PowerSGD: a matrix of low rank, by one step of power iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.tiles import unless_infinite
from lightning_decentral.compression.validation import require_at_least


@final
@dataclass(frozen=True)
class PowerSGD(AbstractCompressor):
    r"""The vector as a matrix `M`, and of that the projection on `r` directions: `C(M) = P (M^T P)^T`, `P = orth(M Q)`.

    A tensor of two and more dimensions is the matrix of its first dimension by all others; a flat vector becomes the
    squarest matrix. `compress` draws `Q` at random. In training one starts from the last step's result instead, which
    makes one step of power iteration enough, and both products are *linear* in `M`, so that they can be all-reduced:

        P <- mean of left(M, Q);  P <- orthogonalize(P);  Q <- mean of right(M, P);  use product(P, Q)

    with the same `Q` on all workers to begin with (`start`, from a shared generator). The residual to remember is the
    worker's own, `M - product(P, right(M, P))`; with the mean in its place it would grow with the distance between the
    workers' gradients. Biased: use error feedback.

    Cost: `32 r (a + b)` bits for a matrix of a rows and b columns; `4 r a b` operations. At full rank it is exact.

    Args:
        rank: `r`, at least 1. The paper has 1 to 4; where a matrix has fewer rows or columns, as many as it has.

    Raises:
        ConfigurationError: for a rank that is no positive number.

    Example:
        >>> import torch
        >>> powersgd = PowerSGD(rank=1)
        >>> matrix = torch.outer(torch.arange(5.0), torch.ones(8))
        >>> payload = powersgd.compress(matrix, torch.Generator().manual_seed(0))
        >>> torch.allclose(powersgd.decompress(payload), matrix, atol=1e-5), payload.num_bits
        (True, 416)

    References:
        Vogels, Karimireddy, Jaggi, *PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization*,
        NeurIPS 2019, arXiv:1905.13727.
    """

    _may_overflow = True

    rank: int = 4

    def __post_init__(self) -> None:
        require_at_least("PowerSGD", "rank", self.rank, 1)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, randomness="own", sums_grow=True)

    def error_bound(self, numel: int) -> float:
        """Return `1 - r / min(a, b)` of the squarest matrix, in expectation: `P` prefers the large directions.

        A matrix that is not square has a smaller one.
        """
        rows, columns = self.matrix_shape((numel,))
        return max(0.0, 1.0 - self.rank / max(1, min(rows, columns)))

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        rows, columns = self.matrix_shape(shape)
        rank = min(self.rank, rows, columns)
        return ((torch.float32, rank * rows), (torch.float32, rank * columns))

    def matrix_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the matrix that a tensor of this shape is seen as."""
        n = numel(shape)
        if n == 0:
            return 0, 0
        if len(shape) >= 2:
            return shape[0], n // shape[0]
        rows = isqrt(n - 1) + 1
        return rows, -(-n // rows)

    def start(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Return a random `Q` [columns, rank] for a tensor of this shape, on the generator's device."""
        rows, columns = self.matrix_shape(shape)
        return torch.randn(columns, min(self.rank, rows, columns), generator=generator, device=generator.device)

    def left(self, x: Tensor, right: Tensor) -> Tensor:
        """Return `M Q` [rows, rank], which is linear in ``x``."""
        return self._matrix(x) @ right

    def right(self, x: Tensor, left: Tensor) -> Tensor:
        """Return `M^T P` [columns, rank]. Linear in ``x``."""
        return self._matrix(x).t() @ left

    def product(self, left: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
        """Return `P Q^T` as a float32 tensor of this shape."""
        return (left @ right.t()).view(-1)[: numel(shape)].view(tuple(shape))

    def _matrix(self, x: Tensor) -> Tensor:
        rows, columns = self.matrix_shape(x.shape)
        flat = x.detach().reshape(-1).float()
        missing = rows * columns - flat.numel()
        return (torch.cat([flat, flat.new_zeros(missing)]) if missing else flat).view(rows, columns)

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        assert generator is not None
        matrix = self._matrix(x.view(shape))
        left = orthogonalize(matrix @ self.start(shape, generator).to(x.device))
        right = matrix.t() @ left
        most = right.abs().sum(1, keepdim=True, dtype=torch.float64)  # of their product: P has no value above 1
        return left.reshape(-1), unless_infinite(right, most.float()).reshape(-1)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        left, right = payload.tensors
        rows, columns = self.matrix_shape(payload.shape)
        result = self.product(left.view(rows, -1), right.view(columns, -1), payload.shape)
        out.copy_(result.view(-1))


def orthogonalize(left: Tensor) -> Tensor:
    """Orthonormal columns that span the same space, by Householder reflections: stable where columns nearly agree."""
    basis: Tensor = torch.linalg.qr(left).Q
    return basis
