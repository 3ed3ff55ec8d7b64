"""A heterogeneous-curvature quadratic: ``f_i(x) = sum_k a[i, k] (x_k - b[i, k])^2 / 2``.

Equal curvature would hide the bias of D-PSGD: the mean would be exact. Each worker has its own ``a``.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Quadratic:
    def __init__(self, workers: int, parameters: int = 5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (workers, parameters)
        self.a = 0.5 + 1.5 * torch.rand(shape, generator=generator, dtype=torch.float64)
        self.b = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.start = torch.randn(shape, generator=generator, dtype=torch.float64)

    def gradient(self, x: Tensor, rank: int | None = None) -> Tensor:
        """All workers' gradients of stacked ``x`` [workers, parameters], or one worker's of its own ``x``."""
        return self.a * (x - self.b) if rank is None else self.a[rank] * (x - self.b[rank])

    @property
    def optimum(self) -> Tensor:
        return (self.a * self.b).sum(0) / self.a.sum(0)
