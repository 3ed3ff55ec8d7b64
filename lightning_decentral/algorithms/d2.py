"""D2: decentralized training over decentralized data (Tang et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_decentral.algorithms.base import AbstractGossip, require_averager
from lightning_decentral.averaging import AbstractAverager, Gossip
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.protocol import Gradient, LocalStep
from lightning_decentral.topology import AbstractTopology, TopologyLike, lazy_ring_or_complete
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class D2(AbstractGossip):
    r"""D2 (exact diffusion): gossip whose fixed point is the optimum even if every worker has other data.

    Update rule, with ``psi_i`` what the local optimizer makes of ``x_i``::

        psi_i <- x_i - learning_rate * gradient_i(x_i)
        x_i   <- sum_j W[i, j] (psi_j + x_j - psi_j_of_the_step_before)

    The correction ``x - psi_before`` is zero in the first step. In this form it is right under a changing learning
    rate and for any optimizer (the paper's ``2 x(t) - x(t-1) - lr g(t) + lr g(t-1)`` with each gradient's own learning
    rate).

    The mean of all corrections must stay zero: it would be added to the models in every step. As ``x - psi_before`` is
    ``correction_i + sum_j W[i, j] (sent_j - sent_i)``, with ``sent = psi + correction``, the corrections are kept as
    sums of such differences, of which two neighbours add the same numbers with opposite signs. What rounding leaves
    out of ``x`` is remembered and added in the next step. So small learning rates and bfloat16 come as near the
    optimum as with synchronous SGD.

    Args:
        topology: a symmetric, constant graph whose smallest eigenvalue is above -1/3, or a function of the number of
            workers. By default a lazy `Ring` for 3 and more workers; `Complete` below.
        averager: how workers hear of each other, by default by whole models. `averaging.Choco` with a compressor that
            is fine or unbiased: the optimum stays exact. `averaging.Moniqua`: up to the step of its lattice.

    Cost:
        One model sent to each neighbour per step, after the update: not hidden. Extra memory: the correction (one copy,
        float32 for half precision), what rounding left out (in bfloat16), and one receive buffer per neighbour, or two
        for all workers of the same host. A lost peer raises `PeerLost`.

    Raises:
        TopologyError: if the graph changes with the step, is not symmetric, or has an eigenvalue at or below -1/3.
        ConfigurationError: for an averager by which neighbours may hear of a model a step late, or later.

    References:
        Hanlin Tang, Xiangru Lian, Ming Yan, Ce Zhang, Ji Liu. D2: Decentralized Training over Decentralized Data.
        ICML 2018, arXiv:1803.07068.

    Example:
        >>> D2().resolved(4)
        D2(topology=Ring(size=4, lazy=True))
    """

    topology: TopologyLike = lazy_ring_or_complete
    averager: AbstractAverager = field(default=Gossip(), repr=False)

    def check(self, graph: AbstractTopology | None) -> None:
        require_averager("D2", self.averager)
        if self.averager.lag >= 1.0:
            raise ConfigurationError(
                f"D2 got averager={self.averager!r}, by which neighbours may know a model {self.averager.lag:.2g} "
                "steps late, needs less than 1: corrections add up what comes late, and swing farther and farther at "
                "every step size. Use a finer compressor, as Int8(), or an unbiased one, as Int8(stochastic=True)."
            )
        if graph is not None:
            _check_spectrum(graph, self.averager)
            self.averager.check(graph)

    def init(self, worker: Worker) -> None:
        self.averager.init(worker, worker.x, adds_up=True)
        worker.state["correction"] = worker.x.zeros_like()
        worker.state["rest"] = worker.x.remainder_like()

    async def step(self, worker: Worker) -> None:
        correction, rest = worker.state["correction"], worker.state["rest"]
        await Gradient()
        await LocalStep()  # x is psi now
        worker.x.add_rest_(correction, rest)  # what is sent
        heard = await self.averager.exchange(worker, self.graph, worker.x)
        self.averager.pull_(worker, worker.x, heard, correction, rest)


def _check_spectrum(graph: AbstractTopology, averager: AbstractAverager) -> None:
    advice = "Use a lazy graph, as Ring(n, lazy=True), or FromGraph(graph, lazy=True)"
    if graph.period != 1 or not graph.is_symmetric:
        kind = "directed" if graph.period == 1 else "changing with the step"
        raise TopologyError(f"D2 needs a symmetric mixing matrix that stays the same, got {graph!r}, {kind}. {advice}.")
    smallest = 1 - averager.share * (1 - graph.smallest_eigenvalue)
    if smallest <= -1 / 3 + 1e-9:
        raise TopologyError(
            f"D2 needs a mixing matrix with all eigenvalues above -1/3, got {graph!r} with {smallest:.6f}: it would "
            f"diverge. {advice}."
        )
