"""Delayed updates of a chain of tanh layers, stage by stage, in torch alone: what every schedule without micro-batches
must equal, with predicted weights and slower rates, too. A stage is one layer.

Stage k makes its update number n with batch n, once it has forwarded batch n + lag_k: so it forwards batch n with the
weights after max(0, n - lag_k) updates, and what ``decay`` makes of them. A gradient is taken at the weights of now
(``replays``), or at those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Layers = Sequence[tuple[Tensor, ...]]
"""Weight and bias of a stage, or what belongs to them, after each update."""


def forwarding(versions: Layers, steps: Layers, n: int, lag: int, decay: float | None) -> tuple[Tensor, ...]:
    """Weight and bias with which a stage forwards batch n."""
    made = max(0, n - lag)
    ahead = 0 if decay is None else n - made
    return tuple(value + ahead * step for value, step in zip(versions[made], steps[made], strict=True))


def backward(x: Tensor, layer: Sequence[Tensor], error: Tensor) -> tuple[Tensor, ...]:
    """The gradients at a layer's input, weight and bias."""
    x, weight, bias = (value.detach().requires_grad_() for value in (x, *layer))
    return torch.autograd.grad(torch.tanh(x @ weight.T + bias), [x, weight, bias], error)


def delayed(
    weights: Sequence[Tensor],
    data: Sequence[Tensor],
    rate: float,
    lags: Sequence[int],
    replays: bool,
    decay: float | None = None,
    slow: int = 0,
) -> list[Tensor]:
    """The weights after all batches, drained."""
    stages = len(lags)
    versions = [[(weights[2 * k], weights[2 * k + 1])] for k in range(stages)]  # [stage][updates]: weight and bias
    steps = [[(torch.zeros_like(w), torch.zeros_like(b))] for ((w, b),) in versions]  # the same: smoothed steps
    for n in range(len(data)):  # batch n changes every stage before a later batch does: its inputs exist by then
        inputs = [data[n]]
        for k in range(stages):
            weight, bias = forwarding(versions[k], steps[k], n, lags[k], decay)
            inputs.append(torch.tanh(inputs[-1] @ weight.T + bias))
        error = 2 * inputs[-1] / inputs[-1].numel()
        for k in reversed(range(stages)):
            layer = versions[k][n] if replays else forwarding(versions[k], steps[k], n, lags[k], decay)
            error, *gradients = backward(inputs[k], layer, error)
            factor = max(1, lags[k]) ** -(1 - min(1.0, n / slow)) if slow else 1.0
            changes = [-rate * factor * gradient for gradient in gradients]
            versions[k].append(tuple(v + change for v, change in zip(versions[k][n], changes, strict=True)))
            old = zip(steps[k][n], changes, strict=True)
            steps[k].append(tuple((decay or 0) * step + (1 - (decay or 0)) * change for step, change in old))
    return [value.detach() for k in range(stages) for value in versions[k][-1]]
