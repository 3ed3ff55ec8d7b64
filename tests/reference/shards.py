"""A model in shards at several servers, as the recursion that their logs give: who has sent which gradient when, and of
which version of each shard its worker had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

Log = Sequence[tuple[int, int, float | None]]
"""Of each gradient in the order in which it came: who has sent it, how stale it was, its weight (none: dropped)."""

Used = tuple[int, int, float]
"""Whose how-manieth gradient, and its weight."""


def read(logs: Sequence[Log], needed: int) -> tuple[list[list[list[Used]]], dict[tuple[int, int], list[int]]]:
    """Of each server and update: which gradients it used; and of each gradient the version of each shard that it was
    taken at."""
    used: list[list[list[Used]]] = []
    known: dict[tuple[int, int], list[int]] = {}
    for log in logs:
        updates: list[list[Used]] = [[]]
        counts: dict[int, int] = {}
        for source, staleness, weight in log:
            which = source, counts.setdefault(source, 0)
            counts[source] += 1
            known.setdefault(which, []).append(len(updates) - 1 - staleness)
            updates[-1] += [] if weight is None else [(*which, weight)]
            updates += [[]] if len(updates[-1]) == needed else []
        used.append(updates[:-1])
    return used, known


def replayed(
    start: Sequence[Tensor],
    gradient: Callable[[Tensor, int], Tensor],
    logs: Sequence[Log],
    needed: int,
    update: Callable[[int, Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """Each server's last shard. ``update`` makes one of a server's number, its shard before, and a direction."""
    used, known = read(logs, needed)

    @cache
    def at(source: int, number: int) -> Sequence[Tensor]:
        shards = [shard(server, version) for server, version in enumerate(known[source, number])]
        return gradient(torch.cat(shards), source).split([len(each) for each in start])

    @cache
    def shard(server: int, version: int) -> Tensor:
        if version == 0:
            return start[server]
        heard = [weight * at(source, number)[server] for source, number, weight in used[server][version - 1]]
        return update(server, shard(server, version - 1), torch.stack(heard).sum(0) / needed)

    for version in range(max(map(len, used))):  # or the recursion would be deep
        for server in range(len(start)):
            shard(server, min(version, len(used[server])))
    return [shard(server, len(updates)) for server, updates in enumerate(used)]
