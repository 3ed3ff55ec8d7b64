"""EXTRA: an exact first-order algorithm (Shi, Ling, Wu, Yin, 2015)."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import AbstractGossip, require_averager
from lightning_decentral.averaging import AbstractAverager, Gossip
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.protocol import Gradient, LocalStep, Start
from lightning_decentral.topology import AbstractTopology, TopologyLike, ring_or_complete
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class Extra(AbstractGossip):
    r"""EXTRA: gossip whose fixed point is the optimum of the whole problem, with its messages hidden.

    Update rule, with ``pull_i`` what gossip moves a model by, and ``total_i`` the sum of all pulls of the steps
    before::

        pull_i <- sum_j W[i, j] (x_j - x_i)
        x_i    <- x_i + pull_i + total_i / 2 - learning_rate * gradient_i(x_i)

    This is the paper's ``x(t+2) = (I + W) x(t+1) - (I + W) / 2 x(t) - lr (g(t+1) - g(t))`` with its steps added up, so
    that it is right under a changing learning rate and for any optimizer. It is D2's relative: D2 (exact diffusion) on
    the graph ``(I + W) / 2`` averages what the update has made, EXTRA the models at which the gradients are taken. So
    it exchanges while the gradient is computed; D2 bears larger learning rates.

    The mean of all totals stays zero: two neighbours add the same numbers with opposite signs, and what rounding leaves
    out of ``x`` is added in the next step.

    Any optimizer may make the update. Momentum moves no fixed point. Adam does: its steps depend on the size of each
    worker's own gradient, which does not vanish.

    Args:
        topology: a symmetric, constant graph without the eigenvalue -1, or a function of the number of workers. By
            default `Ring` for 3 and more workers; `Complete` below.
        averager: how workers hear of each other, by default by whole models; `averaging.Choco` with a fine or unbiased
            compressor keeps the optimum exact.

    Cost:
        One model sent to each neighbour per step, hidden behind forward and backward. Extra memory: the sum of the
        pulls (one copy, float32 for half precision), what rounding left out (in bfloat16), what is sent, two copies
        during the average, and one receive buffer per neighbour. A lost peer raises `PeerLost`.

    Raises:
        TopologyError: if the graph changes with the step, is not symmetric, or has the eigenvalue -1.
        ConfigurationError: for an averager by which neighbours may hear of a model a step late, or later.

    References:
        Wei Shi, Qing Ling, Gang Wu, Wotao Yin. EXTRA: An Exact First-Order Algorithm for Decentralized Consensus
        Optimization. SIAM Journal on Optimization 2015, arXiv:1404.6264.

    Example:
        >>> Extra().resolved(4)
        Extra(topology=Ring(size=4, lazy=False))
    """

    topology: TopologyLike = ring_or_complete
    averager: AbstractAverager = field(default=Gossip(), repr=False)

    def check(self, graph: AbstractTopology | None) -> None:
        require_averager("Extra", self.averager)
        if self.averager.lag >= 1.0:
            raise ConfigurationError(
                f"Extra got averager={self.averager!r}, by which neighbours may know a model {self.averager.lag:.2g} "
                "steps late, needs less than 1: it adds up what comes late. Use a finer compressor, as Int8(), or an "
                "unbiased one, as Int8(stochastic=True)."
            )
        if graph is None:
            return
        if graph.period != 1 or not graph.is_symmetric:
            kind = "directed" if graph.period == 1 else "changing with the step"
            raise TopologyError(
                f"Extra needs a symmetric mixing matrix that stays the same, got {graph!r}, {kind}. Use Ring or "
                "FromGraph, or GradientTracking, which takes such graphs."
            )
        smallest = 1 - self.averager.share * (1 - graph.smallest_eigenvalue)
        if smallest <= -1 + 1e-9:
            raise TopologyError(
                f"Extra needs a mixing matrix with all eigenvalues above -1, got {graph!r} with {smallest:.6f}: it "
                "would swing for ever. Use a lazy graph, as Ring(n, lazy=True)."
            )
        self.averager.check(graph)

    def init(self, worker: Worker) -> None:
        self.averager.init(worker, worker.x, adds_up=True)
        worker.state["total"] = worker.x.zeros_like()
        worker.state["rest"] = worker.x.remainder_like()

    async def step(self, worker: Worker) -> None:
        x, total, rest = worker.x, worker.state["total"], worker.state["rest"]
        sent = x.clone()  # user code may change x meanwhile, and pulls have to be of what neighbours know
        exchange = await Start(self.averager.exchange(worker, self.graph, sent))
        await Gradient()
        pull = total.zeros_like()
        self.averager.pull_(worker, sent, await exchange, pull, x.remainder_like())
        move = pull.clone().add_(total, alpha=0.5)
        total.add_(pull)
        x.add_rest_(move, rest)
        await LocalStep()
