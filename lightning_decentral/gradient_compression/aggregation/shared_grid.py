"""Whole numbers on a scale that all workers share are added on their way (scaler sharing)."""

from __future__ import annotations

import torch

from lightning_decentral.compression.grid import AbstractGrid
from lightning_decentral.gradient_compression.finite import is_finite, is_set
from lightning_decentral.gradient_compression.requests import AllReduce
from lightning_decentral.gradient_compression.step import Exchange


async def shared_grid(exchange: Exchange, grid: AbstractGrid) -> None:
    """Average what all workers round to whole multiples of one scale, the largest of theirs."""
    step, x, measuring = exchange.step, exchange.x, exchange.step.measuring
    generator = exchange.generator(grid)
    with measuring.timed("compress"):
        wide = x.float()
        scale = grid.scales(wide)
        if not is_finite(wide):
            exchange.blame_what_is_not_finite()
            scale.fill_(torch.inf)  # so that all workers know
    await AllReduce([scale], largest=True)
    if is_set(scale.isinf()):
        exchange.refuse()
        return
    with measuring.timed("compress"):
        packed = grid.encode_shared(wide, scale, step.workers, generator)
        if measuring.everything:
            own = torch.empty_like(wide)
            grid.decode_own(packed, scale, step.workers, own)
            measuring.compare(None, wide, own)
    await AllReduce([packed])
    with measuring.timed("decompress"):
        grid.decode_sum(packed, scale, step.workers, wide)
        x.copy_(wide)
