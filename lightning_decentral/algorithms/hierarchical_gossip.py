"""Gossip between hosts, exact inside each: what all large decentralized runs do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from lightning_decentral.algorithms.base import Order, as_written, require_averager, require_order
from lightning_decentral.averaging import AbstractAverager, Gossip, neighbor_average
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, LocalStep, Mixing, Start
from lightning_decentral.topology import AbstractTopology, Leaders, TopologyLike, one_peer_or_complete
from lightning_decentral.topology.of_size import comparable, of_size
from lightning_decentral.worker import Worker


@dataclass(frozen=True, repr=False)
class HierarchicalGossip(AbstractAlgorithm):
    r"""Hierarchical gossip: D-PSGD of hosts, whose workers have one model and the mean of their gradients.

    With W of the hosts, a worker i of host h, and ``gradient_h`` the mean of the gradients of all workers of h::

        x_i <- sum_k W[h, k] x_k - learning_rate * gradient_h                 # order="awc"
        x_i <- sum_k W[h, k] (x_k - learning_rate * gradient_k)               # order="atc"

    The first worker of each host exchanges with those of other hosts, in the first order while gradients are computed;
    the others are given what comes of it. All workers of a host keep the same model to the last bit, and any optimizer
    has the same state on them. Gradient noise and differences of data inside a host average out before any gossip.

    Args:
        topology: the graph of the *hosts*, as a topology or a function of their number. By default
            `OnePeerExponential` for 3 and more hosts; `Complete` below.
        workers_per_host: how many workers each host has, whose ranks follow each other, as torchrun numbers them.
            ``None``: as many as the trainer starts on each node; in the simulator and the planner the workers of each
            site of the cluster; 1 where nobody says.
        averager: how hosts average; models as they are by default.
        order: ``"awc"``, with the exchange between hosts hidden, or ``"atc"``.

    Raises:
        ConfigurationError: if the hosts would not have equally many workers.

    Cost:
        Between hosts: one model to each out-neighbour per step, whatever the number of workers. Inside: an all-reduce
        of gradients and one of models. Extra memory: the gradients, contiguous, and on the first worker of a host
        receive buffers. A lost worker raises `PeerLost`.

    References:
        No paper of its own. Assran, Loizou, Ballas, Rabbat, *Stochastic Gradient Push for Distributed Deep Learning*,
        ICML 2019, arXiv:1811.10792, train so, with 8 GPUs in each host; the matrix of all workers is that of the hosts,
        each entry spread evenly over their workers.

    Example:
        >>> HierarchicalGossip(workers_per_host=4).resolved(16)
        HierarchicalGossip(topology=OnePeerExponential(size=4), workers_per_host=4)
    """

    exchanges_gradients = True

    topology: TopologyLike = one_peer_or_complete
    workers_per_host: int | None = None
    averager: AbstractAverager = field(default=Gossip(), repr=False)
    order: Order = field(default="awc", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "topology", comparable("HierarchicalGossip", self.topology))
        require_averager("HierarchicalGossip", self.averager)
        require_order("HierarchicalGossip", self.order)
        count: Any = self.workers_per_host
        if count is not None and not (isinstance(count, int) and count >= 1):
            raise ConfigurationError(
                f"HierarchicalGossip got workers_per_host={count!r}, needs a whole number of at least 1. Leave it out: "
                "it is as many as the trainer starts on each node."
            )

    def __repr__(self) -> str:
        return as_written(self)

    def on_hosts(self, workers_per_host: int) -> Self:
        if self.workers_per_host is not None:
            return self
        return dataclasses.replace(self, workers_per_host=workers_per_host)

    def resolved(self, world_size: int) -> Self:
        members = self.workers_per_host or 1
        if world_size % members:
            raise ConfigurationError(
                f"HierarchicalGossip got {world_size} workers on hosts of {members}, needs equally many on each. Start "
                f"{world_size - world_size % members or members}, or another workers_per_host."
            )
        graph = of_size("HierarchicalGossip", self.topology, world_size // members)
        self.averager.check(graph)
        return dataclasses.replace(self, topology=graph, workers_per_host=members)

    def period(self, world_size: int) -> int:
        return self.hosts.period or 1

    def mixing(self, world_size: int) -> Mixing:
        if world_size == self.workers_per_host:
            return Mixing(1.0, 1)
        return Mixing(self.hosts.spectral_gap, self.hosts.rounds_to_consensus())

    @property
    def hosts(self) -> AbstractTopology:
        """The graph of the hosts, once the number of workers is known."""
        assert isinstance(self.topology, AbstractTopology)
        return self.topology

    @cached_property
    def leaders(self) -> Leaders:
        """The graph of all workers; made once, since each of its rounds is built and checked once."""
        return Leaders(self.hosts, self.workers_per_host or 1)

    def host_of(self, worker: Worker) -> tuple[tuple[int, ...], bool]:
        """Return the workers of a worker's host, and whether it is the first of them."""
        members = self.workers_per_host or 1
        first = worker.rank - worker.rank % members
        return tuple(range(first, first + members)), worker.rank == first

    def for_buffers(self) -> AbstractAlgorithm:
        """Return the mean of each host, and gossip of these means, after each step."""
        return BuffersOfHosts(self)

    def init(self, worker: Worker) -> None:
        self.averager.init(worker, worker.x)

    async def step(self, worker: Worker) -> None:
        host, leads = self.host_of(worker)
        graph, x = self.leaders, worker.x
        hidden = leads and self.order == "awc"
        average = await Start(self.averager.average(worker, graph, x)) if hidden else None
        await Gradient()
        await AllReduce(worker.gradient, host)
        if self.order == "atc":
            await LocalStep()
        if average is not None:
            self.averager.combine_(worker, x, await average)
        elif leads:
            self.averager.combine_(worker, x, await self.averager.average(worker, graph, x))
        await AllReduce(x, host, weight=1.0 if leads else 0.0)
        if self.order == "awc":
            await LocalStep()


@dataclass(frozen=True)
class BuffersOfHosts(AbstractAlgorithm):
    """Averages, as hierarchical gossip does, what is no model, and of which no gradient makes all of a host equal.

    ``b_i <- sum_k W[h, k] mean over the workers of host k of b``, after each step.

    Args:
        hosts: the hierarchical gossip.
    """

    hosts: HierarchicalGossip

    def resolved(self, world_size: int) -> Self:
        return dataclasses.replace(self, hosts=self.hosts.resolved(world_size))

    def init(self, worker: Worker) -> None:
        pass

    async def step(self, worker: Worker) -> None:
        host, leads = self.hosts.host_of(worker)
        await Gradient()
        await LocalStep()
        await AllReduce(worker.x, host)
        if leads:
            await neighbor_average(worker, self.hosts.leaders, worker.x)
        await AllReduce(worker.x, host, weight=1.0 if leads else 0.0)
