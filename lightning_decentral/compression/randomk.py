"""Elements chosen at random, the same ones on all workers, so that positions need not be sent and values can be
added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from random import Random
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.sparse import kept
from lightning_decentral.compression.validation import require_one_of, require_ratio


@dataclass(frozen=True)
class _AbstractRandom(AbstractCompressor):
    """A share of the elements, chosen by a seed that all workers have."""

    _may_overflow = True  # scaled

    ratio: float = 0.01
    scaled: bool = False

    def __post_init__(self) -> None:
        require_ratio(type(self).__name__, self.ratio)
        require_one_of(type(self).__name__, "scaled", self.scaled, (True, False))

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=self.scaled, linear=True, randomness="shared", keeps_dtype=True)

    def error_bound(self, numel: int) -> float:
        """Return `1 - k / n`; scaled `n / k - 1`. Exact, in expectation."""
        if not numel:
            return 0.0
        share = kept(numel, self.ratio) / numel
        return 1.0 / share - 1.0 if self.scaled else 1.0 - share

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return ((dtype, kept(numel(shape), self.ratio)),)


@final
@dataclass(frozen=True)
class RandomK(_AbstractRandom):
    r"""k elements chosen at random; everything else is 0. All workers choose the same.

    As it is, a contraction: `E ||C(x) - x||^2 = (1 - k / n) ||x||^2`, for error feedback. *Scaled* by `n / k` it is
    unbiased, with an error of `(n / k - 1) ||x||^2`: 99 times the vector at 1 %.

    The positions are `(a j + b) mod n` for `j = 0 ... k - 1`, with `b` random and `a` random without a common divisor
    with n: all different, each with probability `k / n`, and on every device the same. They are not independent,
    which neither of the two constants needs.

    Cost: 32 bits per kept element of a float32 vector: no positions. The messages of several workers can be added by an
    all-reduce.

    Args:
        ratio: share of the elements to keep, in (0, 1]; at least one is kept.
        scaled: unbiased.

    Raises:
        ConfigurationError: for a ratio out of range.

    Example:
        >>> import torch
        >>> randomk = RandomK(ratio=0.5)
        >>> payload = randomk.compress(torch.ones(10), torch.Generator().manual_seed(0))
        >>> randomk.decompress(payload).sum().item(), payload.num_bits
        (5.0, 160)

    References:
        Stich, Cordonnier, Jaggi, *Sparsified SGD with Memory*, NeurIPS 2018, arXiv:1809.07599. Wangni, Wang, Liu,
        Zhang, *Gradient Sparsification for Communication-Efficient Distributed Optimization*, NeurIPS 2018,
        arXiv:1710.09854.
    """

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        count = kept(x.numel(), self.ratio)
        values = x[_positions(x.numel(), count, seed, x.device)]
        return (values.mul_(x.numel() / count) if self.scaled else values,)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        (values,) = payload.tensors
        out.zero_().scatter_(0, _positions(out.numel(), values.numel(), payload.seed, out.device), values)


@final
@dataclass(frozen=True)
class RandomBlock(_AbstractRandom):
    r"""k elements in a row, from a random place on and around the end; everything else is 0. All workers choose the
    same.

    `RandomK` with the same constants, as every element is in with probability `k / n`, and faster: nothing is gathered.
    Successive messages hit whole layers, so error feedback's memory is emptied unevenly.

    Cost: 32 bits per kept element of a float32 vector. The messages of several workers can be added by an all-reduce.

    Args:
        ratio: share of the elements to keep, in (0, 1]; at least one is kept.
        scaled: multiply by `n / k`: unbiased.

    Raises:
        ConfigurationError: for a ratio out of range.

    Example:
        >>> import torch
        >>> block = RandomBlock(ratio=0.25)
        >>> payload = block.compress(torch.arange(8.0), torch.Generator().manual_seed(0))
        >>> int(block.decompress(payload).count_nonzero()) in (1, 2), payload.num_bits
        (True, 64)

    References:
        The "unified random sparsified block" (URSB) of Xu, Huang, *Detached Error Feedback for Distributed SGD with
        Random Sparsification*, ICML 2022, arXiv:2004.05298; also in Xie, Zheng, Koyejo, Gupta, Li, Lin, *CSER:
        Communication-efficient SGD with Error Reset*, NeurIPS 2020, arXiv:2007.13221.
    """

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        count, start = kept(x.numel(), self.ratio), seed % x.numel()
        values = torch.cat([x[start : start + count], x[: max(0, start + count - x.numel())]])
        return (values.mul_(x.numel() / count) if self.scaled else values,)

    def _decode(self, payload: Payload, out: Tensor) -> None:
        (values,) = payload.tensors
        start = payload.seed % out.numel()
        first = min(values.numel(), out.numel() - start)
        out.zero_()[start : start + first] = values[:first]
        out[: values.numel() - first] = values[first:]


def _positions(numel: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return ``count`` different positions, the same ones wherever the seed is the same."""
    random = Random(seed)
    first, step = random.randrange(numel), random.randrange(1, numel + 1)
    while gcd(step, numel) != 1:
        step = random.randrange(1, numel + 1)
    return torch.arange(count, device=device).mul_(step).add_(first).remainder_(numel)
