"""Gossip-PGA: gossip SGD with periodic global averaging (Chen, Yuan, Zhang, Pan, Xu, Yin, 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import AbstractGossip, Order, require_averager, require_order
from lightning_decentral.algorithms.dpsgd import gossip_step
from lightning_decentral.averaging import AbstractAverager, Gossip
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, LocalStep, Mixing
from lightning_decentral.topology import AbstractTopology, TopologyLike, ring_or_complete
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class GossipPGA(AbstractGossip):
    r"""Gossip-PGA: D-PSGD, and an exact average of all models after every few steps.

    Update rule, for the steps t = 1, 2, ...::

        x_i <- sum_j W[i, j] (x_j - learning_rate * gradient_j(x_j))    where t is no multiple of `every`
        x_i <- mean over all j of (x_j - learning_rate * gradient_j(x_j))    where it is

    With ``order="awc"`` the first line is D-PSGD's, which averages while the gradient is computed; the second stays. A
    graph that mixes badly then costs no more than the steps between two exact averages.

    Any optimizer may make the updates; its state stays local. Momentum multiplies what is left of D-PSGD's error.

    Args:
        topology: doubly stochastic, or a function of the number of workers. By default the paper's `Ring` for 3 and
            more workers; `Complete` below.
        averager: how neighbours average in between; models as they are by default.
        every: steps from one exact average to the next, the paper's H, at least 1; 6 there.
        order: ``"atc"``, the paper's, or ``"awc"``, which hides the exchanges in between.

    Cost:
        One model to each out-neighbour in all steps but each H-th, ``2 (n - 1) / n`` models there, which is not hidden.
        Extra memory: receive buffers. A lost peer raises `PeerLost`.

    References:
        Yiming Chen, Kun Yuan, Yingya Zhang, Pan Pan, Yinghui Xu, Wotao Yin. Accelerating Gossip SGD with Periodic
        Global Averaging. ICML 2021, arXiv:2105.09080.

    Example:
        >>> GossipPGA().resolved(4)
        GossipPGA(topology=Ring(size=4, lazy=False), every=6)
    """

    topology: TopologyLike = ring_or_complete
    averager: AbstractAverager = field(default=Gossip(), repr=False)
    every: int = 6
    order: Order = field(default="atc", repr=False)

    def check(self, graph: AbstractTopology | None) -> None:
        require_averager("GossipPGA", self.averager)
        require_order("GossipPGA", self.order)
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ConfigurationError(
                f"GossipPGA got every={self.every!r}, needs a number of steps, at least 1. Use 1 for local SGD that "
                "averages in each step, 6 as in the paper."
            )
        if graph is not None:
            self.averager.check(graph)

    def period(self, world_size: int) -> int:
        return math.lcm(self.every, super().period(world_size))

    def mixing(self, world_size: int) -> Mixing:
        rounds = super().mixing(world_size).rounds_to_consensus
        return Mixing(1.0, min(rounds, self.every))

    def for_buffers(self) -> AbstractAlgorithm:
        """Return the same rounds, of plain averages beside the gradients."""
        return GossipPGA(self.topology, every=self.every, order="awc")

    def init(self, worker: Worker) -> None:
        self.averager.init(worker, worker.x)

    async def step(self, worker: Worker) -> None:
        if (worker.step + 1) % self.every:
            await gossip_step(worker, self.graph, self.averager, self.order)
        else:
            await Gradient()
            await LocalStep()
            await AllReduce(worker.x)
