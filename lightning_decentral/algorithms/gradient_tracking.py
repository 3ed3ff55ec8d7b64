"""Gradient tracking (Nedić, Olshevsky, Shi, 2017; Pu, Nedić, 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import AbstractGossip, Order, require_averager, require_order
from lightning_decentral.averaging import AbstractAverager, Gossip, neighbor_average
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import Gradient, LocalStep, Start
from lightning_decentral.topology import AbstractTopology, TopologyLike, one_peer_or_complete
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class GradientTracking(AbstractGossip):
    r"""Gradient tracking (DIGing, DSGT): gossip of models, and of an estimate of the mean gradient that is applied.

    Update rule. Adapt while combine, ``order="awc"``, which is DIGing::

        y_i <- sum_j W[i, j] y_j + gradient_i(x_i) - gradient_i of the step before
        x_i <- sum_j W[i, j] x_j - learning_rate * y_i

    Adapt then combine, ``order="atc"``::

        y_i <- sum_j W[i, j] (y_j + gradient_j(x_j) - gradient_j of the step before)
        x_i <- sum_j W[i, j] (x_j - learning_rate * y_j)

    Trackers and gradients before the first step are zero. The mean of all trackers is the mean of all gradients in
    every step, so that nothing moves only where the gradient of the whole problem is zero.

    Any optimizer may apply ``y``: its momentum, and Adam's moments, are those of the tracker, and stay local. Clipping
    is of what is applied, and does not change the tracker. Weight decay of the optimizer is not tracked: each worker
    adds its own, which is the same once they agree.

    Args:
        topology: any doubly stochastic graph, also a directed one or one that changes with the step, or a function of
            the number of workers. By default `OnePeerExponential` for 3 and more workers; `Complete` below.
        averager: how workers hear of models and trackers, by default as they are; `averaging.Choco` compresses both.
        order: ``"awc"``, with both exchanges hidden behind the gradient, or ``"atc"``, which bears larger learning
            rates and exchanges after the gradient, twice in turn.

    Cost:
        Two models sent to each out-neighbour per step: in one message beside forward and backward, or in two after
        them. Extra memory: tracker and last gradient (two copies, in float32 for half precision), and the receive
        buffers. A lost peer raises `PeerLost`.

    Raises:
        ConfigurationError: for an averager with memory under ``order="atc"``.

    References:
        Angelia Nedić, Alex Olshevsky, Wei Shi. Achieving Geometric Convergence for Distributed Optimization over
        Time-Varying Graphs. SIAM Journal on Optimization 2017, arXiv:1607.03218. Shi Pu, Angelia Nedić. Distributed
        Stochastic Gradient Tracking Methods. Mathematical Programming 2021, arXiv:1805.11454.

    Example:
        >>> GradientTracking(order="atc").resolved(4)
        GradientTracking(topology=OnePeerExponential(size=4), order='atc')
    """

    exchanges_gradients = True
    remembers_gradients = True

    topology: TopologyLike = one_peer_or_complete
    averager: AbstractAverager = field(default=Gossip(), repr=False)
    order: Order = field(default="awc", repr=False)

    def check(self, graph: AbstractTopology | None) -> None:
        require_averager("GradientTracking", self.averager)
        require_order("GradientTracking", self.order)
        if self.order == "atc" and self.averager != Gossip():
            raise ConfigurationError(
                f"GradientTracking got averager={self.averager!r} with order='atc', where trackers and models travel "
                "one after the other, needs one value that is averaged. Use order='awc', or leave the averager out."
            )
        if graph is not None:
            self.averager.check(graph)

    def init(self, worker: Worker) -> None:
        worker.state["tracker"] = worker.x.zeros_like()
        worker.state["gradient"] = worker.x.zeros_like()
        self.averager.init(worker, worker.x.beside(worker.state["tracker"]), adds_up=True)

    async def step(self, worker: Worker) -> None:
        tracker = worker.state["tracker"]
        if self.order == "awc":
            both = worker.x.beside(tracker)
            average = await Start(self.averager.average(worker, self.graph, both))
            await Gradient()
            self.averager.combine_(worker, both, await average)
            _track(worker)
            await self._apply(worker)
        else:
            await Gradient()
            _track(worker)
            await neighbor_average(worker, self.graph, tracker)
            await self._apply(worker)
            await neighbor_average(worker, self.graph, worker.x)

    async def _apply(self, worker: Worker) -> None:
        worker.gradient.copy_(worker.state["tracker"])  # a copy: clipping changes what is applied
        await LocalStep()


def _track(worker: Worker) -> None:
    """Let the tracker follow the change of the gradient; of one worker alone it is the gradient, bit for bit."""
    tracker, before = worker.state["tracker"], worker.state["gradient"]
    tracker.add_(before, alpha=-1.0).add_(worker.gradient)
    before.copy_(worker.gradient)
