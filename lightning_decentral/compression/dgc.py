"""Deep gradient compression: top-k of a momentum that is accumulated until it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits, numel
from lightning_decentral.compression.sparse import (
    kept,
    largest_positions,
    sparse_fields,
    sparse_tensors,
    values_and_positions,
    write_sparse,
)
from lightning_decentral.compression.validation import require_at_least, require_positive, require_ratio
from lightning_decentral.errors import ConfigurationError


@final
@dataclass(frozen=True)
class DGC(AbstractCompressor):
    r"""Deep gradient compression's sparsification: the 0.1 % largest values, with a warm-up of denser epochs.

    The operator is that of `TopK`. What makes the method is what it is applied to: a velocity `u` with momentum,
    added up in `v` until it is sent (`accumulate`), both set to zero where it was (`clear_sent`, "momentum factor
    masking"):

        u <- m u + g;   v <- v + u;   send C(v);   u, v <- 0 at the positions sent

    At ratio 1 everything is always sent, so `u` would be cleared in every step and there would be no momentum at all:
    `clear_sent` then leaves `u`.

    Cost: 64 bits per kept element of a float32 vector. Memory, of the user: `u` and `v`, two copies of the vector.

    `compress` is the sparsification alone. `momentum`, `nesterov` and `clip` are for who applies it to gradients:
    `GradientCompression` does, for all parameters, so that the optimizer must have no momentum of its own.

    Args:
        ratio: share of the elements to keep after the warm-up; the paper has 0.001.
        warm_up: ratios of the first epochs; the paper's.
        momentum: of the velocity, in [0, 1); the paper's 0.9. With 0 the optimizer applies its own to the mean.
        nesterov: whether it is Nesterov's.
        clip: the largest norm of a parameter's gradient, of one worker, times the square root of the number of
            workers; ``None``: no clipping.

    Raises:
        ConfigurationError: for a number out of range.

    Example:
        >>> import torch
        >>> dgc, u, v = DGC(ratio=0.5), torch.zeros(2), torch.zeros(2)
        >>> dgc.accumulate(u, v, torch.tensor([1.0, 3.0]), momentum=0.9)
        >>> payload = dgc.compress(v)
        >>> dgc.clear_sent(payload, u, v)
        >>> dgc.decompress(payload).tolist(), v.tolist()
        ([0.0, 3.0], [1.0, 0.0])

    References:
        Lin, Han, Mao, Wang, Dally, *Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed
        Training*, ICLR 2018, arXiv:1712.01887.
    """

    ratio: float = 0.001
    warm_up: tuple[float, ...] = (0.25, 0.0625, 0.015625, 0.004)
    momentum: float = 0.9
    nesterov: bool = False
    clip: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.warm_up, tuple):
            raise ConfigurationError(
                f"DGC got warm_up={self.warm_up!r}, needs a tuple of ratios, one for each epoch. Write (0.25, 0.0625)."
            )
        for ratio in (self.ratio, *self.warm_up):
            require_ratio("DGC", ratio)
        if isinstance(self.momentum, bool) or not isinstance(self.momentum, int | float) or not 0 <= self.momentum < 1:
            raise ConfigurationError(
                f"DGC got momentum={self.momentum!r}, needs a number in [0, 1). Use the paper's 0.9, or 0.0 for none."
            )
        if self.clip is not None:
            require_positive("DGC", "clip", self.clip)

    @property
    def traits(self) -> Traits:
        return Traits(unbiased=False, keeps_dtype=True, sums_grow=True)

    def error_bound(self, numel: int) -> float:
        """Return `1 - k / n`, as for `TopK`."""
        return 1.0 - kept(numel, self.ratio) / max(1, numel)

    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        return sparse_fields(kept(numel(shape), self.ratio), dtype)

    def at_epoch(self, epoch: int) -> DGC:
        """Return the compressor of an epoch: of a denser ratio during the warm-up."""
        require_at_least("DGC.at_epoch", "epoch", epoch, 0)
        return replace(self, ratio=(*self.warm_up, self.ratio)[min(epoch, len(self.warm_up))], warm_up=())

    def accumulate(
        self, velocity: Tensor, residual: Tensor, gradient: Tensor, momentum: float, nesterov: bool = False
    ) -> None:
        """Do `u <- m u + g; v <- v + u`, in place; with Nesterov's momentum `u <- m (u + g); v <- v + u + g`."""
        if nesterov:
            velocity.add_(gradient).mul_(momentum)
            residual.add_(velocity).add_(gradient)
        else:
            velocity.mul_(momentum).add_(gradient)
            residual.add_(velocity)

    def clear_sent(self, payload: Payload, velocity: Tensor, residual: Tensor) -> None:
        """Set both to zero, in place, where the message has a value; both contiguous. At ratio 1 only the residual."""
        _, positions = values_and_positions(payload.tensors)
        residual.view(-1)[positions] = 0.0
        if positions.numel() < residual.numel():
            velocity.view(-1)[positions] = 0.0

    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        return sparse_tensors(x, largest_positions(x, kept(x.numel(), self.ratio)))

    def _decode(self, payload: Payload, out: Tensor) -> None:
        write_sparse(payload.tensors, out)
