"""D2: decentralized training over decentralized data (Tang et al., 2018)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lightning_decentral.algorithms.dpsgd import check_size
from lightning_decentral.averaging import neighbor_average
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

    Args:
        topology: a symmetric, constant graph whose smallest eigenvalue is above -1/3. ``None``: a lazy `Ring` for 3 and
            more workers; `Complete` below.

    Cost:
        One model sent to each neighbour per step, after the update: not hidden. Extra memory: the correction (one copy,
        float32 for half precision) and one receive buffer per neighbour, or one for all workers of the same
        host. A lost peer raises `PeerLost`.

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

    async def step(self, worker: Worker) -> None:
        assert self.topology is not None
        correction = worker.state["correction"]
        await Gradient()
        await LocalStep()  # x is psi now
        worker.x.add_swap_(correction)  # x is what is sent; the buffer keeps psi
        await neighbor_average(worker, self.topology, worker.x)
        correction.mul_(-1.0).add_(worker.x)  # x - psi, for the next step


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
