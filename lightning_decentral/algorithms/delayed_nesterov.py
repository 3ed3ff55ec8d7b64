"""Delayed Nesterov momentum and local steps by speed, for asynchronous local SGD (Liu et al., 2024)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

from lightning_decentral.algorithms.centre import AbstractBufferedUpdates
from lightning_decentral.algorithms.server import known_count, require_count
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class DelayedNesterov(AbstractBufferedUpdates):
    r"""Asynchronous local SGD with an outer momentum that waits for several workers, and local steps by speed.

    Workers make local steps at their own speed, and the server applies what each brings, ``d``, as it comes. A momentum
    of all that comes would count stale directions again and again; here it changes once for ``N`` messages, by their
    mean. With ``eta = outer_learning_rate``, ``beta = outer_momentum``, ``c = spread``, of each message::

        D <- D + d
        x <- x + eta (d / N + c beta m)                          # but of each N-th one:
        m <- beta m + D / N;   D <- 0
        x <- x + eta (d / N + (1 - c N + c) beta m)

    Of worker ``i``, whose message is stale by as many others as the server has had since::

        b_i, x_i <- x                                            # the answer to its last message
        x_i      <- H_i local steps, by your optimizer
        send d = x_i - b_i

    **By speed** (DyLU, dynamic local updates): ``H_i`` is ``every`` times the speed of worker ``i`` over that of the
    fastest, rounded down, and at least 1. A speed is how many local steps the server knows that the worker has made.

    Args:
        every: ``H``, local steps of the fastest worker in a round, at least 1; the paper uses 50.
        buffer: ``N``, messages for each change of the momentum, at least 1. ``None``: the number of workers that train.
        outer_learning_rate: ``eta``, above 0; DiLoCo's 0.7.
        outer_momentum: ``beta``, in [0, 1); DiLoCo's 0.9.
        spread: ``c``, in [0, 1/N]: how much of the momentum's step is made with each message; the paper's 0: all with
            each ``N``-th.
        by_speed: whether slow workers make fewer local steps.
        server: ``"beside"``: worker 0 trains and serves. ``"dedicated"``: it serves only.
        compressor: of what workers send, with error feedback: any contraction with messages of fixed size, as
            ``TopK(0.01)``. ``None``: it is sent as it is.
        model_compressor: of what a worker has not been told yet of the model; the same. ``None``: the model is sent.

    Raises:
        ConfigurationError: for numbers out of range.

    Cost:
        A model sent and a model received for each ``H_i`` steps of a worker, for which it waits. Memory: where its
        round began, on each worker; at the server the model, the momentum and the sum besides, in float32 at least. A
        lost worker ends the run with `PeerLost`; so does the server. With `OpenStrategy` only the server does: the
        others may be lost, come back and join.

    Differences with the paper:
        Speeds are counted by the server instead of measured in advance. Workers keep their optimizer's state, and
        follow your learning rate schedule by their own steps. What is evaluated and saved is as with `FedBuff`.

    References:
        Bo Liu, Rachita Chhaparia, Arthur Douillard, Satyen Kale, Andrei A. Rusu, Jiajun Shen, Arthur Szlam,
        Marc'Aurelio Ranzato. Asynchronous Local-SGD Training for Language Modeling. 2024, arXiv:2401.09135.

    Example:
        >>> DelayedNesterov(every=4).resolved(3).buffer
        3
    """

    every: int = 50
    buffer: int | None = None
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    spread: float = 0.0
    by_speed: bool = True

    @property
    def steps_between(self) -> int:
        return self.every

    @property
    def adapts(self) -> bool:
        return self.by_speed

    def check(self, workers: int | None) -> None:
        if self.buffer is not None:
            require_count("DelayedNesterov", "buffer", self.buffer)
        if not (0.0 < self.outer_learning_rate < math.inf and 0.0 <= self.outer_momentum < 1.0):
            raise ConfigurationError(
                f"{self} needs an outer_learning_rate above 0 and an outer_momentum in [0, 1). Use 0.7 and 0.9."
            )
        if not 0.0 <= self.spread <= 1.0 / (self.buffer or 1):
            raise ConfigurationError(
                f"DelayedNesterov(spread={self.spread!r}): needs a share in [0, 1 / buffer]. Use 0.0 for a step of the "
                "momentum with each last message of a buffer."
            )

    def for_trainers(self, trainers: int) -> Self:
        return self if self.buffer is not None else dataclasses.replace(self, buffer=trainers)

    def weight(self, staleness: int) -> float:
        return self.outer_learning_rate / known_count(self, self.buffer)

    def receive(self, worker: Worker, difference: AbstractVector, staleness: int) -> None:
        state, needed = worker.state, known_count(self, self.buffer)
        rate, momentum, spread = self.outer_learning_rate, self.outer_momentum, self.spread
        if "momentum" not in state:
            state.update(momentum=worker.x.zeros_like(), total=worker.x.zeros_like(), heard=0)
        centre, total, moves = state["centre"], state["total"], state["momentum"]
        state["heard"] += 1
        state["version"] += 1
        total.add_(difference)
        centre.add_(difference, alpha=self.weight(staleness))
        if state["heard"] >= needed:  # more, where some of the workers were lost meanwhile
            moves.mul_(momentum).add_(total, alpha=1.0 / state["heard"])
            total.mul_(0.0)
            state["heard"] = 0
            centre.add_(moves, alpha=rate * (1.0 - spread * needed + spread) * momentum)
        elif spread:
            centre.add_(moves, alpha=rate * spread * momentum)
