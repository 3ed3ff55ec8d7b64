"""DGC's momentum correction: every worker accumulates its own velocity, before anything is compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from lightning_decentral.compression import DGC, AbstractCompressor
from lightning_decentral.gradient_compression.groups import Group


class Velocities:
    """The velocities of all parameters. They change with `commit` only, as memories do.

    The mean of the workers' velocities is the velocity of their mean, so what is not compressed gets ordinary momentum.

    Args:
        dgc: says how; ``None``: there are none, and gradients stay as they are.
        workers: how many.

    Attributes:
        values: by parameter.
        scale: of the loss when they were computed: their unit.
    """

    def __init__(self, dgc: DGC | None, workers: int) -> None:
        self._dgc = dgc if dgc is not None and (dgc.momentum or dgc.clip) else None
        self._workers = workers
        self.values: dict[str, Tensor] = {}
        self.scale = 1.0

    def accelerate(self, names: Sequence[str], gradients: Sequence[Tensor], scale: float) -> dict[str, Tensor]:
        """Clip every gradient, and put in its place what its velocity moves by now.

        Args:
            names: of the parameters.
            gradients: flat; changed in place.
            scale: of the loss.

        Returns:
            The new velocities, by name; empty without momentum.
        """
        dgc = self._dgc
        if dgc is None:
            return {}
        if dgc.clip is not None:
            limit = dgc.clip * scale / sqrt(self._workers)
            for gradient in gradients:
                gradient.mul_((limit / torch.linalg.vector_norm(gradient)).clamp_(max=1.0))
        if not dgc.momentum:
            return {}
        factor = dgc.momentum * scale / self.scale
        new = {}
        for name, gradient in zip(names, gradients, strict=True):
            old = self.values.get(name)
            velocity = gradient.clone() if old is None else torch.add(gradient, old.view_as(gradient), alpha=factor)
            if dgc.nesterov:  # m (m u + g) + g, by torch's convention
                gradient.add_(velocity, alpha=dgc.momentum)
            else:
                gradient.copy_(velocity)
            new[name] = velocity
        return new

    def commit(self, new: Mapping[str, Tensor], frozen: set[str], scale: float) -> None:
        """Take new velocities, but not those of parameters that the step does not change."""
        self.values.update({name: each for name, each in new.items() if name not in frozen})
        self.scale = scale


def mask(
    velocities: Mapping[str, Tensor], group: Group, compressor: AbstractCompressor, sent: Tensor, start: int = 0
) -> None:
    """Let nothing go on from what was sent (momentum factor masking). At ratio 1 there would be no momentum at all.

    Args:
        velocities: of this step; changed in place.
        group: whose elements were sent.
        compressor: of this epoch.
        sent: what the message stands for: the group's elements from ``start`` on.
        start: see ``sent``.
    """
    if not isinstance(compressor, DGC) or compressor.ratio == 1 or not velocities:
        return
    stop = start + sent.numel()
    for name, (first, last) in zip(group.names, group.borders, strict=True):
        low, high = max(first, start), min(last, stop)
        if low < high:
            velocity = velocities[name][low - first : high - first]
            velocity.masked_fill_(sent[low - start : high - start] != 0, 0.0)
