"""Decentralized parallel SGD (Lian et al., 2017)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import AbstractGossip, Order, require_averager, require_order
from lightning_decentral.algorithms.open_gossip import OpenGossip
from lightning_decentral.averaging import AbstractAverager, Gossip
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm, Gradient, LocalStep, Start
from lightning_decentral.topology import AbstractTopology, TopologyLike, one_peer_or_complete
from lightning_decentral.worker import Worker

_AWC: Order = "awc"


async def gossip_step(worker: Worker, graph: AbstractTopology, averager: AbstractAverager, order: Order) -> None:
    """Make one step of D-PSGD."""
    if order == "awc":
        average = await Start(averager.average(worker, graph, worker.x))
        await Gradient()
        averager.combine_(worker, worker.x, await average)
        await LocalStep()
    else:
        await Gradient()
        await LocalStep()
        averager.combine_(worker, worker.x, await averager.average(worker, graph, worker.x))


class AbstractDPSGD(AbstractGossip):
    """The step of D-PSGD, whatever the messages of its averager are: CHOCO-SGD and Moniqua are this too.

    Attributes:
        order: adapt while combine, or adapt then combine.
    """

    order = _AWC

    @property
    @abstractmethod
    def averager(self) -> AbstractAverager:
        """How the workers average with their neighbours."""

    def check(self, graph: AbstractTopology | None) -> None:
        averager = self.averager  # which checks itself
        require_averager(type(self).__name__, averager)
        require_order(type(self).__name__, self.order)
        if graph is not None:
            averager.check(graph)

    def init(self, worker: Worker) -> None:
        self.averager.init(worker, worker.x)

    async def step(self, worker: Worker) -> None:
        await gossip_step(worker, self.graph, self.averager, self.order)

    def opened(self) -> AbstractAsynchronousAlgorithm:
        if self.averager != Gossip() or self.stochastic != "doubly":
            return super().opened()
        self.among((0,), 1)  # refuses a topology of one number of workers
        return OpenGossip(self, self.order)


@dataclass(frozen=True, repr=False)
class DPSGD(AbstractDPSGD):
    r"""Decentralized parallel SGD: average with the neighbours *while* the gradient is computed.

    Update rule, with the gradient taken before the averaging (adapt while combine)::

        x_i <- sum_j W[i, j] x_j - learning_rate * gradient_i(x_i)

    or, with ``order="atc"``, averaging what the update has made (adapt then combine)::

        x_i <- sum_j W[i, j] (x_j - learning_rate * gradient_j(x_j))

    Any optimizer may apply the gradient; its state (momentum) stays local. The mean of all workers moves by the mean
    gradient exactly, for every doubly stochastic ``W``.

    Args:
        topology: the graph and its mixing matrix, as a topology or a function of the number of workers. By default
            `OnePeerExponential`, one message per step, for 3 and more workers; `Complete` below. The paper uses a ring.
        averager: how workers average with their neighbours. By default they send their models as they are; with
            `averaging.Choco` this is `ChocoSGD`, with `averaging.Moniqua` it is `MoniquaSGD`.
        order: ``"awc"``, the paper's, with the exchange hidden; or ``"atc"``, which on the complete graph is
            synchronous SGD, with momentum too, and exchanges after the update.

    Cost:
        One model sent to each out-neighbour per step, hidden behind forward and backward, averaging included.
        Extra memory: one receive buffer per in-neighbour, or one for all workers of the same host. A worker waits for
        its neighbours only. A lost peer raises `PeerLost`, but with `OpenStrategy`, where all wait for each other in
        each step, and the others go on without it (`OpenGossip`).

    Not to be confused with:
        Synchronous SGD, even on the complete graph: each worker keeps its own last gradient, so workers differ. On
        data that differs between workers the fixed point is off by a term proportional to the learning rate; `D2`
        removes it.

    References:
        Xiangru Lian, Ce Zhang, Huan Zhang, Cho-Jui Hsieh, Wei Zhang, Ji Liu. Can Decentralized Algorithms Outperform
        Centralized Algorithms? A Case Study for Decentralized Parallel Stochastic Gradient Descent. NeurIPS 2017,
        arXiv:1705.09056.

    Example:
        >>> from lightning_decentral.topology import Ring
        >>> DPSGD(Ring).resolved(8)
        DPSGD(topology=Ring(size=8, lazy=False))
    """

    topology: TopologyLike = one_peer_or_complete
    averager: AbstractAverager = field(default=Gossip(), repr=False)
    order: Order = field(default="awc", repr=False)
