"""Topologies by name, for command lines."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

from lightning_decentral.errors import TopologyError, did_you_mean
from lightning_decentral.topology.base import AbstractTopology
from lightning_decentral.topology.base_graph import BaseGraph
from lightning_decentral.topology.bipartite import BipartiteExponential, BipartiteRing
from lightning_decentral.topology.equitopo import EquiStatic, OnePeerEqui
from lightning_decentral.topology.one_peer import (
    AlternatingMatching,
    HypercubeMatching,
    OnePeerExponential,
    RandomMatching,
)
from lightning_decentral.topology.random_graphs import RandomRegular, SmallWorld
from lightning_decentral.topology.sites import Sites
from lightning_decentral.topology.static import Complete, Exponential, Hypercube, Ring, Star, Torus
from lightning_decentral.topology.validation import require_workers


def _squarest_torus(size: int) -> Torus:
    require_workers("torus", size, 4)
    rows = next(rows for rows in range(isqrt(size), 0, -1) if size % rows == 0)
    if rows == 1:
        raise TopologyError(
            f"torus needs a number of workers that is rows * columns with both at least 2, got the prime {size}. "
            f"Use ring, which is the torus with one row, or another number of workers."
        )
    return Torus(rows=rows, columns=size // rows)


_BUILDERS: dict[str, Callable[[int], AbstractTopology]] = {
    "alternating_matching": AlternatingMatching,
    "base_graph": BaseGraph,
    "bipartite_exponential": BipartiteExponential,
    "bipartite_ring": BipartiteRing,
    "complete": Complete,
    "equi_static": EquiStatic,
    "exponential": Exponential,
    "hypercube": Hypercube,
    "hypercube_matching": HypercubeMatching,
    "one_peer_equi": OnePeerEqui,
    "one_peer_exponential": OnePeerExponential,
    "random_matching": RandomMatching,
    "random_regular": RandomRegular,
    "ring": Ring,
    "sites": Sites,
    "small_world": SmallWorld,
    "star": Star,
    "torus": _squarest_torus,
}

TOPOLOGY_NAMES: tuple[str, ...] = tuple(_BUILDERS)


def from_name(name: str, size: int) -> AbstractTopology:
    """Return the topology of that name, with default options.

    Args:
        name: one of `TOPOLOGY_NAMES`: the class names in snake case. `"torus"` is made as square as possible.
        size: number of workers.

    Returns:
        The topology.

    Raises:
        TopologyError: if there is no such name, or it does not exist for this number of workers.

    Example:
        >>> from lightning_decentral.topology import from_name
        >>> from_name("one_peer_exponential", 8)
        OnePeerExponential(size=8)
        >>> from_name("torus", 12)
        Torus(rows=3, columns=4, lazy=False)
    """
    builder = _BUILDERS.get(name) if isinstance(name, str) else None
    if builder is None:
        raise TopologyError(
            f"A topology name must be one of {', '.join(TOPOLOGY_NAMES)}, got {name!r}. "
            f"{did_you_mean(name, TOPOLOGY_NAMES)}"
        )
    return builder(size)
