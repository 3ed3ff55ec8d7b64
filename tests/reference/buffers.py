"""BatchNorm's running statistics of all workers, stacked, as ``buffers="gossip"`` averages them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_decentral.algorithms import GossipPGA, HierarchicalGossip, LocalSGD
from lightning_decentral.protocol import AbstractAlgorithm


def matrix(algorithm: AbstractAlgorithm, step: int, workers: int) -> tuple[Tensor, bool]:
    """What multiplies the statistics in a step, and whether what the forward pass changes is multiplied, too."""
    mean = torch.full((workers, workers), 1.0 / workers, dtype=torch.float64)
    if isinstance(algorithm, HierarchicalGossip):
        host = algorithm.workers_per_host
        return torch.kron(algorithm.hosts.mixing_matrix(step), mean[:host, :host] * workers / host), True
    every = algorithm.every if isinstance(algorithm, (LocalSGD, GossipPGA)) else 1
    if isinstance(algorithm, LocalSGD) or not hasattr(algorithm, "topology"):
        return (mean if (step + 1) % every == 0 else torch.eye(workers, dtype=torch.float64)), True
    if isinstance(algorithm, GossipPGA) and (step + 1) % every == 0:
        return mean, True
    return algorithm.graph.mixing_matrix(step), False


def running_statistics(algorithm: AbstractAlgorithm, inputs: Sequence[Sequence[Tensor]]) -> Tensor:
    """[steps, workers, mean and variance of 4 features, and 2 numbers that approach the rank]."""
    workers = len(inputs[0])
    now = torch.cat([torch.zeros(workers, 4), torch.ones(workers, 4), torch.zeros(workers, 2)], dim=1).double()
    rank = torch.arange(workers, dtype=torch.float64)[:, None].expand(-1, 2)
    found = []
    for step, batches in enumerate(inputs):
        seen = torch.stack([torch.cat([batch.mean(0), batch.var(0)]) for batch in batches])
        change = 0.1 * (torch.cat([seen, rank], dim=1) - now)
        weights, multiplied = matrix(algorithm, step, workers)
        now = weights @ (now + change) if multiplied else weights @ now + change
        found.append(now)
    return torch.stack(found)
