"""SPARTA: sparse averaging of parameters (EXO Labs, 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from lightning_decentral.averaging import CompressedMean
from lightning_decentral.averaging.messages import compressed
from lightning_decentral.compression import RandomK
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep, Mixing
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class SPARTA(AbstractAlgorithm):
    r"""After each step a random share of the parameters, others each time, becomes the mean over all workers.

    Update rule, with a random set S(t) of positions that all workers draw alike::

        x_i    <- x_i - learning_rate * gradient_i(x_i)
        x_i[p] <- (1/n) sum_j x_j[p]                      for all p in S(t)

    A parameter is averaged once in ``1 / share`` steps, but the models never drift far apart, as each step averages
    some. Any optimizer may make the steps; its state stays the worker's own.

    Args:
        share: of the parameters, in (0, 1]; the published code has 0.005.

    Cost:
        ``2 (n - 1) / n`` times the share of the model sent in each step: with 0.005 as much as local SGD with rounds of
        200. The values alone travel, positions are drawn alike. A copy of the model to decode in. A lost peer raises
        `PeerLost`.

    Differences with the published code:
        Exactly ``share`` of the positions are drawn in each step; there each is drawn by itself. Worker 0 sends its
        positions there.

    References:
        EXO Labs. SPARTA, 2025, in the published code of the EXO gym. There is no paper with a number.

    Example:
        >>> SPARTA(share=0.01).period(8)
        1
    """

    share: float = 0.005

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigurationError(f"SPARTA(share={self.share}): needs a share in (0, 1]. Use 0.005.")

    def resolved(self, world_size: int) -> Self:
        return self

    def period(self, world_size: int) -> int:
        return 1

    def mixing(self, world_size: int) -> Mixing:
        left = math.sqrt(1.0 - self.share)  # of the distance, on average
        return Mixing(1.0 - left, math.ceil(math.log(1e-3) / math.log(left)) if left else 1)

    def init(self, worker: Worker) -> None:
        """Remember nothing."""

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        x = worker.x
        message = compressed(RandomK(self.share), x, worker)
        exchange = CompressedMean(worker, message)
        scratch = x.clone()
        message.decode_(message.payloads, scratch)
        answer = await exchange.request()
        x.add_(scratch, alpha=-1.0)
        exchange.add_(x, scratch, answer, 1.0)
