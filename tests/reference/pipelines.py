"""Delayed updates of a chain of tanh layers, stage by stage, in torch alone: what every schedule without micro-batches
must equal. A stage is one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def delayed(
    weights: Sequence[Tensor], data: Sequence[Tensor], rate: float, lags: Sequence[int], replays: bool
) -> list[Tensor]:
    """The weights after all batches, drained.

    Stage k makes its update number n with batch n, once it has forwarded batch n + lag_k: so it forwards batch n with
    the weights after max(0, n - lag_k) updates. A gradient is taken at the weights of now (``replays``), or at those.
    """
    stages = len(lags)
    versions = [[(weights[2 * k], weights[2 * k + 1])] for k in range(stages)]  # [stage][updates]: weight and bias

    def layer(k: int, version: int, x: Tensor) -> Tensor:
        weight, bias = versions[k][version]
        return torch.tanh(x @ weight.T + bias)

    for n in range(len(data)):  # batch n changes every stage before a later batch does: its inputs exist by then
        inputs = [data[n]]
        for k in range(stages):
            inputs.append(layer(k, max(0, n - lags[k]), inputs[-1]))
        error = 2 * inputs[-1] / inputs[-1].numel()
        for k in reversed(range(stages)):
            x = inputs[k].detach().requires_grad_()
            weight, bias = (v.detach().requires_grad_() for v in versions[k][n if replays else max(0, n - lags[k])])
            output = torch.tanh(x @ weight.T + bias)
            error, by_weight, by_bias = torch.autograd.grad(output, [x, weight, bias], error)
            new, old = (by_weight, by_bias), versions[k][n]
            versions[k].append((old[0] - rate * new[0], old[1] - rate * new[1]))
    return [value.detach() for k in range(stages) for value in versions[k][-1]]
