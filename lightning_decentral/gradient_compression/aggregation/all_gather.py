"""All messages go to all workers, and everybody decodes and averages them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_decentral.compression import AbstractCompressor, ErrorFeedback, Payload
from lightning_decentral.gradient_compression.finite import is_set
from lightning_decentral.gradient_compression.requests import AllGather, AllGatherNumber
from lightning_decentral.gradient_compression.step import Exchange


async def all_gather(exchange: Exchange) -> None:
    """Average what all workers' messages stand for. The last byte of each says whether its gradient is not finite."""
    step, compressor = exchange.step, exchange.compressor
    with step.measuring.timed("compress"):
        payload, sent, bad = exchange.message(compressor)
        status = torch.tensor([bad], dtype=torch.uint8, device=exchange.x.device)
        message = torch.cat([*(tensor.view(torch.uint8) for tensor in payload.tensors), status])
    sizes = [message.numel()] * step.workers
    if not compressor.traits.fixed_size:
        sizes = await AllGatherNumber(message.numel())
        message = torch.cat([message, message.new_zeros(max(sizes) - message.numel())])
    rows = await AllGather(message)
    with step.measuring.timed("decompress"):
        if is_set(torch.stack([row[size - 1] for row, size in zip(rows, sizes, strict=True)])):
            exchange.refuse()
        else:
            messages = [row[: size - 1] for row, size in zip(rows, sizes, strict=True)]
            _average(exchange, compressor, payload, sent, messages)


def _average(
    exchange: Exchange, compressor: AbstractCompressor, own: Payload, sent: Tensor | None, messages: Sequence[Tensor]
) -> None:
    """Decode all messages in the order of the ranks, so that all workers get the same bits."""
    step, x = exchange.step, exchange.x
    total = torch.zeros(x.shape, dtype=ErrorFeedback.dtype_of(x.dtype), device=x.device)
    for rank, message in enumerate(messages):
        if rank == step.rank and sent is not None:
            total.add_(sent, alpha=step.share)
        else:
            payload = compressor.from_buffer(message, own.shape, own.dtype, own.seed)
            total.add_(compressor.decompress(payload, out=x), alpha=step.share)
    x.copy_(total.div_(step.workers * step.share))
