"""Proved here: a method's topology may be given as a function of the number of workers: a class, a `partial` of it or a
function of one's own. Methods with such ones compare, print and pickle as what they were made from; the command line
makes them from a class path alone, and reads what it has printed; whatever is no such function is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import yaml
from helpers.names import told

from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, ChocoSGD, MoniquaSGD
from lightning_decentral.algorithms.base import AbstractGossip
from lightning_decentral.averaging import Choco
from lightning_decentral.compression import Int8
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.topology import (
    AbstractTopology,
    Complete,
    FromMatrix,
    Hypercube,
    Ring,
    Sites,
    Star,
    Torus,
    from_name,
    one_peer_or_complete,
)

METHODS: list[Callable[..., AbstractGossip]] = [DPSGD, D2, ChocoSGD, MoniquaSGD, ADPSGD]


def star_of(size: int) -> AbstractTopology:
    return Star(size)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Complete, Complete(6)),
        (partial(Ring, lazy=True), Ring(6, lazy=True)),
        (star_of, Star(6)),
        (partial(from_name, "torus"), Torus(2, 3)),
        (Star(6), Star(6)),
    ],
    ids=["class", "partial", "function", "name", "graph"],
)
def test_a_function_of_the_number_of_workers(
    method: Callable[..., AbstractGossip], function: Any, expected: AbstractTopology
) -> None:
    if method is D2 and isinstance(expected, Torus):
        pytest.skip("it diverges on a torus that is not lazy")
    algorithm = method(function)
    assert algorithm.resolved(6).topology == algorithm.resolved(6).graph == expected
    assert algorithm.resolved(6) == method(expected).resolved(6)
    assert algorithm.resolved(6).resolved(6) == algorithm.resolved(6)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("function", [None, Ring, partial(Ring, lazy=True), star_of], ids=told)
def test_they_compare_hash_and_pickle(method: Callable[..., AbstractGossip], function: Any) -> None:
    def make() -> AbstractGossip:  # a new `partial` each time, which is not equal to the last one by itself
        return method(partial(function.func, **function.keywords) if isinstance(function, partial) else function)

    one, other = make(), make()
    assert one == other
    assert hash(one) == hash(other)
    assert one != method(Complete)
    for each in (one, one.resolved(5)):
        assert pickle.loads(pickle.dumps(each)) == each
    assert pickle.loads(pickle.dumps(one)).resolved(5) == one.resolved(5)


def test_they_print_as_they_are_written() -> None:
    assert repr(DPSGD()) == "DPSGD(topology=one_peer_or_complete)"
    assert repr(DPSGD(Ring)) == "DPSGD(topology=Ring)"
    assert repr(D2(partial(Ring, lazy=True))) == "D2(topology=partial(Ring, lazy=True))"
    assert repr(ADPSGD(star_of)) == "ADPSGD(topology=star_of)"
    assert repr(DPSGD(partial(from_name, "star"))) == "DPSGD(topology=partial(from_name, 'star'))"
    assert repr(DPSGD(Ring(4))) == "DPSGD(topology=Ring(size=4, lazy=False))"


PATH = "lightning_decentral.topology"
CONFIGURED = [
    ({}, DPSGD()),
    ({"topology": None}, DPSGD()),  # in the files of the first releases
    ({"topology": f"{PATH}.Ring"}, DPSGD(Ring)),
    ({"topology": {"class_path": f"{PATH}.Ring"}}, DPSGD(Ring)),
    ({"topology": {"class_path": f"{PATH}.Ring", "init_args": {"lazy": True}}}, DPSGD(partial(Ring, lazy=True))),
    ({"topology": {"class_path": f"{PATH}.Ring", "init_args": {"size": 4}}}, DPSGD(Ring(4))),
    ({"topology": {"class_path": f"{PATH}.Sites", "init_args": {"sites": 3}}}, DPSGD(partial(Sites, sites=3))),
    ({"topology": f"{PATH}.one_peer_or_complete"}, DPSGD(one_peer_or_complete)),
    ({"topology": {"class_path": f"{PATH}.FromMatrix", "init_args": {"matrix": [[1.0]]}}}, DPSGD(FromMatrix([[1.0]]))),
    (
        {
            "topology": f"{PATH}.Ring",
            "averager": {
                "class_path": "lightning_decentral.averaging.Choco",
                "init_args": {"compressor": {"class_path": "lightning_decentral.compression.Int8"}},
            },
        },
        DPSGD(Ring, Choco(Int8())),
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), CONFIGURED, ids=lambda value: repr(value)[:60])
def test_the_command_line_makes_them(arguments: dict[str, Any], expected: DPSGD) -> None:
    config = {"class_path": "lightning_decentral.algorithms.DPSGD", "init_args": arguments}
    made, printed = from_config(config)
    assert made == expected
    assert pickle.loads(pickle.dumps(made)) == expected
    again, _ = from_config(printed)
    assert again == expected


def test_the_command_line_says_why_a_topology_cannot_be() -> None:
    """It takes a class whose instance cannot be made for a function of the number of workers."""
    topology = {"class_path": f"{PATH}.Ring", "init_args": {"size": 2}}
    with pytest.raises(TopologyError, match=r"Ring needs at least 3 workers, got 2. Use Complete\(2\)"):
        from_config({"class_path": "lightning_decentral.algorithms.DPSGD", "init_args": {"topology": topology}})


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_the_command_line_reads_the_defaults_that_it_prints(method: Callable[..., AbstractGossip]) -> None:
    _, printed = from_config({"class_path": f"lightning_decentral.algorithms.{method.__name__}"})
    made, _ = from_config(printed)
    assert made == method()


def from_config(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What LightningCLI's parser makes of a configuration, and what it prints of it."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=AbstractAlgorithm)
    parsed = parser.parse_object({"algorithm": config})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parsed).algorithm, yaml.safe_load(parser.dump(parsed))["algorithm"]


def test_what_is_no_function_of_the_number_of_workers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"DPSGD got topology='ring', needs a topology or a function .* Use a"):
        DPSGD("ring")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"got topology=Torus, needs a function .*'columns'\. Give a topology"):
        DPSGD(Torus).resolved(4)
    with pytest.raises(ConfigurationError, match=r"got topology=str, which makes '4' for 4 .* a topology. Return Ring"):
        DPSGD(str).resolved(4)
    with pytest.raises(ConfigurationError, match=r"Ring\(size=8.* for 8 workers, but 4 take part. Let it make one"):
        DPSGD(lambda size: Ring(2 * size)).resolved(4)
    with pytest.raises(ConfigurationError, match=r"needs a connected matrix, got worker\(s\) 0 without"):
        DPSGD(lambda size: FromMatrix([[1.0, 0.0], [0.0, 1.0]])).resolved(2)
    with pytest.raises(TopologyError, match=r"Hypercube needs .* got 6"):
        DPSGD(Hypercube).resolved(6)
    with pytest.raises(TopologyError, match="above -1/3"):
        D2(Ring).resolved(4)
    with pytest.raises(ConfigurationError, match=r"DPSGD\(topology=Ring\) was asked for its graph, needs the number"):
        _ = DPSGD(Ring).graph
