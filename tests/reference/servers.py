"""Methods with a server, as recursions in the order of events: worker ``i`` needs ``seconds[i]`` for a gradient,
messages take no time, and of two that come at the same moment the one of the lower rank is first. Each yields the
server's model after every update. ``copies[i]`` is what worker ``i`` computes at."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Gradients = Callable[[Tensor], Tensor]


class InOrder(Sequence[float]):
    """In the place of seconds: the workers whose gradients come, one after the other."""

    def __init__(self, workers: int, ranks: Sequence[int]) -> None:
        self.workers, self.ranks = workers, ranks

    def __len__(self) -> int:
        return self.workers

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def arrivals(seconds: Sequence[float]) -> tuple[list[tuple[float, int]], Callable[[float, int], None]]:
    """The clock, and what lets a worker begin its next gradient at a time."""
    if isinstance(seconds, InOrder):
        return [(float(place), rank) for place, rank in enumerate(seconds.ranks)], lambda now, rank: None
    clock = sorted((second, rank) for rank, second in enumerate(seconds))
    return clock, lambda now, rank: heapq.heappush(clock, (now + seconds[rank], rank))


def largest(vector: Tensor, kept: int) -> Tensor:
    places = vector.abs().topk(kept).indices
    return torch.zeros_like(vector).scatter(0, places, vector[places])


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


def apsgd_compressed(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], kept: int
) -> Iterator[Tensor]:
    """Worker 0 is the server: what it knows and computes is whole."""
    copies, left = x.expand(len(seconds), -1).clone(), torch.zeros(len(seconds), len(x), dtype=x.dtype)
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        left[i] += gradients(copies)[i]
        sent = largest(left[i], kept) if i > 0 else left[i].clone()
        left[i] -= sent
        x = x - rate * sent
        yield x
        copies[i] += largest(x - copies[i], kept) if i > 0 else x - copies[i]
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


def delay_adaptive(x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float]) -> Iterator[Tensor]:
    workers = len(seconds)
    copies, stamps, version = x.expand(workers, -1).clone(), [0] * workers, 0
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        x, version = x - rate * min(1.0, workers / max(1, version - stamps[i])) * gradients(copies)[i], version + 1
        yield x
        copies[i], stamps[i] = x, version
        begin(now, i)


def ringmaster(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], threshold: int
) -> Iterator[Tensor]:
    copies, stamps, version = x.expand(len(seconds), -1).clone(), [0] * len(seconds), 0
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        if version - stamps[i] < threshold:
            x, version = x - rate * gradients(copies)[i], version + 1
            yield x
        copies[i], stamps[i] = x, version
        begin(now, i)


def ringmaster_cancelling(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], threshold: int, parts: int
) -> Iterator[Tensor]:
    copies, stamps, version, done = x.expand(len(seconds), -1).clone(), [0] * len(seconds), 0, [0] * len(seconds)
    clock, begin = arrivals([each / parts for each in seconds])
    while True:
        now, i = heapq.heappop(clock)
        done[i] += 1
        if version - stamps[i] < threshold and done[i] == parts:
            x, version = x - rate * gradients(copies)[i], version + 1
            yield x
        if version - stamps[i] >= threshold or done[i] == parts:
            copies[i], stamps[i], done[i] = x, version, 0
        begin(now, i)


def rennala(x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], number: int) -> Iterator[Tensor]:
    copies, stamps, version = x.expand(len(seconds), -1).clone(), [0] * len(seconds), 0
    heard: list[Tensor] = []
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        if stamps[i] == version:
            heard.append(gradients(x.expand_as(copies))[i])
        if len(heard) == number:
            x, heard, version = x - rate * torch.stack(heard).mean(0), [], version + 1
            yield x
        copies[i], stamps[i] = x, version
        begin(now, i)


def malenia(x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], number: int) -> Iterator[Tensor]:
    """Gradients without noise: all of a worker at one model are the same."""
    workers = len(seconds)
    stamps, version, counts = [0] * workers, 0, [0] * workers
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        counts[i] += stamps[i] == version
        if all(counts) and workers / sum(1 / count for count in counts) >= number / workers:
            x, version, counts = x - rate * gradients(x.expand(workers, -1)).mean(0), version + 1, [0] * workers
            yield x
        stamps[i] = version
        begin(now, i)


def ringleader(x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float]) -> Iterator[Tensor]:
    workers = len(seconds)
    copies = x.expand(workers, -1).clone()
    now_of: list[list[Tensor]] = [[] for _ in seconds]
    later_of: list[list[Tensor]] = [[] for _ in seconds]
    done: set[int] = set()
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        (later_of if i in done else now_of)[i].append(gradients(copies)[i])
        if i not in done and all(now_of):
            x = x - rate * torch.stack([torch.stack(own).mean(0) for own in now_of]).mean(0)
            done.add(i)
            if len(done) == workers:
                now_of, later_of, done = later_of, [[] for _ in seconds], set()
            yield x
        copies[i] = x
        begin(now, i)


def stale_synchronous(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], bound: int
) -> Iterator[Tensor]:
    copies, counts, waiting = x.expand(len(seconds), -1).clone(), [0] * len(seconds), list[int]()
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        x, counts[i] = x - rate * gradients(copies)[i], counts[i] + 1
        yield x
        free = [j for j in (i, *waiting) if counts[j] <= bound + min(counts)]
        waiting = [j for j in (*waiting, i) if j not in free]
        for j in free:
            copies[j] = x
            begin(now, j)


def acpd(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], group: int, delay: int, kept: int
) -> Iterator[Tensor]:
    workers, model, came, groups = len(seconds), x.clone(), [], 0
    known, unsent, pending = x.expand(workers, -1).clone(), *torch.zeros(2, workers, len(x), dtype=x.dtype)
    clock, begin = arrivals(seconds)

    def take(vector: Tensor) -> Tensor:
        taken = largest(vector, kept)
        vector -= taken
        return taken

    while True:
        now, i = heapq.heappop(clock)
        unsent[i] -= rate * gradients(known + unsent)[i]
        sent = take(unsent[i]) / workers
        model, pending = model + sent, pending + sent
        came.append(i)
        yield model
        if len(came) == (workers if (groups + 1) % delay == 0 else group):
            for j in came:
                known[j] += take(pending[j])
                begin(now, j)
            came, groups = [], groups + 1


def fedbuff(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], every: int, number: int, outer: float = 1.0
) -> Iterator[Tensor]:
    """The server's model after each message."""
    workers, version, heard = len(seconds), 0, list[Tensor]()
    copies, began = x.expand(workers, -1).clone(), x.expand(workers, -1).clone()
    counts, stamps = [0] * workers, [0] * workers
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        copies[i] -= rate * gradients(copies)[i]
        counts[i] += 1
        if counts[i] % every == 0:
            heard.append((copies[i] - began[i]) / (1 + version - stamps[i]) ** 0.5)
            if len(heard) == number:
                x, heard, version = x + outer * torch.stack(heard).mean(0), [], version + 1
            copies[i], began[i], stamps[i] = x, x, version
            yield x
        begin(now, i)


def fedbuff_compressed(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], every: int, number: int, kept: int
) -> Iterator[Tensor]:
    """Worker 0 is the server: what it sends and is told is whole."""
    workers, version, heard = len(seconds), 0, list[Tensor]()
    copies, told, left = (x.expand(workers, -1).clone() for _ in range(3))
    left.zero_()
    counts, stamps = [0] * workers, [0] * workers
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        copies[i] -= rate * gradients(copies)[i]
        counts[i] += 1
        if counts[i] % every == 0:
            left[i] += copies[i] - told[i]
            sent = largest(left[i], kept) if i > 0 else left[i].clone()
            left[i] -= sent
            heard.append(sent / (1 + version - stamps[i]) ** 0.5)
            if len(heard) == number:
                x, heard, version = x + torch.stack(heard).mean(0), [], version + 1
            told[i] += largest(x - told[i], kept) if i > 0 else x - told[i]
            copies[i], stamps[i] = told[i], version
            yield x
        begin(now, i)


def delayed_nesterov(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], every: int, number: int, spread: float
) -> Iterator[Tensor]:
    """Outer learning rate 0.7, momentum 0.9, with local steps by speed. The server's model after each message."""
    workers, heard, momentum = len(seconds), list[Tensor](), torch.zeros_like(x)
    copies, began = x.expand(workers, -1).clone(), x.expand(workers, -1).clone()
    counts, due, made = [0] * workers, [every] * workers, [0] * workers
    clock, begin = arrivals(seconds)
    while True:
        now, i = heapq.heappop(clock)
        copies[i] -= rate * gradients(copies)[i]
        counts[i] += 1
        if counts[i] == due[i]:
            pseudo = began[i] - copies[i]
            heard.append(pseudo)
            share = spread
            if len(heard) == number:
                momentum, share = 0.9 * momentum + torch.stack(heard).mean(0), 1 - spread * number + spread
                heard = []
            x = x - 0.7 * share * 0.9 * momentum - 0.7 / number * pseudo
            made[i], counts[i] = made[i] + due[i], 0
            copies[i], began[i], due[i] = x, x, max(1, every * made[i] // max(made))
            yield x
        begin(now, i)


def async_easgd(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], every: int, beta: float
) -> Iterator[Tensor]:
    """The centre after each exchange. A gradient is there when the worker's next step begins."""
    copies, counts, alpha = x.expand(len(seconds), -1).clone(), [0] * len(seconds), beta / len(seconds)
    pulls = torch.zeros_like(copies)
    clock, begin = arrivals(seconds)
    clock[:] = clock if isinstance(seconds, InOrder) else [(0.0, i) for i in range(len(seconds))]
    while True:
        now, i = heapq.heappop(clock)
        if counts[i] > 0:
            copies[i] -= rate * gradients(copies)[i] + pulls[i]
        pulls[i] = alpha * (copies[i] - x) if counts[i] % every == 0 else 0
        x, counts[i] = x + pulls[i], counts[i] + 1
        if counts[i] % every == 1 or every == 1:
            yield x
        begin(now, i)


def async_easgd_compressed(
    x: Tensor, gradients: Gradients, rate: float, seconds: Sequence[float], every: int, beta: float, kept: int
) -> Iterator[Tensor]:
    """As `async_easgd`; worker 0 is the server, whose own exchanges are whole."""
    copies, counts, alpha = x.expand(len(seconds), -1).clone(), [0] * len(seconds), beta / len(seconds)
    pulls, told = torch.zeros_like(copies), copies.clone()
    clock, begin = arrivals(seconds)
    clock[:] = clock if isinstance(seconds, InOrder) else [(0.0, i) for i in range(len(seconds))]
    while True:
        now, i = heapq.heappop(clock)
        if counts[i] > 0:
            copies[i] -= rate * gradients(copies)[i] + pulls[i]
        pulls[i] = 0
        if counts[i] % every == 0:
            told[i] += largest(copies[i] - told[i], kept) if i > 0 else copies[i] - told[i]
            pulls[i] = alpha * (largest(told[i] - x, kept) if i > 0 else told[i] - x)
        x, counts[i] = x + pulls[i], counts[i] + 1
        if counts[i] % every == 1 or every == 1:
            yield x
        begin(now, i)
