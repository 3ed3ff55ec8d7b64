"""BatchNorm's running statistics of all workers, stacked, as ``buffers="gossip"`` averages them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def running_statistics(matrix: Callable[[int], tuple[Tensor, bool]], inputs: Sequence[Sequence[Tensor]]) -> Tensor:
    """[steps, workers, mean and variance of 4 features, and 2 numbers that approach the rank].

    ``matrix`` tells of a step what multiplies the statistics, and whether also what the forward pass changes.
    """
    workers = len(inputs[0])
    now = torch.cat([torch.zeros(workers, 4), torch.ones(workers, 4), torch.zeros(workers, 2)], dim=1).double()
    rank = torch.arange(workers, dtype=torch.float64)[:, None].expand(-1, 2)
    found = []
    for step, batches in enumerate(inputs):
        seen = torch.stack([torch.cat([batch.mean(0), batch.var(0)]) for batch in batches])
        change = 0.1 * (torch.cat([seen, rank], dim=1) - now)
        weights, multiplied = matrix(step)
        now = weights @ (now + change) if multiplied else weights @ now + change
        found.append(now)
    return torch.stack(found)
