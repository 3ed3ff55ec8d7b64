"""Proved here: a topology is data. It survives pickling, compares and hashes by its arguments, can be written in a
configuration file, is found by name, and describes and draws itself; the examples in the docstrings run."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import pickle
import pkgutil
import time

import networkx as nx
import pytest
import torch
import yaml

import lightning_decentral.topology
from lightning_decentral.errors import TopologyError
from lightning_decentral.topology import (
    TOPOLOGY_NAMES,
    AbstractTopology,
    AlternatingMatching,
    Complete,
    Exponential,
    FromGraph,
    FromMatrix,
    HypercubeMatching,
    OnePeerExponential,
    RandomMatching,
    Ring,
    Star,
    Torus,
    from_name,
)


def test_copies_are_equal_and_small(topology: AbstractTopology) -> None:
    topology.mixing_matrix(1)
    assert topology.spectral_gap >= 0  # fills what is cached
    pickled = pickle.dumps(topology)
    for other in (pickle.loads(pickled), copy.deepcopy(topology), dataclasses.replace(topology)):
        assert other == topology
        assert hash(other) == hash(topology)
        assert repr(other) == repr(topology)
        assert other.edges(2) == topology.edges(2)
    assert len(pickled) < 1500


def test_equality_is_by_class_and_arguments() -> None:
    assert Ring(4) == Ring(4)
    assert Ring(4) != Ring(4, lazy=True)
    assert Exponential(4) != OnePeerExponential(4)
    assert RandomMatching(4, seed=1) != RandomMatching(4)
    assert len({Torus(2, 3), Torus(3, 2), Torus(2, 3)}) == 2
    assert FromGraph(nx.cycle_graph(3)) == FromGraph([(2, 0), (1, 2), (0, 1)])
    assert FromMatrix([[1.0]]) == FromMatrix(torch.ones(1, 1))


def test_topologies_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ring(4).size = 5  # type: ignore[misc]


def test_repr_is_the_constructor_call() -> None:
    assert repr(Ring(8, lazy=True)) == "Ring(size=8, lazy=True)"
    assert repr(Torus(2, 3)) == "Torus(rows=2, columns=3, lazy=False)"
    for topology in (Torus(2, 3), RandomMatching(5, 2), FromGraph([(0, 1)]), FromMatrix([[0.5, 0.5], [0.5, 0.5]])):
        assert eval(repr(topology)) == topology


@dataclasses.dataclass(frozen=True)
class Training:
    topology: AbstractTopology


CONFIG = """
- {class_path: lightning_decentral.topology.Ring, init_args: {size: 8, lazy: true}}
- {class_path: lightning_decentral.topology.Torus, init_args: {rows: 2, columns: 3}}
- {class_path: lightning_decentral.topology.RandomMatching, init_args: {size: 5, seed: 3}}
- {class_path: lightning_decentral.topology.FromGraph, init_args: {graph: [[0, 1], [1, 2]]}}
- {class_path: lightning_decentral.topology.FromMatrix, init_args: {matrix: [[0.75, 0.25], [0.25, 0.75]]}}
"""
CONFIGURED = [
    Ring(8, lazy=True),
    Torus(2, 3),
    RandomMatching(5, 3),
    FromGraph([(0, 1), (1, 2)]),
    FromMatrix([[0.75, 0.25], [0.25, 0.75]]),
]


@pytest.mark.parametrize(("config", "expected"), [*zip(yaml.safe_load(CONFIG), CONFIGURED, strict=True)])
def test_configuration_file_builds_it(config: dict[str, object], expected: AbstractTopology) -> None:
    kind = getattr(lightning_decentral.topology, str(config["class_path"]).rpartition(".")[2])
    assert kind(**config["init_args"]) == expected  # type: ignore[arg-type]
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--topology", type=AbstractTopology)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert instantiate(parser.parse_object({"topology": config})).topology == expected


@pytest.mark.parametrize("name", TOPOLOGY_NAMES)
def test_from_name(name: str) -> None:
    topology = from_name(name, 8)
    assert topology.size == 8
    assert type(topology).__name__.lower() == name.replace("_", "")


def test_from_name_covers_every_class_that_needs_only_a_size() -> None:
    names = set(lightning_decentral.topology.__all__) - {
        "TOPOLOGY_NAMES",
        "from_name",
        "Among",
        "DirectedGraph",
        "DirectedRounds",
        "FastestGraph",
        "FromGraph",
        "FromMatrix",
        "Leaders",
        "Matcha",
        "Placed",
    }
    kinds = {name for name in names if isinstance(getattr(lightning_decentral.topology, name), type)}
    classes = {name for name in kinds if not name.startswith("Abstract")}
    assert {name.lower() for name in classes} == {name.replace("_", "") for name in TOPOLOGY_NAMES}


def test_from_name_makes_a_nearly_square_torus() -> None:
    assert from_name("torus", 12) == Torus(3, 4)
    assert from_name("torus", 4) == Torus(2, 2)
    with pytest.raises(TopologyError, match=r"got the prime 7\. Use ring"):
        from_name("torus", 7)


def test_from_name_with_a_typo_suggests_and_lists() -> None:
    with pytest.raises(TopologyError, match=r"one_peer_exponential.*got 'OnePeer-Exponental'.*Did you mean") as caught:
        from_name("OnePeer-Exponental", 8)
    assert all(name in str(caught.value) for name in TOPOLOGY_NAMES)
    with pytest.raises(TopologyError, match="Use one of these"):
        from_name("xyz", 8)


def test_str_contains_the_facts(topology: AbstractTopology) -> None:
    text = str(topology)
    assert text.startswith(repr(topology))
    for fact in ("peers per step", "messages per step", "symmetric", "spectral gap", "rounds to consensus", "D2"):
        assert fact in text
    assert f"{topology.spectral_gap:.6g}" in text
    assert f" {topology.rounds_to_consensus()} " in text
    assert max(map(len, text.splitlines()[1:])) <= 120


def test_str_of_a_ring() -> None:
    lines = [" ".join(line.split()) for line in str(Ring(4)).splitlines()]
    assert "peers per step 2" in lines
    assert "messages per step 8" in lines
    assert any(line.startswith("smallest eigenvalue -0.333333; D2 cannot use it") for line in lines)
    assert "0 <- 1 3" in lines
    assert "0-2 1-3" in " ".join(str(HypercubeMatching(4)).split())
    assert "0 to 1" in str(RandomMatching(5))


def test_large_topologies_are_described_without_eigenvalues() -> None:
    assert "not computed above 2048 workers" in str(Ring(2049))


def test_plot_returns_the_axes() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for topology in (Ring(5), Exponential(5), OnePeerExponential(8), RandomMatching(6), Complete(1)):
        axes = topology.plot()
        assert type(topology).__name__ in axes.get_title()
        axes.figure.canvas.draw()
        pyplot.close(axes.figure)
    _, given = pyplot.subplots()
    assert AlternatingMatching(6).plot(given, step=1) is given
    assert "step 1" in given.get_title()
    pyplot.close("all")


def test_questions_of_the_training_loop_are_quick_at_512_workers() -> None:
    for topology in (Ring(512), OnePeerExponential(512), RandomMatching(512), Star(512)):
        topology.in_neighbors(0, 4)
        start = time.thread_time()  # other programs have the processor too
        for rank in range(512):
            topology.in_neighbors(rank, 4)
            topology.out_neighbors(rank, 4)
            topology.weights(rank, 4)
        # About 2 microseconds each; 50 leave room for a busy machine and exclude building a row again.
        assert time.thread_time() - start < 512 * 3 * 50e-6


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.iter_modules(lightning_decentral.topology.__path__)]
)
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"lightning_decentral.topology.{name}")).failed == 0
