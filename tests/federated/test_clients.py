"""Proved here: a round follows from the seed and its number; clients are drawn without replacement, as often as said,
and only if they are available; those that drop out or are late do not count; turns are dealt out to workers evenly, or
pinned; what cannot be is refused in three parts."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import Availability, Clients


def counts(clients: Clients, rounds: int) -> Counter[int]:
    return Counter(turn.client for number in range(rounds) for turn in clients.round(number).turns)


def test_a_round_follows_from_the_seed_and_its_number() -> None:
    clients = Clients(100, 10, local_steps=1, dropout=0.2, availability=Availability(0.2, 0.3))
    again = Clients(100, 10, local_steps=1, dropout=0.2, availability=Availability(0.2, 0.3))
    assert [clients.round(number) for number in (3, 200)] == [again.round(number) for number in (3, 200)]
    assert clients.round(3).turns != clients.round(4).turns
    other = Clients(100, 10, local_steps=1, seed=1)
    assert other.round(0).turns != Clients(100, 10, local_steps=1).round(0).turns


def test_clients_are_drawn_without_replacement_and_equally_often() -> None:
    clients = Clients(20, 5, local_steps=1)
    for number in range(50):
        turns = clients.round(number).turns
        assert len({turn.client for turn in turns}) == 5 == len(turns)
        assert sum(turn.weight for turn in turns) == pytest.approx(1.0)
    drawn = counts(clients, 4000)  # each 1000 times, with a standard deviation of 27
    assert all(abs(drawn[client] - 1000) < 5 * 28 for client in range(20))


def test_by_samples_the_first_of_a_round_is_drawn_in_proportion() -> None:
    clients = Clients(3, 1, local_steps=1, sampling="by_samples").of_data([1, 2, 5], 1)
    drawn = counts(clients, 8000)
    assert all(abs(drawn[client] - 1000 * share) < 5 * 45 for client, share in enumerate((1, 2, 5)))


def test_availability_is_a_markov_chain() -> None:
    chain = Availability(leaves=0.1, returns=0.3)
    masks = [chain.mask(500, seed=4, round=number) for number in range(150)]
    share = sum(float(mask.double().mean()) for mask in masks) / len(masks)
    assert abs(share - 0.75) < 0.02  # of 75 000 states, each like its last ones
    pairs = list(itertools.pairwise(masks))
    left = sum(int((before & ~after).sum()) for before, after in pairs) / sum(int(before.sum()) for before, _ in pairs)
    assert abs(left - 0.1) < 0.01
    clients = Clients(500, 100, local_steps=1, availability=chain, seed=4)
    assert all(bool(masks[9][turn.client]) for turn in clients.round(9).turns)


def test_who_drops_out_or_is_late_does_not_count() -> None:
    lossy = Clients(50, 10, local_steps=1, dropout=0.3)
    rounds = [lossy.round(number) for number in range(400)]
    assert abs(sum(len(each.dropped) for each in rounds) / 4000 - 0.3) < 0.04
    assert all(len(each.turns) + len(each.dropped) == 10 for each in rounds)

    many = Clients(50, 10, local_steps=4, over_selection=1.3, speed_spread=1.0)
    for number in range(20):
        each = many.round(number)
        assert (each.asked, len(each.turns), len(each.late)) == (13, 10, 3)
        slowest = max(many.seconds(turn.client) for turn in each.turns)
        assert slowest <= min(many.seconds(client) for client in each.late)
        assert each.seconds == slowest

    hurried = Clients(50, 10, local_steps=4, deadline_seconds=4.0, speed_spread=1.0)
    each = hurried.round(0)
    assert 0 < len(each.turns) < 10
    assert each.seconds == 4.0
    assert all(hurried.seconds(turn.client) <= 4.0 for turn in each.turns)
    assert all(hurried.seconds(client) > 4.0 for client in each.late)


def test_turns_are_dealt_out_evenly_or_pinned() -> None:
    each = Clients(30, 12).of_data([1 + client for client in range(30)], 3).round(0)
    dealt = each.of_workers(3, pinned=False)
    steps = [sum(turn.steps for turn in share) for share in dealt]
    assert sorted(turn.client for share in dealt for turn in share) == sorted(turn.client for turn in each.turns)
    assert max(steps) - min(steps) <= max(turn.steps for turn in each.turns)
    for worker, share in enumerate(each.of_workers(3, pinned=True)):
        assert all(turn.client % 3 == worker for turn in share)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"number": 0, "per_round": 1}, "needs at least 1"),
        ({"number": 5, "per_round": 6}, "nobody is drawn twice"),
        ({"number": 5, "per_round": 0}, "needs 1 to 5"),
        ({"local_steps": 0}, "needs at least 1"),
        ({"sampling": "best"}, "'by_samples'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"over_selection": 0.5}, "over_selection=0.5"),
        ({"deadline_seconds": 0.0}, "deadline"),
        ({"samples": (1, 2)}, "needs one number for each"),
        ({"samples": (1, 2, 0, 4, 5)}, "client 2; it needs at least 1 sample"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Clients(**({"number": 5, "per_round": 2} | options))  # type: ignore[arg-type]


def test_a_round_in_which_nobody_can_answer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Use a later deadline"):
        Clients(5, 2, local_steps=4, deadline_seconds=0.5).round(0)
    with pytest.raises(ConfigurationError, match="needs two probabilities"):
        Availability(leaves=0.0)
