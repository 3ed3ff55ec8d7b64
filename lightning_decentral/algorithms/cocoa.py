"""CoCoA: communication-efficient distributed dual coordinate ascent, by averaging (Jaggi et al., 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lightning_decentral.algorithms.primal_dual import AbstractPrimalDual
from lightning_decentral.protocol import AllReduce, Gradient, LocalStep
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class CoCoA(AbstractPrimalDual):
    r"""CoCoA: workers take many steps in their own dual coordinates, and the mean of their changes counts.

    Of worker ``k`` of ``K``, which has the dual variables ``alpha_[k]``; ``Delta`` are ``local_steps`` steps in them
    from ``w``, as if it were alone::

        alpha_[k] <- alpha_[k] + (1/K) Delta_k
        w         <- w + (1/K) sum_k  1 / (lambda n) sum_{i in k} Delta_k,i x_i

    Args:
        local_steps: between two exchanges: how many, or as a share of the worker's rows in (0, 1]; ``None``: as many
            as it has rows.

    Cost:
        An all-reduce of the model per step, ``2 (K - 1) / K`` models sent by each worker. Nothing is kept. Each step
        takes as long as its slowest worker. A lost peer raises `PeerLost`.

    Differences with the paper:
        Any number of local steps in a random order of the rows; the paper draws each row anew.

    References:
        Martin Jaggi, Virginia Smith, Martin Takáč, Jonathan Terhorst, Sanjay Krishnan, Thomas Hofmann, Michael I.
        Jordan. Communication-Efficient Distributed Dual Coordinate Ascent. NeurIPS 2014, arXiv:1409.1458.

    Example:
        >>> CoCoA(local_steps=100).damping(8)
        0.125
    """

    def resolved(self, world_size: int) -> Self:
        return self

    def damping(self, trainers: int) -> float:
        """Return ``1 / K``: changes are averaged."""
        return 1.0 / trainers

    def init(self, worker: Worker) -> None:
        """Remember nothing."""

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        if worker.world_size > 1:
            await AllReduce(worker.x)
