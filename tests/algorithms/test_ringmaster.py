"""Proved here: Ringmaster is its event-ordered reference update by update, and drops exactly what is too stale; with a
threshold of 1 it is the serial SGD of gradients that are not stale; with a large one it is A-PSGD. Between
micro-batches exactly what is too stale is given up, and counted: the reference that does so, update by update, also
over slow links."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from reference import servers
from reference.runs import equal_start, gradient_of
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import APSGD, Ringmaster
from lightning_decentral.compression import TopK
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator


@pytest.mark.parametrize("threshold", [1, 3, 6])
def test_it_is_the_reference_update_by_update(threshold: int) -> None:
    problem = equal_start(6)
    reference = servers.ringmaster(problem.start[0], problem.gradient, 0.1, SECONDS, threshold)
    simulator = served(Ringmaster(threshold), problem)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
    state = simulator.workers[0].state
    stale = sum(count for staleness, count in state["staleness"].items() if staleness >= threshold)
    assert sum(state["dropped"].values()) == stale > 0


def test_a_threshold_of_one_is_serial_sgd() -> None:
    """Of workers with the same loss: every update is a gradient step from the model that it changes."""
    problem = equal_start(4)
    problem.a, problem.b = problem.a[:1].expand(4, -1), problem.b[:1].expand(4, -1)
    x = problem.start[0].clone()
    for mine in islice(updates(served(Ringmaster(1), problem, [1.0, 1.3, 0.7, 5.1]), problem, 0.1), 60):
        x = x - 0.1 * problem.gradient(x, 0)
        torch.testing.assert_close(mine, x, rtol=0.0, atol=1e-13)


def test_a_large_threshold_is_apsgd() -> None:
    problem = equal_start(6)
    mine, plain = (updates(served(each, problem), problem, 0.1) for each in (Ringmaster(1000), APSGD()))
    assert all(torch.equal(a, b) for a, b in islice(zip(mine, plain, strict=False), 80))


@pytest.mark.parametrize("threshold", [1, 3, 6])
def test_what_is_too_stale_is_given_up_between_micro_batches(threshold: int) -> None:
    problem = equal_start(6)
    reference = servers.ringmaster_cancelling(problem.start[0], problem.gradient, 0.1, SECONDS, threshold, 4)
    simulator = served(Ringmaster(threshold), problem, micro_batches=4)
    for mine, theirs in islice(zip(updates(simulator, problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
    state = simulator.workers[0].state
    stale = sum(count for staleness, count in state["staleness"].items() if staleness >= threshold)
    cancelled = state["cancelled"]
    assert sum(cancelled.values()) + sum(state["dropped"].values()) == stale
    assert cancelled[4] > 0  # the slowest by far
    assert state["questions"] > sum(cancelled.values()) - cancelled[0]


def test_what_is_not_cancelled_is_the_same_gradient() -> None:
    """Questions alone change nothing: with a threshold that nothing reaches, and where nobody asks."""
    problem = equal_start(6)
    ways = [(Ringmaster(1000), 4), (Ringmaster(1000), 1), (Ringmaster(1000, cancels=False), 4)]
    runs = [islice(updates(served(each, problem, micro_batches=count), problem, 0.1), 60) for each, count in ways]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*runs, strict=True))


COMPRESSED = {"compressor": TopK(0.5), "model_compressor": TopK(0.5)}


@pytest.mark.parametrize("options", [{}, {"server": "dedicated"}, COMPRESSED])
def test_cancelling_over_links(options: dict[str, Any]) -> None:
    """What is given up brings the newest model, compressed too; what the others compute is never given up."""
    problem = equal_start(4)
    slow = Cluster(compute_seconds=1.0, slowdown={3: 40.0}, bandwidth_bytes_per_second=1e3, latency_seconds=0.01)
    simulator = Simulator(
        Ringmaster(4, **options), [Vector([row.clone()]) for row in problem.start], slow, micro_batches=8
    )
    simulator.run(gradient_of(problem), learning_rate=0.02, steps=200)
    state = simulator.workers[0].state
    assert state["cancelled"][3] >= 20
    assert state["cancelled"][1] == state["cancelled"][2] == 0
    own = [worker.x.buffers[0] for worker in simulator.workers]
    assert float((own[3] - own[0]).abs().max()) < 0.2  # it goes on with the model as it is


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Ringmaster\(threshold=0\): needs a whole number of at least 1"):
        Ringmaster(0)
