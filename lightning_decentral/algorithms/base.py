"""What all methods have in common whose workers average with their neighbours in a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, final, get_args

from lightning_decentral.averaging import AbstractAverager, neighbor_average
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm, Gradient, Start
from lightning_decentral.topology import AbstractTopology, Among, TopologyLike
from lightning_decentral.topology.of_size import comparable, name_of, of_size
from lightning_decentral.topology.validation import Stochastic, require_stochastic
from lightning_decentral.worker import Worker

_DOUBLY: Stochastic = "doubly"

Order = Literal["awc", "atc"]
"""Adapt while combine: the exchange is of the models at which gradients are taken, and hidden. Adapt then combine: of
the models after the update."""


@dataclass(frozen=True, repr=False)
class AbstractGossip(AbstractAlgorithm):
    """An algorithm on a graph, which may be given as a function of the number of workers.

    A subclass gives ``topology`` its default, and reads the graph from `graph`. What it needs of its hyper-parameters
    it says in `check`, in the place of a ``__post_init__``.

    Args:
        topology: who exchanges with whom, as a topology or a function of the number of workers.

    Attributes:
        stochastic: which sums of its weights have to be one: of rows and columns, ``"doubly"``, or columns alone.
    """

    stochastic = _DOUBLY  # without an annotation: see `AbstractAlgorithm`

    topology: TopologyLike

    @final
    def __post_init__(self) -> None:
        given: Any = self.topology
        if given is None:  # as the configuration files of older runs have it
            given = self._default_topology
        object.__setattr__(self, "topology", comparable(type(self).__name__, given))
        graph = self.topology if isinstance(self.topology, AbstractTopology) else None
        if graph is not None:
            require_stochastic(type(self).__name__, graph, self.stochastic)
        self.check(graph)

    def check(self, graph: AbstractTopology | None) -> None:
        """Refuse hyper-parameters that cannot work; nothing is refused by default.

        It is called when an algorithm is made, and again when the number of workers is known.

        Args:
            graph: ``None`` if it depends on the number of workers, which is not known yet.

        Raises:
            ConfigurationError: if they cannot.
        """

    def mass(self, worker: Worker) -> AbstractVector:
        """Return of what exchanges keep the sum over the workers, as a copy: of the model, by default.

        Args:
            worker: of which.
        """
        return worker.x.clone()

    def for_buffers(self) -> AbstractAlgorithm | None:
        """Return averages on this graph, in each step; ``None`` where it is not doubly stochastic."""
        graph = self.topology
        if isinstance(graph, AbstractTopology) and graph.stochastic != "doubly":
            return None
        return NeighborMeans(graph)

    def chosen(self) -> dict[str, Any]:
        """Return what `resolved` fills in beside the graph, by the name of the hyper-parameter; nothing by default."""
        return {}

    @final
    def resolved(self, world_size: int) -> Self:
        graph = of_size(type(self).__name__, self.topology, world_size)
        return dataclasses.replace(self, topology=graph, **self.chosen())

    def opened(self) -> AbstractAsynchronousAlgorithm:
        if not isinstance(self, AbstractAsynchronousAlgorithm):
            raise ConfigurationError(
                f"OpenStrategy got {self!r}, whose workers keep of each other what a loss makes wrong (what they "
                "track, sum up, or remember of messages); it needs a method that keeps nothing but models. Use DPSGD "
                "on the same topology, ADPSGD, or a strategy whose workers stay."
            )
        if not self.tolerates_loss:
            return super().opened()
        self.among((0,), 1)  # refuses a topology of one number of workers
        return self

    @final
    def among(self, ranks: Sequence[int], size: int) -> Self:
        """Return the algorithm for those workers that are there, among the ranks of all that may be.

        Where the topology is not made for so many workers, as a ring for two, they have the method's default one.

        Args:
            ranks: who is there, in increasing order.
            size: more than the largest rank.

        Raises:
            ConfigurationError: if the topology is of one number of workers.
        """
        if isinstance(self.topology, AbstractTopology):
            raise ConfigurationError(
                f"{type(self).__name__} got {self.topology!r}, a topology of {self.topology.size} workers, for workers "
                "that come and go; it needs one for any number of them. Give a function of their number: the class "
                "alone, or a partial."
            )
        try:
            graph = of_size(type(self).__name__, self.topology, len(ranks))
        except TopologyError:
            graph = of_size(type(self).__name__, self._default_topology, len(ranks))
        return dataclasses.replace(self, topology=Among(size, graph, tuple(ranks)), **self.chosen())

    @property
    def _default_topology(self) -> Any:
        return next(field.default for field in dataclasses.fields(self) if field.name == "topology")

    @cached_property
    def graph(self) -> AbstractTopology:
        """The topology, once the number of workers is known."""
        if isinstance(self.topology, AbstractTopology):
            return self.topology
        raise ConfigurationError(
            f"{self!r} was asked for its graph, needs the number of workers first. Call `resolved(workers)`, and use "
            "what it returns."
        )

    def __repr__(self) -> str:
        """Write it as a program does; those with ``repr=False`` are left out where they have their default."""
        return as_written(self)


@dataclass(frozen=True)
class NeighborMeans(AbstractAlgorithm):
    """Averages with the neighbours while the gradient is computed, and does nothing else: for buffers.

    Args:
        topology: doubly stochastic.
    """

    topology: TopologyLike

    def resolved(self, world_size: int) -> Self:
        return dataclasses.replace(self, topology=of_size("NeighborMeans", self.topology, world_size))

    def init(self, worker: Worker) -> None:
        pass

    async def step(self, worker: Worker) -> None:
        assert isinstance(self.topology, AbstractTopology)
        average = await Start(neighbor_average(worker, self.topology, worker.x))
        await Gradient()
        await average


def as_written(algorithm: Any) -> str:
    """Write an algorithm as a program does; hyper-parameters with ``repr=False`` only where they differ."""
    values = [(field, getattr(algorithm, field.name)) for field in dataclasses.fields(algorithm)]
    shown = (f"{field.name}={name_of(value)}" for field, value in values if field.repr or value != field.default)
    return f"{type(algorithm).__qualname__}({', '.join(shown)})"


def require_averager(method: str, averager: object) -> None:
    """Refuse what is no averager."""
    if not isinstance(averager, AbstractAverager):
        raise ConfigurationError(
            f"{method} got averager={name_of(averager)}, needs an averager of lightning_decentral.averaging. Write "
            "Choco(), or Moniqua(theta=0.1), or leave it out to send models as they are."
        )


def require_order(method: str, order: object) -> None:
    """Refuse what is no `Order`."""
    if order not in get_args(Order):
        raise ConfigurationError(
            f"{method} got order={order!r}, needs one of {', '.join(map(repr, get_args(Order)))}. Use 'awc' to "
            "exchange while the gradient is computed, 'atc' to exchange after the update."
        )


def require_momentum(method: str, name: str, value: float) -> None:
    """Refuse a number that is not in [0, 1)."""
    if not (isinstance(value, int | float) and 0.0 <= value < 1.0):
        raise ConfigurationError(f"{method} got {name}={value!r}, needs a number in [0, 1). Use 0.9, or 0.0 for none.")
