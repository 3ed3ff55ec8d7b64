"""An all-reduce: of gradients as they are, and of messages that can be added."""

from __future__ import annotations

import torch

from lightning_decentral.gradient_compression.finite import is_finite
from lightning_decentral.gradient_compression.requests import AllReduce
from lightning_decentral.gradient_compression.step import Exchange


async def as_it_is(exchange: Exchange) -> None:
    """Average the gradients by DDP's arithmetic: a whole bucket has the bits that DDP would give."""
    step, x = exchange.step, exchange.x
    await AllReduce([x.mul_(1.0 / step.workers)])
    if not is_finite(x):
        step.refused = True
        exchange.blame_what_is_not_finite()


async def of_messages(exchange: Exchange) -> None:
    """Average messages of a linear compressor on their way, and decode the mean."""
    step, compressor = exchange.step, exchange.compressor
    with step.measuring.timed("compress"):
        payload, _, bad = exchange.message(compressor)
        for tensor in payload.tensors:
            tensor.fill_(torch.nan) if bad else tensor.div_(step.workers)  # before the sum: half precision
    await AllReduce(payload.tensors)
    with step.measuring.timed("decompress"):
        if all(is_finite(tensor) for tensor in payload.tensors):
            compressor.decompress(payload, out=exchange.x)
        else:
            exchange.refuse()
