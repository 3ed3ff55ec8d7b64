"""Proved here: a choice follows from the network, the data and the optimizer, is the best of the plans that suit them,
and says what was left out, and why."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_decentral.algorithms import ADPSGD, DPSGD, Extra, GradientTracking, SyncSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.methods import METHODS
from lightning_decentral.planning.choosing import candidates, choose
from lightning_decentral.planning.placing import costs_of
from lightning_decentral.planning.planner import plan, recommend
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import OnePeerExponential, Placed, Sites, mean_cost

MODEL_BYTES = 20_000_000
SLOW = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=25e6, latency_seconds=0.1)  # a model takes 3 gradients
HIDDEN = Cluster(compute_seconds=2.0, bandwidth_bytes_per_second=25e6)  # a model takes less than a gradient


@pytest.mark.parametrize(
    ("cluster", "data", "optimizer", "chosen"),
    [
        (Cluster(compute_seconds=0.25), "alike", "sgd", SyncSGD()),
        (SLOW, "alike", "adaptive", ADPSGD()),
        (SLOW, "differ", "momentum", GradientTracking(OnePeerExponential(8))),
        (HIDDEN, "differ", "adaptive", GradientTracking(OnePeerExponential(8))),
    ],
)
def test_what_is_chosen(cluster: Cluster, data: Any, optimizer: Any, chosen: Any) -> None:
    choice = choose(8, MODEL_BYTES, cluster, data, optimizer)
    assert choice.algorithm == chosen.resolved(8)
    assert choice.plan is recommend(choice.plans).plan
    assert choice.plan.method == repr(choice.algorithm)


def test_who_is_left_out_and_why() -> None:
    alike, differ = choose(8, MODEL_BYTES, SLOW), choose(8, MODEL_BYTES, SLOW, "differ")
    times = alike.plan.speedup_over(differ.plan)
    assert times > 1.5
    said = "Left out, because the data of the workers differ: ADPSGD on BipartiteExponential(size=8)"
    assert f"{said}, {times:.2f}" in differ.text
    assert "Left out" not in alike.text
    waiting = choose(8, MODEL_BYTES, SLOW, asynchronous=False)
    assert "choco_sgd" in waiting.text  # the network is still the limit
    assert "choco_sgd" not in choose(8, MODEL_BYTES, HIDDEN).text
    assert "strategy='ddp' makes" in choose(8, MODEL_BYTES, Cluster(compute_seconds=0.25)).text
    assert "qg_dsgdm" in choose(8, MODEL_BYTES, SLOW, "differ", "momentum").text


def test_nobody_waits_for_a_slow_worker_unless_all_have_to() -> None:
    uneven = Cluster(compute_seconds=0.25, slowdown={3: 5.0})
    assert isinstance(choose(8, MODEL_BYTES, uneven).algorithm, ADPSGD)
    waiting = choose(8, MODEL_BYTES, uneven, asynchronous=False)
    assert isinstance(waiting.algorithm, SyncSGD)
    assert "Without waiting for slow workers ADPSGD on " in waiting.text


def test_places_follow_the_links() -> None:
    """Two sites whose workers have every other rank: the graph of sites, in their order; it is as fast as with ranks in
    order, and as the text says."""
    links = {"bandwidth_bytes_per_second": 25e6, "site_bandwidth_bytes_per_second": 6e6, "site_latency_seconds": 0.02}
    near = Cluster(compute_seconds=0.25, sites=((0, 1, 2, 3), (4, 5, 6, 7)), **links)  # type: ignore[arg-type]
    dealt = Cluster(compute_seconds=0.25, sites=((0, 2, 4, 6), (1, 3, 5, 7)), **links)  # type: ignore[arg-type]
    choice = choose(8, MODEL_BYTES, dealt, "differ", asynchronous=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    assert choice.algorithm == GradientTracking(Placed(Sites(8), order))
    alike = choose(8, MODEL_BYTES, near, "differ", asynchronous=False)
    assert choice.plan.steps_per_second == pytest.approx(alike.plan.steps_per_second)
    assert "places are taken" not in alike.text
    before = plan(GradientTracking(Sites(8)), 8, MODEL_BYTES, dealt, 6)
    seconds = mean_cost(Sites(8), costs_of(dealt, 8, MODEL_BYTES))
    assert f"by the workers {', '.join(map(str, order))}, in this order" in choice.text
    assert f"it would take {seconds:.3g} s, and all together would make {before.steps_per_second:.3g}" in choice.text
    assert choice.plan.steps_per_second > before.steps_per_second


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_has_candidates(workers: int) -> None:
    for data in ("alike", "differ"):
        for optimizer in ("sgd", "momentum", "adaptive"):
            for algorithm in candidates(workers, MODEL_BYTES, SLOW, data, optimizer):  # type: ignore[arg-type]
                assert algorithm == algorithm.resolved(workers)
                assert not algorithm.brings_momentum  # which the user's optimizer may have
                assert data == "alike" or not isinstance(algorithm, DPSGD)
                assert optimizer != "adaptive" or data == "alike" or not isinstance(algorithm, Extra)


def test_the_table_says_what_a_choice_reads() -> None:
    for method in METHODS.values():
        assert set(method.suits) <= {"alike", "differ"}
        assert "differ" in method.suits or not method.adaptive


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigurationError, match="data='iid', needs one of 'alike', 'differ'"):
        choose(8, MODEL_BYTES, SLOW, data="iid")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="optimizer='adam', needs one of 'sgd', 'momentum', 'adaptive'"):
        choose(8, MODEL_BYTES, SLOW, optimizer="adam")  # type: ignore[arg-type]
