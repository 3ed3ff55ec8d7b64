"""The federated update rules, straight from the papers: with all clients in all rounds, as stacked states of which all
rows are equal at first; and with a few clients in each round, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Gradients = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor, int], Tensor]
"""A client's, of its model and its number."""
Rate = Callable[[int], float]
Mixing = Callable[[int], Tensor]
Server = Callable[[Tensor, Tensor], Tensor]
"""The next common model, of the last one and of what the clients have moved: w - sum_k p_k w_k."""


def plain(rate: float = 1.0) -> Server:
    return lambda w, difference: w - rate * difference


def nesterov(rate: float, momentum: float) -> Server:
    """As FedMom's paper writes it: with v, which begins at the model."""
    before: list[Tensor] = []

    def step(w: Tensor, difference: Tensor) -> Tensor:
        v = w - rate * difference
        last = before.pop() if before else w
        before.append(v)
        return v + momentum * (v - last)

    return step


def heavy_ball(rate: float, momentum: float) -> Server:
    m = [0.0]

    def step(w: Tensor, difference: Tensor) -> Tensor:
        m[0] = momentum * m[0] + difference  # type: ignore[assignment, operator]
        return w - rate * m[0]

    return step


def adaptive(kind: str, rate: float, beta_1: float, beta_2: float, tau: float) -> Server:
    state = {"m": torch.zeros((), dtype=torch.float64), "v": torch.full((), tau**2, dtype=torch.float64)}

    def step(w: Tensor, difference: Tensor) -> Tensor:
        d, v = -difference, state["v"]
        state["m"] = beta_1 * state["m"] + (1 - beta_1) * d
        state["v"] = {
            "adam": beta_2 * v + (1 - beta_2) * d**2,
            "yogi": v - (1 - beta_2) * d**2 * torch.sign(v - d**2),
            "adagrad": v + d**2,
        }[kind]
        return w + rate * state["m"] / (state["v"].sqrt() + tau)

    return step


def fedavg(
    x: Tensor,
    gradients: Gradients,
    rate: Rate,
    mixing: Mixing,
    every: int,
    server: Server | None = None,
    mu: float = 0.0,
) -> Iterator[Tensor]:
    w, server = x[0], server or plain()
    for step in range(1, 10**9):
        x = x - rate(step - 1) * (gradients(x) + mu * (x - w))
        if step % every == 0:
            w = server(w, w - x.mean(0))
            x = w.expand_as(x)
        yield x


def fedmom(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int) -> Iterator[Tensor]:
    return fedavg(x, gradients, rate, mixing, every, nesterov(1.0, 0.9))


def fedavgm(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int) -> Iterator[Tensor]:
    return fedavg(x, gradients, rate, mixing, every, heavy_ball(1.0, 0.9))


def fedadam(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int) -> Iterator[Tensor]:
    return fedavg(x, gradients, rate, mixing, every, adaptive("adam", 0.1, 0.9, 0.99, 1e-3))


def fedyogi(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int) -> Iterator[Tensor]:
    return fedavg(x, gradients, rate, mixing, every, adaptive("yogi", 0.1, 0.9, 0.99, 1e-3))


def fedadagrad(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int) -> Iterator[Tensor]:
    return fedavg(x, gradients, rate, mixing, every, adaptive("adagrad", 0.1, 0.0, 0.0, 1e-3))


def fedprox(
    x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int, mu: float = 0.01
) -> Iterator[Tensor]:
    return fedavg(x, gradients, rate, mixing, every, None, mu)


def fednova(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int) -> Iterator[Tensor]:
    return fedavg(x, gradients, rate, mixing, every)  # all make equally many steps


def scaffold(x: Tensor, gradients: Gradients, rate: Rate, mixing: Mixing, every: int) -> Iterator[Tensor]:
    w, control, controls, total = x[0], torch.zeros_like(x[0]), torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, 10**9):
        total = total + gradients(x)
        x = x - rate(step - 1) * (gradients(x) - controls + control)
        if step % every == 0:
            control, controls = control + (total / every - controls).mean(0), total / every
            w, total = x.mean(0), torch.zeros_like(x)
            x = w.expand_as(x)
        yield x


Turns = list[tuple[int, int, float]]
"""A round: of each client its number, its local steps, and its weight."""


def moved(gradient: Gradient, w: Tensor, turns: Turns, rate: float) -> Tensor:
    """What the clients of a round have moved, by their weights."""
    difference = torch.zeros_like(w)
    for client, steps, weight in turns:
        x = w
        for _ in range(steps):
            x = x - rate * gradient(x, client)
        difference = difference + weight * (w - x)
    return difference


def population(
    w: Tensor, gradient: Gradient, turns: Callable[[int], Turns], rate: float, server: Server
) -> Iterator[Tensor]:
    """The common model after each round, of clients that come one after the other."""
    for number in range(10**9):
        w = server(w, moved(gradient, w, turns(number), rate))
        yield w


def scaffold_population(
    w: Tensor, gradient: Gradient, clients: int, turns: Callable[[int], Turns], rate: float
) -> Iterator[Tensor]:
    """The paper's option II, with a few clients in each round."""
    control, controls = torch.zeros_like(w), torch.zeros_like(w).expand(clients, -1).clone()
    for number in range(10**9):
        difference, change = torch.zeros_like(w), torch.zeros_like(w)
        for client, steps, weight in turns(number):
            x, own = w, controls[client].clone()
            for _ in range(steps):
                x = x - rate * (gradient(x, client) - own + control)
            controls[client] = own - control + (w - x) / (steps * rate)
            difference = difference + weight * (w - x)
            change = change + (controls[client] - own) / len(controls)
        w, control = w - difference, control + change
        yield w
