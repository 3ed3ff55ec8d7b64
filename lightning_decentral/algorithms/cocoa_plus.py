"""CoCoA+: distributed dual coordinate ascent whose workers' changes are added (Ma et al., 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lightning_decentral.algorithms.primal_dual import AbstractPrimalDual, require_damping
from lightning_decentral.protocol import AllReduce, Gradient, LocalStep
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class CoCoAPlus(AbstractPrimalDual):
    r"""CoCoA+: the changes of all workers are added, each of which expects the others to do as much as itself.

    Of worker ``k`` of ``K``, with ``sigma' = gamma K``; ``Delta`` are ``local_steps`` steps in its dual coordinates,
    which see ``v_k``::

        v_k       <- w + sigma' / (lambda n) sum_{i in k} Delta_k,i x_i          # as the steps are made
        alpha_[k] <- alpha_[k] + gamma Delta_k
        w         <- w + gamma sum_k 1 / (lambda n) sum_{i in k} Delta_k,i x_i  =  (1/K) sum_k v_k

    Args:
        gamma: share of the changes that counts, in (0, 1]; the paper's 1. At ``1 / K`` it is `CoCoA`.
        local_steps: between two exchanges: how many, or as a share of the worker's rows in (0, 1]; ``None``: as many
            as it has rows.

    Cost:
        An all-reduce of the model per step, ``2 (K - 1) / K`` models sent by each worker. Nothing is kept. Each step
        takes as long as its slowest worker. A lost peer raises `PeerLost`.

    Differences with the paper:
        The local solver is dual coordinate ascent, in a random order of the rows.

    References:
        Chenxin Ma, Virginia Smith, Martin Jaggi, Michael I. Jordan, Peter Richtárik, Martin Takáč. Adding vs. Averaging
        in Distributed Primal-Dual Optimization. ICML 2015, arXiv:1502.03508.

    Example:
        >>> CoCoAPlus().damping(8)
        1.0
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_damping("CoCoAPlus", self.gamma)

    def resolved(self, world_size: int) -> Self:
        return self

    def damping(self, trainers: int) -> float:
        """Return ``gamma``."""
        return self.gamma

    def init(self, worker: Worker) -> None:
        """Remember nothing."""

    async def step(self, worker: Worker) -> None:
        await Gradient()
        await LocalStep()
        if worker.world_size > 1:
            await AllReduce(worker.x)
