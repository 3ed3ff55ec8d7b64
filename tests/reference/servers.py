"""Methods with a server, as recursions in the order of events: worker ``i`` needs ``seconds[i]`` for a gradient,
messages take no time, and of two that come at the same moment the one of the lower rank is first. Each yields the
server's model after every update. ``copies[i]`` is what worker ``i`` computes at."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Gradients = Callable[[Tensor], Tensor]


def arrivals(seconds: Sequence[float]) -> tuple[list[tuple[float, int]], Callable[[float, int], None]]:
    """The clock, and what lets a worker begin its next gradient at a time."""
    clock = sorted((second, rank) for rank, second in enumerate(seconds))
    return clock, lambda now, rank: heapq.heappush(clock, (now + seconds[rank], rank))


def apsgd(x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], number: int) -> Iterator[Tensor]:
    copies, total, heard = x.expand(len(seconds), -1).clone(), torch.zeros_like(x), 0
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        total, heard = total + gradients(copies)[i] / number, heard + 1
        if heard == number:
            x, total, heard = x - rate * total, torch.zeros_like(x), 0
            yield x
        copies[i] = x
        begin(now, i)


def staleness_aware(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], number: int
) -> Iterator[Tensor]:
    copies, stamps, version = x.expand(len(seconds), -1).clone(), [0] * len(seconds), 0
    heard: list[Tensor] = []
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        heard.append(gradients(copies)[i] / max(1, version - stamps[i]))
        if len(heard) == number:
            x, heard, version = x - rate * torch.stack(heard).mean(0), [], version + 1
            yield x
        copies[i], stamps[i] = x, version
        begin(now, i)


def backup_workers(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], needed: int
) -> Iterator[Tensor]:
    copies, stamps, step = x.expand(len(seconds), -1).clone(), [0] * len(seconds), 0
    first: list[int] = []
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        if stamps[i] == step:
            first.append(i)
            if len(first) < needed:
                continue  # waits
            x = x - rate * gradients(copies)[first].mean(0)
            yield x
        go_on, step = (first, step + 1) if stamps[i] == step else ([i], step)
        for j in go_on:
            copies[j], stamps[j] = x, step
            begin(now, j)
        first = [] if go_on is first else first


def hogwild(x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float]) -> Iterator[Tensor]:
    copies = x.expand(len(seconds), -1).clone()
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        x = x - rate * gradients(copies)[i]
        yield x
        copies[i] = x
        begin(now, i)
