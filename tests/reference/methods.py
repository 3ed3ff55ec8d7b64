"""The update rules on stacked states, straight from the papers. ``rate(step)`` is the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

Gradients = Callable[[Tensor], Tensor]
Rate = Callable[[int], float]
Mixing = Callable[[int], Tensor]


def sync_sgd(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing) -> Iterator[Tensor]:
    for step in range(10**9):
        x = x - rate(step) * gradients(x).mean(0)
        yield x


def dpsgd(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing) -> Iterator[Tensor]:
    for step in range(10**9):
        x = mixing(step) @ x - rate(step) * gradients(x)
        yield x


def d2(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing) -> Iterator[Tensor]:
    update = rate(0) * gradients(x)
    before, x = x, mixing(0) @ (x - update)
    yield x
    for step in range(1, 10**9):
        update_before, update = update, rate(step) * gradients(x)
        before, x = x, mixing(step) @ (2 * x - before - update + update_before)
        yield x
