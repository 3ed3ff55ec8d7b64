"""Vectors of all workers on worker 0, for a checkpoint, and of a checkpoint for this worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def collected(own: Mapping[str, Tensor], every_worker: bool) -> list[dict[str, Tensor]]:
    """Bring all workers' vectors to worker 0. All workers call this together.

    Args:
        own: this worker's, by name; of the same names, sizes and dtypes on all.
        every_worker: each worker's; otherwise their mean alone.

    Returns:
        One dictionary for each worker, or for the mean, on the CPU; on the others they are empty.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    found: list[dict[str, Tensor]] = [{} for _ in range(workers if every_worker else 1)]
    for dtype in sorted({vector.dtype for vector in own.values()}, key=str):
        names = [name for name, vector in own.items() if vector.dtype == dtype]
        sizes = [own[name].numel() for name in names]
        flat = torch.cat([own[name].reshape(-1) for name in names])
        if not every_worker:
            dist.all_reduce(flat)
            flat /= workers
        for source, vectors in enumerate(found):
            if source and rank == source:
                dist.send(flat, 0)
            elif source and rank == 0:
                dist.recv(flat, source)
            if rank == 0:
                parts = torch.split(flat.to("cpu", copy=True), sizes)
                vectors.update((name, part.clone()) for name, part in zip(names, parts, strict=True))
    return found


def share_of(saved: Sequence[Mapping[str, Tensor]], name: str, rank: int, same: bool) -> Tensor:
    """Give this worker its own vector, or the mean of all where there were not as many workers.

    Args:
        saved: what `collected` gave.
        name: of the vector.
        rank: this worker's.
        same: whether there are as many vectors as workers.
    """
    return saved[rank][name] if same else torch.stack([each[name] for each in saved]).mean(0)
