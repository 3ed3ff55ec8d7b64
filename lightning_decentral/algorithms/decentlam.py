"""DecentLaM: decentralized momentum SGD for large batches (Yuan, Chen, Huang, Zhang, Pan, Xu, Yin, 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import AbstractGossip, require_averager, require_momentum
from lightning_decentral.averaging import AbstractAverager, Gossip
from lightning_decentral.errors import TopologyError
from lightning_decentral.protocol import Gradient, LocalStep
from lightning_decentral.topology import AbstractTopology, TopologyLike, ring_or_complete
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class DecentLaM(AbstractGossip):
    r"""DecentLaM: decentralized SGD with a momentum that adds no error on data that differ.

    Update rule, with momenta in the units of parameters::

        z_i <- x_i - learning_rate * gradient_i(x_i)
        m_i <- momentum * m_i + x_i - sum_j W[i, j] z_j
        x_i <- x_i - m_i

    The difference ``x - W z`` takes the place of the gradient. It is zero where D-PSGD without momentum rests, so that
    momentum changes how fast that point is reached, and not which. A local momentum multiplies the error by
    ``1 / (1 - momentum)``.

    The momentum is the method's: your optimizer makes the step ``learning_rate * gradient``, so it is `torch.optim.SGD`
    without momentum; one with momentum is refused. Its weight decay counts as a part of the gradient.

    Args:
        topology: a symmetric graph that stays the same, or a function of the number of workers. By default `Ring` for 3
            and more workers; `Complete` below.
        averager: how workers average; models as they are by default.
        momentum: the paper's beta, in [0, 1); 0 is D-PSGD with ``order="atc"``.

    Raises:
        TopologyError: if the graph changes with the step, or is directed.

    Cost:
        One model sent to each out-neighbour per step, after the update. Extra memory: the momentum, and the model of
        the step's beginning (two copies); no momentum in the optimizer. A lost peer raises `PeerLost`.

    References:
        Kun Yuan, Yiming Chen, Xinmeng Huang, Yingya Zhang, Pan Pan, Yinghui Xu, Wotao Yin. DecentLaM: Decentralized
        Momentum SGD for Large-batch Deep Training. ICCV 2021, arXiv:2104.11981.

    Example:
        >>> DecentLaM().resolved(4)
        DecentLaM(topology=Ring(size=4, lazy=False))
    """

    brings_momentum = True

    topology: TopologyLike = ring_or_complete
    averager: AbstractAverager = field(default=Gossip(), repr=False)
    momentum: float = field(default=0.9, repr=False)

    def check(self, graph: AbstractTopology | None) -> None:
        require_averager("DecentLaM", self.averager)
        require_momentum("DecentLaM", "momentum", self.momentum)
        if graph is None:
            return
        if graph.period != 1 or not graph.is_symmetric:
            kind = "directed" if graph.period == 1 else "changing with the step"
            raise TopologyError(
                f"DecentLaM needs a symmetric graph that stays the same, got {graph!r}, {kind}: its momentum remembers "
                "the differences of other rounds, and swings farther and farther. Use Ring, or QGDSGDm on this graph."
            )
        self.averager.check(graph)

    def init(self, worker: Worker) -> None:
        worker.state["momentum"] = worker.x.zeros_like()
        self.averager.init(worker, worker.x)

    async def step(self, worker: Worker) -> None:
        x, momentum = worker.x, worker.state["momentum"]
        await Gradient()
        before = x.clone()
        await LocalStep()  # x is z now
        self.averager.combine_(worker, x, await self.averager.average(worker, self.graph, x))
        momentum.mul_(self.momentum).add_difference_(before, x, 1.0)
        x.copy_(before).add_(momentum, alpha=-1.0)
