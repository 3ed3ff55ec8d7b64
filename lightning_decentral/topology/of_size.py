"""Topologies as functions of the number of workers, which is often known only when training begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.topology.base import AbstractTopology
from lightning_decentral.topology.one_peer import OnePeerExponential
from lightning_decentral.topology.static import Complete, Ring

# jsonargparse takes the first of these that fits: a function by its path, a graph of a given size, a class without it.
TopologyLike = Callable[[int], Any] | AbstractTopology | Callable[[int], AbstractTopology]
"""A topology, or a function of the number of workers that makes one: a class, as `Ring`, a `partial`, or your own.

In a configuration file ``class_path: lightning_decentral.topology.Ring`` is the class, and with ``init_args: {lazy:
true}`` the `partial`; with a ``size`` among the arguments it is a topology.
"""


def one_peer_or_complete(size: int) -> AbstractTopology:
    """Choose `OnePeerExponential`, one message per step; `Complete` below three workers."""
    return OnePeerExponential(size) if size >= 3 else Complete(size)


def ring_or_complete(size: int) -> AbstractTopology:
    """Choose `Ring`; `Complete` below three workers."""
    return Ring(size) if size >= 3 else Complete(size)


def lazy_ring_or_complete(size: int) -> AbstractTopology:
    """Return a lazy `Ring`, without negative eigenvalues; `Complete` below three workers."""
    return Ring(size, lazy=True) if size >= 3 else Complete(size)


def comparable(method: str, topology: TopologyLike) -> TopologyLike:
    """Return the same topology or function, but a `partial` as one that is compared and printed by what it calls.

    Args:
        method: for messages.
        topology: also the function that jsonargparse makes of a class and some of its arguments.

    Raises:
        ConfigurationError: if it is neither a topology nor a function.

    Example:
        >>> comparable("D2", partial(Ring, lazy=True)) == comparable("D2", partial(Ring, lazy=True))
        True
    """
    if isinstance(topology, AbstractTopology):
        return topology
    if not callable(topology):
        raise ConfigurationError(
            f"{method} got topology={topology!r}, needs a topology or a function of the number of workers. Use a class "
            "of lightning_decentral.topology, as Ring, an instance, as Ring(8), or partial(Ring, lazy=True)."
        )
    if not isinstance(topology, partial):
        return topology
    function, arguments, options = topology.func, topology.args, topology.keywords
    kinds = [each for each in arguments if isinstance(each, type) and issubclass(each, AbstractTopology)]
    if kinds:  # jsonargparse's
        known = inspect.signature(kinds[0]).parameters
        function, arguments = kinds[0], ()
        options = {name: value for name, value in options.items() if value != known[name].default}
        if all(name in options for name, each in known.items() if each.default is each.empty):
            return kinds[0](**options)  # which has failed before, and says why
        if not options:
            return function
    return _Partial(function, *arguments, **options)


def name_of(value: Any) -> str:
    """Tell how a topology, or a function that makes one, is written in a program."""
    return value.__name__ if isinstance(value, type) or inspect.isfunction(value) else repr(value)


def of_size(method: str, topology: TopologyLike, workers: int) -> AbstractTopology:
    """Return the connected graph for so many workers.

    Args:
        method: for messages.
        topology: it, or what makes it.
        workers: their number.

    Raises:
        ConfigurationError: if there is none.

    Example:
        >>> of_size("DPSGD", Ring, 4)
        Ring(size=4, lazy=False)
    """
    if isinstance(topology, AbstractTopology):
        graph = topology
        advice = f"Make the topology for {workers} workers, or give a function of their number, as the class alone."
    else:
        advice = "Let it make one for the number that it is called with."
        try:
            inspect.signature(topology).bind(workers)
        except ValueError:
            pass  # a builtin, whose arguments nobody knows
        except TypeError as error:
            raise ConfigurationError(
                f"{method} got topology={name_of(topology)}, needs a function of the number of workers alone: {error}. "
                "Give a topology, or a function with a parameter `size`."
            ) from error
        graph = topology(workers)
        if not isinstance(graph, AbstractTopology):
            raise ConfigurationError(
                f"{method} got topology={name_of(topology)}, which makes {graph!r} for {workers} workers, needs a "
                "topology. Return Ring(size), or another one."
            )
    if graph.size != workers:
        raise ConfigurationError(f"{method} got {graph!r} for {graph.size} workers, but {workers} take part. {advice}")
    if not graph.is_connected:
        raise TopologyError(
            f"{method} needs a connected graph, got {graph!r}: some workers would never hear of each other. Add edges "
            "until it is connected."
        )
    return graph


class _Partial(partial[AbstractTopology]):
    """A `partial` that is equal to another one of the same function and arguments."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, partial) and self._parts() == _Partial._parts(other)

    def __hash__(self) -> int:
        return hash((self.func, self.args, frozenset(self.keywords)))

    def __repr__(self) -> str:
        options = (f"{name}={value!r}" for name, value in self.keywords.items())
        return f"partial({', '.join([name_of(self.func), *map(repr, self.args), *options])})"

    def _parts(self: partial[Any]) -> tuple[Any, ...]:
        return self.func, self.args, self.keywords
