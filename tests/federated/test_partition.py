"""Proved here: each way of dividing data gives every sample to one client at most, the same for the same seed, with the
sizes and the skew that it is said to have; a large alpha is iid; batches of a round follow from its number and cover a
client's data; what cannot be divided is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import (
    ClientData,
    Clients,
    Partition,
    Turn,
    by_group,
    by_quantity,
    dirichlet_by_class,
    dirichlet_by_client,
    dirichlet_epfml,
    given,
    iid,
    shards,
)
from lightning_decentral.federated.data import RoundBatches

CLASSES = torch.arange(6000) % 10
CLASSES = CLASSES[torch.randperm(6000, generator=torch.Generator().manual_seed(0))]
Way = Callable[[int], Partition]
WAYS: dict[str, Way] = {
    "by client": lambda seed: dirichlet_by_client(CLASSES, 30, 0.1, seed),
    "by class": lambda seed: dirichlet_by_class(CLASSES, 20, 0.3, seed),
    "epfml": lambda seed: dirichlet_epfml(CLASSES, 24, 0.5, seed),
    "shards": lambda seed: shards(CLASSES, 30, 2, seed),
    "quantity": lambda seed: by_quantity(len(CLASSES), 30, 0.5, seed),
    "iid": lambda seed: iid(len(CLASSES), 30, seed),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_each_sample_belongs_to_one_client_and_the_seed_says_to_which(way: Way) -> None:
    one, again, other = way(1), way(1), way(2)
    assert torch.equal(one.indices, again.indices)
    assert one.sizes == again.sizes
    assert not torch.equal(one.indices, other.indices)
    assert "seed 1" in one.name
    assert torch.equal(one.indices.sort().values, torch.arange(6000))
    assert torch.equal(torch.cat([one.of(client) for client in range(len(one))]), one.indices)


def dominant(partition: Partition) -> Tensor:
    """The share of each client's largest class."""
    counts = partition.histogram(CLASSES).double()
    return counts.max(1).values / counts.sum(1)


def test_sizes_and_skew_are_what_they_are_said_to_be() -> None:
    for name in ("by client", "epfml", "shards", "iid"):
        sizes = WAYS[name](0).sizes
        assert max(sizes) - min(sizes) <= 1, name
    for name in ("by class", "quantity"):
        sizes = WAYS[name](0).sizes
        assert max(sizes) > 2 * min(sizes) >= 20, name
    assert float(dominant(dirichlet_by_client(CLASSES, 30, 0.01, 0)).median()) > 0.9
    assert float(dominant(dirichlet_by_class(CLASSES, 8, 0.1, 0, least=1)).mean()) > 0.4
    assert int((WAYS["shards"](0).histogram(CLASSES) > 0).sum(1).max()) <= 4  # a shard may have the end of a class
    assert float(dominant(WAYS["quantity"](0)).median()) < 0.25


@pytest.mark.parametrize(
    "way",
    [
        lambda alpha: dirichlet_by_client(CLASSES, 10, alpha, 0),
        lambda alpha: dirichlet_by_class(CLASSES, 10, alpha, 0),
        lambda alpha: dirichlet_epfml(CLASSES, 10, alpha, 0),
    ],
    ids=["by client", "by class", "epfml"],
)
def test_a_large_alpha_is_iid(way: Callable[[float], Partition]) -> None:
    """Of 10 clients the first 8: the last ones get what the others have left."""
    counts = way(1e6).histogram(CLASSES)[:8].double()  # 60 of each, with a standard deviation of 7.3 at most
    assert float((counts - 60).abs().max()) < 5 * 7.4


def test_natural_groups_and_given_parts() -> None:
    partition = by_group(["Hamlet", "Lear", "Hamlet", "Macbeth", "Lear"])
    assert [partition.of(client).tolist() for client in range(3)] == [[0, 2], [1, 4], [3]]
    assert given([[3, 1], [2]]).sizes == (2, 1)


def test_whole_groups_are_dealt_to_fewer_clients() -> None:
    sizes = {"Hamlet": 9, "Lear": 7, "Macbeth": 5, "Othello": 4, "Pericles": 2}
    groups = [name for name, size in sizes.items() for _ in range(size)]
    partition = by_group(groups, clients=2)
    owned = [{groups[index] for index in partition.of(client).tolist()} for client in range(2)]
    assert owned == [{"Hamlet", "Othello"}, {"Lear", "Macbeth", "Pericles"}]
    assert partition.sizes == (13, 14)


def test_it_is_described_and_drawn() -> None:
    partition = WAYS["shards"](0)
    assert partition.described(CLASSES).startswith("2 shards by client, seed 0: 30 clients with 6000 samples")
    assert "of 10 classes a client has" in partition.described(CLASSES)
    picture = partition.picture(CLASSES, most=12)
    assert picture.count("<circle") == int((partition.histogram(CLASSES)[:12] > 0).sum())
    assert "the first 12 of 30" in picture


def test_the_batches_of_a_round_are_those_of_its_turns() -> None:
    partition = given([[0, 1, 2, 3, 4], [5, 6, 7]])
    turns = [Turn(1, 2, 0.5), Turn(0, 6, 0.5)]

    def batches(number: int, done: int = 0, drop_last: bool = False) -> list[list[int]]:
        clients = Clients(2, 2).of_data(partition.sizes, 2, drop_last)
        return list(RoundBatches(partition, clients, lambda: (turns, number, done)))

    found = batches(0)
    assert sorted(itertools.chain(*found[:2])) == [5, 6, 7]  # one pass
    assert sorted(itertools.chain(*found[2:5])) == sorted(itertools.chain(*found[5:])) == [0, 1, 2, 3, 4]  # and two
    assert found[2:5] != found[5:]
    assert found == batches(0) != batches(1)
    assert found[3:] == batches(0, done=3)
    assert all(len(batch) == 2 for batch in batches(0, drop_last=True))


def test_data_of_clients_is_the_data() -> None:
    data = ClientData(list("abcde"), iid(5, 2, 0))
    assert (len(data), data[3], data.__getitems__([0, 4])) == (5, "d", ["a", "e"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dirichlet_by_client(CLASSES, 30, 0.0, 0), "needs a number above 0"),
        (lambda: iid(3, 5, 0), "clients without data"),
        (lambda: dirichlet_by_class(CLASSES, 700, 0.1, 0), "needs 7000"),
        (lambda: dirichlet_by_class(CLASSES, 60, 0.01, 0, least=90), "Use dirichlet_by_client"),
        (lambda: shards(CLASSES, 30, 0, 0), "at least 1 shard"),
        (lambda: by_quantity(100, 30, 0.5, 0), "needs 300"),
        (lambda: given([[0, 1], [1]]), "belong to more than one client"),
        (lambda: by_group(["Hamlet", "Lear"], clients=3), "2 groups for 3 clients"),
        (lambda: dirichlet_epfml(CLASSES, 7000, 0.5, 0), "needs 1 sample for each client"),
    ],
)
def test_what_cannot_be_divided_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()
