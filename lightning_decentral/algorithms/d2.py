"""D2: decentralized training over decentralized data (Tang et al., 2018)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lightning_decentral.algorithms.dpsgd import check_size
from lightning_decentral.averaging import neighbor_exchange
from lightning_decentral.errors import TopologyError
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep
from lightning_decentral.topology import AbstractTopology, Complete, Ring
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class D2(AbstractAlgorithm):
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
        topology: a symmetric, constant graph whose smallest eigenvalue is above -1/3. ``None``: a lazy `Ring` for 3 and
            more workers; `Complete` below.

    Cost:
        One model sent to each neighbour per step, after the update: not hidden. Extra memory: the correction (one copy,
        float32 for half precision), what rounding left out (in bfloat16), and one receive buffer per neighbour, or two
        for all workers of the same host. A lost peer raises `PeerLost`.

    Raises:
        TopologyError: if the graph changes with the step, is not symmetric, or has an eigenvalue at or below -1/3.

    References:
        Hanlin Tang, Xiangru Lian, Ming Yan, Ce Zhang, Ji Liu. D2: Decentralized Training over Decentralized Data.
        ICML 2018, arXiv:1803.07068.

    Example:
        >>> D2().resolved(4)
        D2(topology=Ring(size=4, lazy=True))
    """

    topology: AbstractTopology | None = None

    def __post_init__(self) -> None:
        if self.topology is not None:
            _check_spectrum(self.topology)

    def resolved(self, world_size: int) -> D2:
        topology = self.topology
        if topology is None:
            topology = Ring(world_size, lazy=True) if world_size >= 3 else Complete(world_size)
        check_size(self, topology, world_size)
        return dataclasses.replace(self, topology=topology)

    def init(self, worker: Worker) -> None:
        worker.state["correction"] = worker.x.zeros_like()
        worker.state["rest"] = worker.x.remainder_like()

    async def step(self, worker: Worker) -> None:
        assert self.topology is not None
        correction, rest = worker.state["correction"], worker.state["rest"]
        await Gradient()
        await LocalStep()  # x is psi now
        worker.x.add_rest_(correction, rest)  # what is sent
        received = await neighbor_exchange(worker, self.topology, worker.x)
        weights = self.topology.weights(worker.rank, worker.step)
        worker.x.pull_([(theirs, weights[source]) for source, theirs in received.items()], correction, rest)


def _check_spectrum(topology: AbstractTopology) -> None:
    advice = "Use a lazy graph, as Ring(n, lazy=True), or FromGraph(graph, lazy=True)"
    if topology.period != 1 or not topology.is_symmetric:
        kind = "directed" if topology.period == 1 else "changing with the step"
        raise TopologyError(
            f"D2 needs a symmetric mixing matrix that stays the same, got {topology!r}, {kind}. {advice}."
        )
    smallest = topology.smallest_eigenvalue
    if smallest <= -1 / 3 + 1e-9:
        raise TopologyError(
            f"D2 needs a mixing matrix with all eigenvalues above -1/3, got {topology!r} with {smallest:.6f}: it would "
            f"diverge. {advice}."
        )
