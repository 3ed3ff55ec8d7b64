"""Momentum tracking (Takezawa, Bao, Niwa, Sato, Yamada, 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import (
    AbstractGossip,
    Order,
    require_averager,
    require_momentum,
    require_order,
)
from lightning_decentral.averaging import AbstractAverager, Gossip
from lightning_decentral.protocol import Gradient, LocalStep, Start
from lightning_decentral.topology import AbstractTopology, TopologyLike, one_peer_or_complete
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class MomentumTracking(AbstractGossip):
    r"""Momentum tracking: workers follow the mean of all momenta, and reach the optimum whatever data each has.

    Update rule. Adapt then combine, ``order="atc"``, which is the paper's::

        u_i <- momentum * u_i + gradient_i(x_i)
        y_i <- y_i + u_i - u_i of the step before
        x_i <- x_i - learning_rate * y_i
        x_i, y_i <- sum_j W[i, j] x_j, sum_j W[i, j] y_j

    Adapt while combine, ``order="awc"``::

        u_i <- momentum * u_i + gradient_i(x_i)
        y_i <- sum_j W[i, j] y_j + u_i - u_i of the step before
        x_i <- sum_j W[i, j] x_j - learning_rate * y_i

    All are zero before the first step. The mean of the ``y`` is the mean of the momenta in each step. With momentum 0
    this is gradient tracking, of which the first order combines models after the update. On a graph that stays the
    same, momentum in the optimizer, applied to that, would come to the same models; on one that changes it would not.

    The momentum is the method's: your optimizer makes the step ``learning_rate * y``, so it is `torch.optim.SGD`
    without momentum; one with momentum is refused. Its weight decay is added after the tracker.

    Args:
        topology: doubly stochastic, constant or changing, directed or not, or a function of the number of workers. By
            default `OnePeerExponential` for 3 and more workers; `Complete` below.
        averager: how workers hear of models and trackers, by default as they are.
        momentum: the paper's beta, in [0, 1).
        order: ``"atc"``, the paper's, or ``"awc"``, which hides the exchange behind the gradient, and bears smaller
            learning rates.

    Cost:
        Two models to each out-neighbour per step, in one message: after the update, or beside the gradient. Extra
        memory: momentum and tracker (two copies, in float32 for half precision); no momentum in the optimizer. A lost
        peer raises `PeerLost`.

    References:
        Yuki Takezawa, Han Bao, Kenta Niwa, Ryoma Sato, Makoto Yamada. Momentum Tracking: Momentum Acceleration for
        Decentralized Deep Learning on Heterogeneous Data. TMLR 2023, arXiv:2209.15505.

    Example:
        >>> MomentumTracking().resolved(4)
        MomentumTracking(topology=OnePeerExponential(size=4))
    """

    brings_momentum = True
    exchanges_gradients = True
    remembers_gradients = True

    topology: TopologyLike = one_peer_or_complete
    averager: AbstractAverager = field(default=Gossip(), repr=False)
    momentum: float = field(default=0.9, repr=False)
    order: Order = field(default="atc", repr=False)

    def check(self, graph: AbstractTopology | None) -> None:
        require_averager("MomentumTracking", self.averager)
        require_momentum("MomentumTracking", "momentum", self.momentum)
        require_order("MomentumTracking", self.order)
        if graph is not None:
            self.averager.check(graph)

    def init(self, worker: Worker) -> None:
        worker.state["momentum"] = worker.x.zeros_like()
        worker.state["tracker"] = worker.x.zeros_like()
        self.averager.init(worker, worker.x.beside(worker.state["tracker"]), adds_up=True)

    async def step(self, worker: Worker) -> None:
        both = worker.x.beside(worker.state["tracker"])
        if self.order == "awc":
            average = await Start(self.averager.average(worker, self.graph, both))
            await Gradient()
            self.averager.combine_(worker, both, await average)
            await self._apply(worker)
        else:
            await Gradient()
            await self._apply(worker)
            self.averager.combine_(worker, both, await self.averager.average(worker, self.graph, both))

    async def _apply(self, worker: Worker) -> None:
        """Let the tracker follow the change of the momentum, and make the update with it."""
        tracker, momentum = worker.state["tracker"], worker.state["momentum"]
        tracker.add_(momentum, alpha=-1.0)
        momentum.mul_(self.momentum).add_(worker.gradient)
        tracker.add_(momentum)
        worker.gradient.copy_(tracker)  # a copy: clipping changes what is applied
        await LocalStep()
