"""A test that takes an argument named `topology` runs once for every class and many numbers of workers.

`periodic_topology` is the same without the topologies whose rounds never repeat.
"""

from __future__ import annotations

import networkx as nx
import pytest

from lightning_decentral.topology import (
    AbstractTopology,
    AlternatingMatching,
    BaseGraph,
    BipartiteExponential,
    BipartiteRing,
    Complete,
    EquiStatic,
    Exponential,
    FromGraph,
    FromMatrix,
    Hypercube,
    HypercubeMatching,
    OnePeerEqui,
    OnePeerExponential,
    RandomMatching,
    Ring,
    Sites,
    Star,
    Torus,
)


def samples() -> list[AbstractTopology]:
    sizes = [*range(2, 18), 24, 31, 32, 33]
    even = [size for size in sizes if size % 2 == 0]
    powers = [2, 4, 8, 16, 32]
    found: list[AbstractTopology] = [Complete(1)]
    for kind in (Complete, Star, Exponential, OnePeerExponential, RandomMatching):
        found += [kind(size) for size in sizes]
    for kind in (AlternatingMatching, BipartiteRing, BipartiteExponential):
        found += [kind(size) for size in even]
    found += [kind(size) for kind in (Hypercube, HypercubeMatching) for size in powers]
    found += [Ring(size, lazy) for size in sizes if size >= 3 for lazy in (False, True)]
    found += [Torus(rows, columns) for rows in range(1, 6) for columns in range(2, 7)]
    found += [Torus(3, 4, lazy=True), Torus(2, 1)]
    found += [
        Sites(size, sites, k) for size, sites in ((4, 2), (6, 3), (8, 2), (12, 2), (15, 5), (32, 4)) for k in (3, 4, 7)
    ]
    graphs = [nx.path_graph(2), nx.path_graph(7), nx.petersen_graph(), nx.grid_2d_graph(3, 4), nx.wheel_graph(6)]
    found += [FromGraph(graph, lazy) for graph in graphs for lazy in (False, True)]
    found += [BaseGraph(6), BaseGraph(13, degree=2), EquiStatic(12), EquiStatic(9, symmetric=True), OnePeerEqui(6)]
    found.append(FromMatrix([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "topology" in metafunc.fixturenames:
        metafunc.parametrize("topology", samples(), ids=_name)
    if "periodic_topology" in metafunc.fixturenames:
        metafunc.parametrize("periodic_topology", [each for each in samples() if each.period], ids=_name)


def _name(topology: AbstractTopology) -> str:
    return repr(topology)[:40]
