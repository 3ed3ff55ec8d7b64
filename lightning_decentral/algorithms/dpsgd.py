"""Decentralized parallel SGD (Lian et al., 2017)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lightning_decentral.averaging import neighbor_average
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, Gradient, LocalStep, Start
from lightning_decentral.topology import AbstractTopology, Complete, OnePeerExponential
from lightning_decentral.worker import Worker


@dataclass(frozen=True)
class DPSGD(AbstractAlgorithm):
    r"""Decentralized parallel SGD: average with the neighbours *while* the gradient is computed.

    Update rule, with the gradient taken before the averaging (adapt while combine)::

        x_i <- sum_j W[i, j] x_j - learning_rate * gradient_i(x_i)

    Any optimizer may apply the gradient; its state (momentum) stays local. The mean of all workers moves by the mean
    gradient exactly, for every doubly stochastic ``W``.

    Args:
        topology: the graph and its mixing matrix. ``None``: `OnePeerExponential`, one message per step, for 3 and more
            workers; `Complete` below. The paper uses a ring.

    Cost:
        One model sent to each out-neighbour per step, hidden behind forward and backward, averaging included.
        Extra memory: one receive buffer per in-neighbour, or one for all workers of the same host. A worker waits for
        its neighbours only. A lost peer raises `PeerLost`.

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
        >>> DPSGD(topology=Ring(8)).resolved(8)
        DPSGD(topology=Ring(size=8, lazy=False))
    """

    topology: AbstractTopology | None = None

    def resolved(self, world_size: int) -> DPSGD:
        return dataclasses.replace(self, topology=one_peer_or(self.topology, self, world_size))

    def init(self, worker: Worker) -> None:
        pass

    async def step(self, worker: Worker) -> None:
        assert self.topology is not None
        average = await Start(neighbor_average(worker, self.topology, worker.x))
        await Gradient()
        await average
        await LocalStep()


def one_peer_or(topology: AbstractTopology | None, algorithm: AbstractAlgorithm, world_size: int) -> AbstractTopology:
    """A checked topology, or the default of methods that wait for one message: one peer per step, all below three."""
    if topology is None:
        topology = OnePeerExponential(world_size) if world_size >= 3 else Complete(world_size)
    check_size(algorithm, topology, world_size)
    return topology


def check_size(algorithm: AbstractAlgorithm, topology: AbstractTopology, world_size: int) -> None:
    """Refuse a topology for another number of workers."""
    if topology.size != world_size:
        raise ConfigurationError(
            f"{type(algorithm).__name__} got {topology!r} for {topology.size} workers, but {world_size} take part. "
            f"Make the topology for {world_size} workers, or leave it out to get the default one."
        )
    if not topology.is_connected:
        raise ConfigurationError(
            f"{type(algorithm).__name__} needs a connected graph, got {topology!r}: some workers would never hear of "
            "each other. Add edges until it is connected."
        )
