"""A test that takes an argument named `topology` runs for every class and many numbers of workers.

It is one test for each class; what fails names the topology. `periodic_topology` is the same without the topologies
whose rounds never repeat.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict

import networkx as nx
import pytest
from helpers.names import naming

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
    Matcha,
    OnePeerEqui,
    OnePeerExponential,
    Placed,
    RandomMatching,
    RandomRegular,
    Ring,
    Sites,
    SmallWorld,
    Star,
    Torus,
)


@functools.cache
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
    found += [OnePeerEqui(9, symmetric=True), Matcha(nx.barbell_graph(3, 0)), Matcha(nx.cycle_graph(6), budget=1)]
    found += [RandomRegular(size) for size in (2, 3, 5, 8, 17)] + [RandomRegular(12, 3, lazy=True), RandomRegular(9, 6)]
    found += [SmallWorld(size) for size in (3, 4, 5, 12)] + [SmallWorld(9, 2, rewired=1), SmallWorld(10, 6, rewired=0)]
    found += [Placed(Ring(5), (3, 0, 1, 4, 2)), Placed(OnePeerExponential(6), (1, 0, 5, 4, 2, 3))]
    found += [Placed(BipartiteRing(4), (0, 2, 1, 3)), Placed(Sites(6, 3), (0, 3, 1, 4, 2, 5))]
    found.append(FromMatrix([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument in {"topology", "periodic_topology"}.intersection(metafunc.fixturenames):
        kinds: dict[str, list[AbstractTopology]] = defaultdict(list)
        for topology in samples():
            if argument == "topology" or topology.period:
                kinds[type(topology).__name__].append(topology)
        metafunc.parametrize(argument, kinds.values(), ids=kinds)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test with each topology of a class."""
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    argument = next(iter({"topology", "periodic_topology"}.intersection(arguments)), None)
    if argument is None or not isinstance(arguments[argument], list):
        return None
    for topology in arguments[argument]:
        with naming(repr(topology)):
            pyfuncitem.obj(**{**arguments, argument: topology})
    return True
