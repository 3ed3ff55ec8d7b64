"""Proved here: hierarchical gossip is its stacked reference step by step, in both orders, with one model on each host
to the last bit; with hosts of one worker it is D-PSGD, with one host synchronous SGD; hosts come from the trainer or
the cluster; between sites it sends one model per neighbour, whatever the number of workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import Trainer
from reference import methods
from reference.quadratic import Quadratic
from reference.runs import assert_steps_equal, gradient_of, simulate, stacked

from lightning_decentral import GossipStrategy
from lightning_decentral.algorithms import HierarchicalGossip
from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.flat import SizeOnlyVector
from lightning_decentral.planning.planner import plan
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import Leaders, OnePeerExponential, Ring


@pytest.mark.parametrize("order", ["awc", "atc"])
@pytest.mark.parametrize("topology", [Ring, OnePeerExponential])
def test_it_is_the_reference_step_by_step_under_jitter(topology: Any, order: Any) -> None:
    algorithm = HierarchicalGossip(topology, workers_per_host=2, order=order)
    assert_steps_equal(algorithm, methods.hierarchical_gossip, 6, members=2, order=order)


def test_with_hosts_of_one_worker_it_is_dpsgd_and_with_one_host_synchronous_sgd() -> None:
    assert_steps_equal(HierarchicalGossip(Ring), methods.dpsgd, 5)
    assert_steps_equal(HierarchicalGossip(workers_per_host=4), methods.sync_sgd, equal=True)


def test_the_workers_of_a_host_have_one_model() -> None:
    problem = Quadratic(6)
    simulator = simulate(HierarchicalGossip(Ring, workers_per_host=2), problem)
    simulator.run(gradient_of(problem), 0.1, 3)
    x = stacked(simulator)
    assert torch.equal(x[::2], x[1::2])
    assert len(x.unique(dim=0)) == 3


def test_hosts_come_from_the_trainer_or_the_cluster() -> None:
    trainer = Trainer(strategy="hierarchical_gossip", accelerator="cpu", devices=2, num_nodes=3, logger=False)
    assert isinstance(trainer.strategy, GossipStrategy)
    assert trainer.strategy.algorithm == HierarchicalGossip(OnePeerExponential(3), 2)
    own = Trainer(strategy=GossipStrategy(HierarchicalGossip(workers_per_host=3)), accelerator="cpu", devices=6)
    assert isinstance(own.strategy, GossipStrategy)
    assert own.strategy.algorithm.resolved(6) == HierarchicalGossip(workers_per_host=3).resolved(6)
    sites = Cluster(sites=((0, 1), (2, 3), (4, 5)))
    simulator = Simulator(HierarchicalGossip(), [SizeOnlyVector(8) for _ in range(6)], sites)
    assert simulator.algorithm == HierarchicalGossip(OnePeerExponential(3), 2)


@pytest.mark.parametrize("members", [1, 2, 4])
def test_what_leaves_a_host_does_not_grow_with_its_workers(members: int) -> None:
    sites = tuple(tuple(range(host * members, (host + 1) * members)) for host in range(4))
    cluster = Cluster(compute_seconds=1.0, sites=sites, site_bandwidth_bytes_per_second=1e3)
    simulator = Simulator(HierarchicalGossip(), [SizeOnlyVector(400) for _ in range(4 * members)], cluster)
    if members == 1:  # sites of one worker are no hosts
        simulator = Simulator(HierarchicalGossip(workers_per_host=1), [SizeOnlyVector(400) for _ in range(4)], cluster)
    for worker in simulator.workers:
        worker.read_gradient = worker.x.clone
    for _ in simulator.demands(6):
        pass
    assert [link.num_bytes for link in simulator.site_uplinks] == [6 * 400] * 4
    planned = plan(HierarchicalGossip(workers_per_host=members), 4 * members, 400, cluster)
    assert planned.seconds_per_step == pytest.approx(1.0)  # 0.4 s between hosts are hidden
    assert (planned.rounds_to_consensus, planned.spectral_gap) == (2, 1.0)


def test_the_graph_of_first_workers() -> None:
    graph = Leaders(OnePeerExponential(4), 2)
    assert (graph.size, graph.period, graph.is_connected) == (8, 2, False)
    assert graph.edges(1) == [(0, 4), (2, 6), (4, 0), (6, 2)]
    assert (graph.peers(2), graph.peers(3)) == ((0, 4, 6), ())
    torch.testing.assert_close(graph.mixing_matrix(0)[::2, ::2], OnePeerExponential(4).mixing_matrix(0))
    assert Leaders(Ring(4), 1).spectral_gap == Ring(4).spectral_gap
    with pytest.raises(TopologyError, match="with 0 members, needs a topology and at least 1"):
        Leaders(Ring(4), 0)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigurationError, match="got 5 workers on hosts of 2, needs equally many on each"):
        HierarchicalGossip(workers_per_host=2).resolved(5)
    with pytest.raises(ConfigurationError, match="workers_per_host=0, needs a whole number"):
        HierarchicalGossip(workers_per_host=0)
    with pytest.raises(ConfigurationError, match="Ring"):
        HierarchicalGossip(Ring(4), workers_per_host=2).resolved(4)  # a graph of all workers, and not of hosts
