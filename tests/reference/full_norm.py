"""Full Normalization as its formulas say it, sample by sample sums in float64, with neither kernels nor autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Reference:
    """One layer on ``[samples, channels]``; its four estimates are attributes."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, a: Callable[[int], float], b: Callable[[int], float]):
        self.weight, self.bias, self.eps, self.a, self.b = weight, bias, eps, a, b
        self.mean = self.gradient = self.correlation = torch.zeros_like(weight)
        self.square = torch.ones_like(weight)
        self.t = 0

    def forward(self, x: Tensor) -> Tensor:
        self.t += 1
        a = 1.0 if self.t == 1 else self.a(self.t)
        self.mean = (1 - a) * self.mean + a * x.mean(0)
        self.square = (1 - a) * self.square + a * (x * x).mean(0)
        self.std = ((self.square - self.mean**2).clamp(min=0) + self.eps).sqrt()
        self.y = (x - self.mean) / self.std
        return self.weight * self.y + self.bias

    def backward(self, output_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by the input, the weight and the bias."""
        b, delta = self.b(self.t), self.weight * output_gradient
        self.gradient = (1 - b) * self.gradient + b * delta.sum(0)
        self.correlation = (1 - b) * self.correlation + b * (delta * self.y).sum(0)
        x_gradient = (delta - (self.gradient + self.y * self.correlation) / len(delta)) / self.std
        return x_gradient, (output_gradient * self.y).sum(0), output_gradient.sum(0)
