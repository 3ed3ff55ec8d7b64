"""Quasi-global momentum (Lin, Karimireddy, Stich, Jaggi, 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import AbstractGossip, require_averager, require_momentum
from lightning_decentral.averaging import AbstractAverager, Gossip
from lightning_decentral.protocol import Gradient, LocalStep
from lightning_decentral.topology import AbstractTopology, TopologyLike, ring_or_complete
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class QGDSGDm(AbstractGossip):
    r"""QG-DSGDm: decentralized SGD whose momentum follows where the averaged models really go.

    Update rule, with ``before`` the model at the beginning of the step, and momenta in the units of parameters::

        x_i <- before_i - learning_rate * gradient_i(before_i) - momentum * m_i
        x_i <- sum_j W[i, j] x_j
        m_i <- follow * m_i + (1 - follow) * (before_i - x_i)

    With ``nesterov=True`` the first line subtracts ``(1 + momentum) * learning_rate * gradient + momentum^2 * m``. A
    local momentum sums up a worker's own gradients, and multiplies the error of D-PSGD on data that differ by ``1 / (1
    - momentum)``; this one holds what gossip has made of them, and rests where D-PSGD without momentum does.

    The momentum is the method's: your optimizer makes the step ``learning_rate * gradient``, so it is `torch.optim.SGD`
    without momentum; one with momentum is refused. Its weight decay counts as a part of the gradient.

    Args:
        topology: doubly stochastic, constant or changing, or a function of the number of workers. By default the
            paper's `Ring` for 3 and more workers; `Complete` below.
        averager: how workers average; models as they are by default.
        momentum: the paper's beta, in [0, 1).
        follow: the paper's mu, in [0, 1); ``None``: as the momentum, which is the paper's.
        nesterov: whether the gradient is looked at from one step ahead.

    Cost:
        One model sent to each out-neighbour per step, after the update. Extra memory: the momentum, and the model of
        the step's beginning (two copies); no momentum in the optimizer. A lost peer raises `PeerLost`.

    References:
        Tao Lin, Sai Praneeth Karimireddy, Sebastian U. Stich, Martin Jaggi. Quasi-Global Momentum: Accelerating
        Decentralized Deep Learning on Heterogeneous Data. ICML 2021, arXiv:2102.04761.

    Example:
        >>> QGDSGDm(momentum=0.8).resolved(4)
        QGDSGDm(topology=Ring(size=4, lazy=False), momentum=0.8)
    """

    brings_momentum = True

    topology: TopologyLike = ring_or_complete
    averager: AbstractAverager = field(default=Gossip(), repr=False)
    momentum: float = field(default=0.9, repr=False)
    follow: float | None = field(default=None, repr=False)
    nesterov: bool = field(default=False, repr=False)

    def check(self, graph: AbstractTopology | None) -> None:
        require_averager("QGDSGDm", self.averager)
        require_momentum("QGDSGDm", "momentum", self.momentum)
        require_momentum("QGDSGDm", "follow", self._follow)
        if graph is not None:
            self.averager.check(graph)

    @property
    def _follow(self) -> float:
        return self.momentum if self.follow is None else self.follow

    def init(self, worker: Worker) -> None:
        worker.state["momentum"] = worker.x.zeros_like()
        self.averager.init(worker, worker.x)

    async def step(self, worker: Worker) -> None:
        x, momentum = worker.x, worker.state["momentum"]
        await Gradient()
        before = x.clone()
        await LocalStep()
        if self.nesterov:
            x.add_difference_(x, before, self.momentum)
        x.add_(momentum, alpha=-(self.momentum**2 if self.nesterov else self.momentum))
        self.averager.combine_(worker, x, await self.averager.average(worker, self.graph, x))
        momentum.mul_(self._follow).add_difference_(before, x, 1.0 - self._follow)
