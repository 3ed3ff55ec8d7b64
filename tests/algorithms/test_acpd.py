"""Proved here: ACPD is its event-ordered reference; with dual coordinates in the place of gradients both conservation
laws hold at every event, the gap is never negative and reaches 1e-9 with a straggler; alone it is SDCA; with the whole
group and whole messages it is CoCoA+; what all meet for settles what is unsent."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference import servers
from reference.primal_dual import LAMBDA, Fleet, problem
from reference.runs import Quadratic, equal_start, gradient_of
from reference.served import SECONDS, served

from lightning_decentral.algorithms import ACPD, CoCoA, CoCoAPlus
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.primal_dual.coordinates import Coordinates
from lightning_decentral.primal_dual.losses import Loss
from lightning_decentral.protocol import Gradient
from lightning_decentral.simulation.cluster import Cluster

STRAGGLER = Cluster(compute_seconds=1.0, slowdown={1: 1.07, 2: 0.93, 3: 4.7})


@pytest.mark.parametrize(
    ("group", "delay", "kept", "place"),
    [(2, 5, 2, "beside"), (3, 1, 5, "beside"), (6, 10, 1, "beside"), (1, 4, 3, "beside"), (2, 3, 2, "dedicated")],
)
def test_it_is_the_reference_at_every_event(group: int, delay: int, kept: int, place: Any) -> None:
    quadratic, trained = equal_start(6), Quadratic(6)
    first = int(place == "dedicated")  # who only serves has no gradient
    trained.a, trained.b = quadratic.a[first:], quadratic.b[first:]
    reference = servers.acpd(quadratic.start[0], trained.gradient, 0.1, SECONDS[first:], group, delay, kept)
    wanted = list(islice(reference, 300))
    simulator = served(ACPD(group, delay, kept / 5, server=place), quadratic)
    server, gradient, gradients = simulator.workers[0], gradient_of(quadratic), {}
    for request, worker in islice(simulator.demands(), 240):
        if isinstance(request, Gradient):
            gradients[worker.rank] = gradient(worker)
            if came := sum(server.state["counts"]):
                assert isinstance(server.x, Vector)
                torch.testing.assert_close(server.x.buffers[0], wanted[came - 1], rtol=0.0, atol=1e-13)
        else:
            worker.x.add_(gradients[worker.rank], alpha=-0.1)
    assert sum(server.state["counts"]) > 100
    assert (server.state["counts"][0] > 0) == (place == "beside")


def buffer(vector: object) -> NDArray[np.float64]:
    assert isinstance(vector, Vector)
    return vector.buffers[0].numpy()


@pytest.mark.parametrize("name", ["squared", "logistic", "smoothed_hinge", "hinge"])
def test_the_conservation_laws_hold_at_every_event(name: str) -> None:
    method = ACPD(group=2, max_delay=5, ratio=0.5, gamma=0.8)
    fleet = Fleet(method, problem(30, 20), Loss(name), 4, STRAGGLER, regularization=0.2)
    server, least = fleet.simulator.workers[0], np.inf
    for count, _ in enumerate(fleet.run(400)):
        model, pending = buffer(server.x), server.state["pending"]
        unsent = buffer(server.state["unsent"]).copy()
        for worker in fleet.simulator.workers:
            known = buffer(worker.state["known"])
            assert np.abs(known + buffer(pending[worker.rank]) - model).max() < 1e-12
            if worker.rank:
                unsent += buffer(worker.x) - known
        assert np.abs(model + unsent / 4 - fleet.whole).max() < 1e-12
        if count % 20 == 0:
            gap = fleet.gap()
            assert gap >= 0.0
            least = min(least, gap)
            if gap < 1e-9:
                break
    assert least < 1e-9


def test_alone_it_is_dual_coordinate_ascent() -> None:
    rows = problem()
    fleet = Fleet(ACPD(local_steps=13), rows, Loss("logistic"), 1)
    alone, model = Coordinates(fleet.own[0].rows, Loss("logistic"), LAMBDA, len(rows), seed=(7, 0)), np.zeros(40)
    for _ in fleet.run(20):
        np.testing.assert_allclose(buffer(fleet.simulator.workers[0].x), model, rtol=0.0, atol=1e-14)
        alone.ascend(model, 13)


@pytest.mark.parametrize("other", [CoCoAPlus(gamma=0.7), CoCoA()])
def test_with_the_whole_group_and_whole_messages_it_is_cocoa(other: CoCoA | CoCoAPlus) -> None:
    rows = problem()
    synchronous = Fleet(other, rows, Loss("hinge"), 4)
    fleet = Fleet(ACPD(group=4, ratio=1.0, gamma=other.damping(4)), rows, Loss("hinge"), 4)
    for _ in chain(synchronous.run(25), fleet.run(25)):
        pass
    np.testing.assert_allclose(fleet.whole, synchronous.whole, rtol=0.0, atol=1e-12)
    for one in (fleet, synchronous):  # a model is what its dual variables say
        np.testing.assert_allclose(buffer(one.simulator.consensus()), one.whole, rtol=0.0, atol=1e-12)


def test_resting_settles_what_is_unsent() -> None:
    fleet = Fleet(ACPD(group=2, ratio=0.05), problem(), Loss("logistic"), 4, STRAGGLER)
    for _ in fleet.run(7):
        pass
    assert np.abs(buffer(fleet.simulator.consensus()) - fleet.whole).max() > 1e-4
    fleet.simulator.rest()
    for worker in fleet.simulator.workers:
        np.testing.assert_allclose(buffer(worker.x), fleet.whole, rtol=0.0, atol=1e-13)


def vectors(value: object) -> int:
    """How many vectors there are in a value."""
    return isinstance(value, Vector) + (sum(map(vectors, value)) if isinstance(value, list) else 0)


def test_a_straggler_costs_little_time_and_messages_few_bytes() -> None:
    rows, slow = problem(400, 2000), Cluster(compute_seconds=1.0, slowdown={3: 10.0})
    seconds = {}
    for method in (ACPD(group=3, max_delay=20, ratio=0.01), CoCoAPlus()):
        fleet = Fleet(method, rows, Loss("logistic"), 4, slow)
        for _ in fleet.run(10):
            pass
        seconds[method] = fleet.simulator.seconds
        sent = fleet.simulator.traffic[1]
        if isinstance(method, ACPD):
            assert sent.bytes_sent == 10 * 20 * 12  # of 2000 values of 8 bytes
            assert sent.bytes_sent * 40 <= 10 * 2000 * 8
            kept = [sum(map(vectors, worker.state.values())) for worker in fleet.simulator.workers]
            assert kept == [2 + 4, 1, 1, 1]  # beside the model; at the server one pending for each worker
            counts = fleet.simulator.workers[0].state["counts"]
            assert counts[3] <= 10
    assert seconds[CoCoAPlus()] == pytest.approx(100.0)


def test_local_steps_are_a_number_or_a_share_of_the_rows() -> None:
    steps = [ACPD(local_steps=steps).steps(858) for steps in (None, 1.0, 0.1, 1e-4, 2000)]
    assert steps == [858, 858, 86, 1, 2000]


def test_what_cannot_work_is_refused() -> None:
    for wrong, message in (
        ({"ratio": 0.0}, r"ratio=0\.0, needs a share"),
        ({"ratio": 1.5}, r"ratio=1\.5, needs a share"),
        ({"gamma": 0.0}, r"gamma=0\.0\): needs a number in \(0, 1\]"),
        ({"group": 0}, r"group=0\): needs a whole number"),
        ({"server": "somewhere"}, r"server='somewhere'\): needs 'beside' or 'dedicated'"),
        ({"max_delay": 0}, r"max_delay=0\): needs a whole number"),
        ({"local_steps": 0}, r"local_steps=0\): needs a whole number"),
        ({"local_steps": 1.5}, r"local_steps=1\.5\): needs a whole number .* or a share of the worker's rows"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            ACPD(**wrong)  # type: ignore[arg-type]
    for algorithm in (ACPD(group=5), ACPD(group=5, server="dedicated")):
        with pytest.raises(ConfigurationError, match=r"group=5\): needs at most ., the number of workers that train"):
            algorithm.resolved(4 + (algorithm.server == "dedicated"))
    with pytest.raises(ConfigurationError, match="got 1 worker, which would serve and have nobody to serve"):
        ACPD(server="dedicated").resolved(1)
