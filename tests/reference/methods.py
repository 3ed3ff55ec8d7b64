"""The update rules on stacked states, straight from the papers. ``rate(step)`` is the learning rate."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Gradients = Callable[[Tensor], Tensor]
Rate = Callable[[int], float]
Mixing = Callable[[int], Tensor]
Partners = Sequence[Iterator[int]]
Turns = list[list[int]]
Numbers = Sequence[float]


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


def gradient_tracking(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, order: str = "awc"
) -> Iterator[Tensor]:
    y, before = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(10**9):
        w, now = mixing(step), gradients(x)
        if order == "awc":
            y = w @ y + now - before
            x = w @ x - rate(step) * y
        else:
            y = w @ (y + now - before)
            x = w @ (x - rate(step) * y)
        before = now
        yield x


def choco_sgd(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    consensus_step_size: float,
    compress: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """``compress`` takes and gives the differences of all workers, [workers, parameters]."""
    public = torch.zeros_like(x)
    for step in range(10**9):
        public = public + compress(x - public)
        x = x + consensus_step_size * (mixing(step) @ public - public) - rate(step) * gradients(x)
        yield x


def moniqua_sgd(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, theta: float, levels: int, shift: Rate
) -> Iterator[Tensor]:
    """``shift(step)`` is what the lattice is dithered by."""
    width = 2 * theta / (1 - 1 / levels)  # the paper's B, with delta = 1 / (2 levels)
    for step in range(10**9):
        codes = torch.round((x - shift(step)) * levels / width) % levels  # what is sent
        away = codes * width / levels + shift(step) - x[:, None]  # [receiver, sender, parameters]
        decoded = x[:, None] + away - width * torch.round(away / width)
        own = decoded.diagonal().T
        x = x + torch.einsum("ij,ijk->ik", mixing(step), decoded) - own - rate(step) * gradients(x)
        yield x


def saef(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    compress: Callable[[Tensor], Tensor],
    period: int | None = 20,
    step_ahead: float = 1.0,
    server: Callable[[Tensor], Tensor] = lambda total: total,
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal. ``compress`` takes and gives the updates of all workers, [workers, parameters]."""
    error, left = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(10**9):
        if period is not None and (step + 1) % period == 0:
            error = error.mean(0).expand_as(x)
        update = error + rate(step) * gradients(x - step_ahead * error)
        sent = compress(update)
        error, total = update - sent, left + sent.mean(0)
        left, x = total - server(total), x - server(total)
        yield x


def ef21(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, compress: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal. ``compress`` takes and gives the differences of all workers, [workers, parameters]."""
    estimate = torch.zeros_like(x)
    for step in range(10**9):
        estimate = estimate + compress(gradients(x) - estimate)
        x = x - rate(step) * estimate.mean(0)
        yield x


def adpsgd(
    x: Tensor, gradients: Gradients, rate: Rate, partners: Partners, seconds: Sequence[float], delay: float, bound: int
) -> Iterator[Tensor]:
    """A step calls, if no call is under way, and has its gradient ``seconds`` later. A message takes ``delay``."""
    x, snapshot, steps, called = x.clone(), x.clone(), [0] * len(x), [0] * len(x)
    back, due = [True] * len(x), [False] * len(x)
    events = [(0.0, "step", i, i, x[i]) for i in range(len(x))]
    while True:
        events.sort(key=lambda event: event[0])
        now, what, i, j, value = events.pop(0)
        if what == "step":
            snapshot[i] = x[i]
            if back[i]:
                called[i], back[i] = steps[i], False
                events.append((now + delay, "asks", i, next(partners[i]), x[i].clone()))
            events.append((now + seconds[i], "gradient", i, i, value))
        elif what == "asks":  # the called end averages at once; the answer is what the caller adds
            half = (x[j] - value) / 2
            x[j] -= half
            events.append((now + delay, "answer", i, j, half))
        elif what == "answer":
            x[i], back[i] = x[i] + value, True
        due[i] = due[i] or what == "gradient"
        if due[i] and (back[i] or steps[i] - called[i] + 1 < bound):
            x[i] -= rate(steps[i]) * gradients(snapshot)[i]
            yield x.clone()
            due[i], steps[i] = False, steps[i] + 1
            events.append((now, "step", i, i, value))


def acid(
    x: Tensor, gradients: Gradients, rate: Rate, turns: Turns, seconds: Numbers, rates: Numbers, often: Numbers
) -> Iterator[Tensor]:
    """On a network that takes no time. ``often``: exchanges of each worker per unit of time."""
    (eta, alpha), x, companion, snapshot, steps = rates, x.clone(), x.clone(), x.clone(), [0] * len(x)

    def flow(i: int) -> Tensor:
        pull = torch.tensor([[-eta, eta], [eta, -eta]], dtype=x.dtype) / often[i]
        x[i], companion[i] = torch.linalg.matrix_exp(pull) @ torch.stack([x[i], companion[i]])
        return x[i].clone()

    def average(callers: Sequence[int]) -> None:  # all of them ask before the first one has its answer
        answers = []
        for i, sent in [(i, flow(i)) for i in callers if turns[i]]:
            turns[i] = [*turns[i][1:], j := turns[i][0]]
            answers.append((i, sent - flow(j)))
            x[j], companion[j] = x[j] + answers[-1][1] / 2, companion[j] + alpha * answers[-1][1]
        for i, difference in answers:
            x[i], companion[i] = x[i] - difference / 2, companion[i] - alpha * difference

    average(range(len(x)))
    clock = sorted((seconds[worker], worker) for worker in range(len(x)))
    while True:
        now, i = heapq.heappop(clock)
        update = rate(steps[i]) * gradients(snapshot)[i]
        x[i], companion[i], steps[i] = x[i] - update, companion[i] - update, steps[i] + 1
        yield x.clone()
        snapshot[i] = x[i]
        average([i])
        heapq.heappush(clock, (now + seconds[i], i))


def swarm(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    peers: Sequence[Sequence[int]],
    seconds: Sequence[float],
    seed: int,
    every: int,
) -> Iterator[Tensor]:
    """On a network that takes no time: shared copies meet when the last local step of a round begins."""
    x, shared, began, steps = x.clone(), x.clone(), x.clone(), [0] * len(x)
    draws = [random.Random((seed << 20) + worker) for worker in range(len(x))]
    clock = sorted((seconds[worker], worker) for worker in range(len(x)))
    while True:
        now, i = heapq.heappop(clock)
        x[i] -= rate(steps[i]) * gradients(x)[i]
        steps[i] += 1
        if steps[i] % every == 0:
            x[i] += shared[i] - began[i]
            shared[i] = began[i] = x[i]
        yield x.clone()
        if (steps[i] + 1) % every == 0:
            j = draws[i].choice(peers[i])
            shared[i] = shared[j] = (shared[i] + shared[j]) / 2
        heapq.heappush(clock, (now + seconds[i], i))


def local_sgd(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    every: int,
    warm_up_steps: int = 0,
    delay: int = 0,
    local_share: float = 0.0,
) -> Iterator[Tensor]:
    mean, sent = x.mean(0), -(10**9)
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step > warm_up_steps and (step - warm_up_steps) % every == 0:
            mean, sent = x.mean(0), step
        if step <= warm_up_steps:
            x = x.mean(0).expand_as(x)
        elif step == sent + delay:
            x = local_share * x + (1 - local_share) * mean
        yield x


def slowmo(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int, momentum: float, slow_rate: float = 1.0
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal."""
    common, u = x[0], torch.zeros_like(x[0])
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step % every == 0:
            u = momentum * u + common - x.mean(0)
            common = common - slow_rate * u
            x = common.expand_as(x)
        yield x


def diloco(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int, outer_rate: float, momentum: float
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal."""
    theta, m = x[0], torch.zeros_like(x[0])
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step % every == 0:
            difference = theta - x.mean(0)
            m = momentum * m + difference
            theta = theta - outer_rate * (difference + momentum * m)
            x = theta.expand_as(x)
        yield x


def streaming_diloco(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    every: int,
    fragments: int,
    delay: int,
    local_share: float = 0.5,
    outer_rate: float = 0.7,
    momentum: float = 0.9,
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal. Fragment p of P begins its average after step ``(p + 1) every / P`` of each round."""
    theta, m, arriving = x[0].clone(), torch.zeros_like(x[0]), {}
    cuts = [x.shape[1] * p // fragments for p in range(fragments + 1)]
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        for p in range(fragments):
            part = slice(cuts[p], cuts[p + 1])
            if (step - (p + 1) * every // fragments) % every == 0:
                arriving[p] = step + delay, theta[part] - x[:, part].mean(0)
            if p in arriving and arriving[p][0] == step:
                difference = arriving.pop(p)[1]
                m[part] = momentum * m[part] + difference
                theta[part] -= outer_rate * (difference + momentum * m[part])
                x[:, part] = local_share * x[:, part] + (1 - local_share) * theta[part]
        yield x.clone()


def noloco(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    every: int,
    outer_rate: float = 0.7,
    momentum: float = 0.5,
    pull: float = 0.7,
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal at first. ``mixing(r)`` is that of round r."""
    slow, m = x.clone(), torch.zeros_like(x)
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step % every == 0:
            w = mixing(step // every - 1)
            m = momentum * m + outer_rate * w @ (x - slow) + pull * (w @ slow - slow)
            slow = slow + m
            x = slow.clone()
        yield x


def c_psgd(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing) -> Iterator[Tensor]:
    yield from sync_sgd(x, gradients, rate, mixing)


def hierarchical_gossip(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, members: int = 1, order: str = "awc"
) -> Iterator[Tensor]:
    """The matrix of all workers takes whole models from the first of each host, and gradients from all."""
    hosts = len(x) // members
    spread = torch.eye(hosts, dtype=x.dtype).repeat_interleave(members, 0)  # of a host to its workers
    for step in range(10**9):
        gradient = gradients(x).view(hosts, members, -1).mean(1)
        if order == "awc":
            x = spread @ (mixing(step) @ x[::members] - rate(step) * gradient)
        else:
            x = spread @ mixing(step) @ (x[::members] - rate(step) * gradient)
        yield x


def sgp(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, overlap: int = 0) -> Iterator[Tensor]:
    """What is sent is of the numerators; with overlap the share that a worker keeps stays, and the rest comes late."""
    mass, weight, late = x, torch.ones(len(x), 1, dtype=x.dtype), None
    for step in range(10**9):
        mass = mass - rate(step) * gradients(mass / weight)
        if overlap == 0:
            mass, weight = mixing(step) @ mass, mixing(step) @ weight
        elif step % overlap == 0:
            p = mixing(step // overlap)
            kept, sent = p.diagonal()[:, None], p - p.diagonal().diag()
            coming = sent @ mass, sent @ weight
            mass, weight = kept * mass, kept * weight
            if late is not None:
                mass, weight = mass + late[0], weight + late[1]
            late = coming
        yield mass / weight


def qg_dsgdm(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    momentum: float = 0.9,
    follow: float = 0.9,
    nesterov: bool = False,
) -> Iterator[Tensor]:
    """The published momentum times the learning rate of its step."""
    m = torch.zeros_like(x)
    for step in range(10**9):
        gradient = rate(step) * gradients(x)
        local = momentum * m + gradient
        direction = gradient + momentum * local if nesterov else local
        before, x = x, mixing(step) @ (x - direction)
        m = follow * m + (1 - follow) * (before - x)
        yield x


def decentlam(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, momentum: float = 0.9) -> Iterator[Tensor]:
    """The published momentum times the learning rate of its step."""
    m = torch.zeros_like(x)
    for step in range(10**9):
        m = momentum * m + x - mixing(step) @ (x - rate(step) * gradients(x))
        x = x - m
        yield x


def momentum_tracking(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, momentum: float = 0.9, order: str = "atc"
) -> Iterator[Tensor]:
    """As published: with c, by which a momentum differs from the mean of all; or combining while it adapts."""
    u, c = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(10**9):
        w = mixing(step)
        if order == "atc":
            u = momentum * u + gradients(x)
            x, c = w @ (x - rate(step) * (u - c)), w @ (c - u) + u
        else:
            before, u = u, momentum * u + gradients(x)
            c = u - (w @ (before - c) + u - before)
            x = w @ x - rate(step) * (u - c)
        yield x


def extra(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing) -> Iterator[Tensor]:
    update = rate(0) * gradients(x)
    before, x = x, mixing(0) @ x - update
    yield x
    for step in range(1, 10**9):
        update_before, update = update, rate(step) * gradients(x)
        averaged, averaged_before = (x + mixing(step) @ x), (before + mixing(step) @ before) / 2
        before, x = x, averaged - averaged_before - update + update_before
        yield x


def gossip_pga(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int = 6, order: str = "atc"
) -> Iterator[Tensor]:
    for step in range(10**9):
        update = rate(step) * gradients(x)
        if (step + 1) % every == 0:
            x = (x - update).mean(0, keepdim=True).expand_as(x)
        else:
            x = mixing(step) @ (x - update) if order == "atc" else mixing(step) @ x - update
        yield x


def relaysgd(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing) -> Iterator[Tensor]:
    """Of each model the version that has come so far along the edges of ``mixing(0)``, an edge a step, if one has."""
    n = len(x)
    joined = (mixing(0) - mixing(0).diagonal().diag()) > 0
    reached, distance = torch.eye(n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.long)
    for hops in range(1, n):
        now = reached | (reached.float() @ joined.float() > 0)
        distance[now & ~reached] = hops
        reached = now
    history: list[Tensor] = []
    for step in range(10**9):
        history.insert(0, x - rate(step) * gradients(x))
        rows = []
        for i in range(n):
            ages = [(j, max(int(distance[i, j]) - 1, 0)) for j in range(n)]
            rows.append(torch.stack([history[age][j] for j, age in ages if age <= step]).mean(0))
        x = torch.stack(rows)
        del history[n:]
        yield x


def dcd_psgd(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, compress: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """``compress`` takes and gives the differences of all workers, [workers, parameters]. Rows of ``x`` are equal."""
    for step in range(10**9):
        x = x + compress(mixing(step) @ x - rate(step) * gradients(x) - x)
        yield x


def ecd_psgd(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, compress: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """``compress`` takes and gives the extrapolations of all workers. Rows of ``x`` are equal."""
    estimate = x
    for step in range(10**9):
        t = step + 1
        before, x = x, mixing(step) @ estimate - rate(step) * gradients(x)
        estimate = (1 - 2 / t) * estimate + 2 / t * compress((1 - t / 2) * before + t / 2 * x)
        yield x


def deepsqueeze(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    consensus_step_size: float,
    compress: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """``compress`` takes and gives the models of all workers with their errors."""
    error = torch.zeros_like(x)
    for step in range(10**9):
        x = x - rate(step) * gradients(x)
        sent = compress(x + error)
        error = x + error - sent
        x = x + consensus_step_size * (mixing(step) @ sent - sent)
        yield x


def bmuf(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int, momentum: float, block_rate: float = 1.0
) -> Iterator[Tensor]:
    """Nesterov's form. Rows of ``x`` are equal."""
    w, ahead, delta = x[0], x[0], torch.zeros_like(x[0])
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step % every == 0:
            delta = momentum * delta + block_rate * (x.mean(0) - ahead)
            w = w + delta
            ahead = w + momentum * delta
            x = ahead.expand_as(x)
        yield x


def of_messages(values: Tensor, compress: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of what all have sent to all, and what each message has left out."""
    sent = compress(values)
    return sent.mean(0), values - sent


def in_parts(values: Tensor, compress: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The same, if worker p averages part p, and compresses the mean once more."""
    (n, size), mean, error = values.shape, torch.zeros_like(values[0]), torch.zeros_like(values)
    for p in range(n):
        part = slice(size * p // n, size * (p + 1) // n)
        sent = torch.stack([row if i == p else compress(row[None])[0] for i, row in enumerate(values[:, part])])
        mean[part] = compress(sent.mean(0)[None])[0]
        error[:, part] = values[:, part] - sent
        error[p, part] = n * (sent.mean(0) - mean[part])
    return mean, error


def sparseloco(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    every: int,
    average: Callable[[Tensor], tuple[Tensor, Tensor]],
    error_feedback: float = 0.95,
    outer_rate: float = 0.4,
    momentum: float = 0.0,
    local_share: float = 0.0,
    delay: int = 0,
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal. With a momentum, Nesterov's, it is DiLoCo with a compressor."""
    theta, m, error, mean = x[0], torch.zeros_like(x[0]), torch.zeros_like(x), x[0]
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step % every == 0:
            mean, error = average(error_feedback * (1 - local_share) * error + theta - x)
        if step >= every and step % every == delay:
            m = momentum * m + mean
            theta = theta - outer_rate * (mean + momentum * m)
            x = local_share * x + (1 - local_share) * theta
        yield x


def eager_diloco(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int, outer_rate: float, momentum: float
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal."""
    theta, m, last = x, torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step % every == 0:
            moved = theta - x
            difference = last.mean(0) + (moved - last) / len(x)
            m = momentum * m + difference
            theta = theta - outer_rate * (difference + momentum * m)
            x, last = theta, moved
        yield x


def cocod_sgd(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int) -> Iterator[Tensor]:
    """Rows of ``x`` are equal at first: the mean of the first round's beginning is what it is."""
    begun = x
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step % every == 0:
            x = begun.mean(0) + (x - begun)
            begun = x
        yield x


def overlap_local_sgd(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int, pull: float = 0.6, momentum: float = 0.0
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal at first."""
    anchor, velocity, mean = x[0], torch.zeros_like(x[0]), x[0]
    for step in range(1, 10**9):
        x = x - rate(step - 1) * gradients(x)
        if step % every == 0:
            velocity = momentum * velocity + mean - anchor
            anchor = anchor + velocity
            x = (1 - pull) * x + pull * anchor
            mean = x.mean(0)
        yield x


def easgd(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int, moving_rate: float = 0.9
) -> Iterator[Tensor]:
    """Rows of ``x`` are equal at first."""
    centre = x[0]
    for step in range(10**9):
        pulled = moving_rate / len(x) * (x - centre) if step % every == 0 else 0
        mean = x.mean(0)
        x = x - rate(step) * gradients(x) - pulled
        if step % every == 0:
            centre = (1 - moving_rate) * centre + moving_rate * mean
        yield x


def sparta(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, positions: Callable[[int], Tensor]
) -> Iterator[Tensor]:
    """``positions(step)`` are those that are averaged after it."""
    for step in range(10**9):
        x = x - rate(step) * gradients(x)
        x[:, positions(step)] = x[:, positions(step)].mean(0)
        yield x.clone()
