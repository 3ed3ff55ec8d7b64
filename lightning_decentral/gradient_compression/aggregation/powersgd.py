"""One step of power iteration on the mean of the workers' matrices, by two all-reduces of its factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_decentral.compression import PowerSGD, orthogonalize
from lightning_decentral.gradient_compression.finite import is_finite
from lightning_decentral.gradient_compression.requests import AllReduce
from lightning_decentral.gradient_compression.step import Exchange, mixed


async def power_iteration(exchange: Exchange, powersgd: PowerSGD) -> None:
    """Replace every gradient by the product of two factors, averaged over the workers one after the other."""
    step, group, x, gradients = exchange.step, exchange.group, exchange.x, exchange.gradients
    with step.measuring.timed("compress"):
        values = x if group.memory is None else group.memory.add(x, exchange.factor)
        matrices = _matrices(exchange, values)
        starts = [_start(exchange, powersgd, place) for place in range(len(gradients))]
        flat, lefts = _packed(
            [powersgd.left(matrix, start) for matrix, start in zip(matrices, starts, strict=True)], step.workers
        )
    await AllReduce([flat])
    if not is_finite(flat):  # on all workers, so that nobody waits for the second half
        exchange.blame_what_is_not_finite()
        exchange.refuse()
        return
    with step.measuring.timed("compress"):
        lefts = [orthogonalize(left) for left in lefts]
        own = [powersgd.right(matrix, left) for matrix, left in zip(matrices, lefts, strict=True)]
        _remember(exchange, powersgd, lefts, own)
        flat, rights = _packed(own, step.workers)
    await AllReduce([flat])
    if not is_finite(flat):
        step.refused = True
    with step.measuring.timed("decompress"):
        _write_products(exchange, powersgd, lefts, rights, x)
    step.new_rights.update(zip(group.names, rights, strict=True))


def _matrices(exchange: Exchange, vector: Tensor) -> list[Tensor]:
    """See a vector as the gradients are; channels-last ones are not in the order of their dimensions."""
    pieces = torch.split(vector, exchange.group.sizes)
    return [piece.as_strided(g.shape, g.stride()) for g, piece in zip(exchange.gradients, pieces, strict=True)]


def _start(exchange: Exchange, powersgd: PowerSGD, place: int) -> Tensor:
    """Find a parameter's result of the last step, or draw the same random numbers on all workers."""
    right = exchange.step.rights.get(exchange.group.names[place])
    if right is None:
        generator = torch.Generator().manual_seed(mixed(exchange.step.seed, exchange.group.numbers[place]))
        right = powersgd.start(exchange.gradients[place].shape, generator).to(exchange.x.device)
    return right


def _packed(factors: Sequence[Tensor], workers: int) -> tuple[Tensor, list[Tensor]]:
    """Put a worker's share of the mean of all factors into one tensor, and see that as the factors again."""
    flat = torch.cat([factor.reshape(-1) for factor in factors]).div_(workers)
    parts = torch.split(flat, [factor.numel() for factor in factors])
    return flat, [part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)]


def _remember(exchange: Exchange, powersgd: PowerSGD, lefts: Sequence[Tensor], own: Sequence[Tensor]) -> None:
    """Remember what the product leaves out of this worker's own gradients.

    The mean in the place of the own factors would make memories grow with the differences between the workers.
    """
    memory, measuring = exchange.group.memory, exchange.step.measuring
    if memory is None and not measuring.everything:
        return
    sent = torch.empty_like(exchange.x)
    _write_products(exchange, powersgd, lefts, own, sent)
    if memory is not None:
        memory.remove(sent)
    measuring.compare(memory, exchange.x, sent)


def _write_products(
    exchange: Exchange, powersgd: PowerSGD, lefts: Sequence[Tensor], rights: Sequence[Tensor], vector: Tensor
) -> None:
    """Write the products of the factors into a vector of the group's length."""
    places = _matrices(exchange, vector)
    for left, right, place, gradient in zip(lefts, rights, places, exchange.gradients, strict=True):
        place.copy_(powersgd.product(left, right, gradient.shape))
