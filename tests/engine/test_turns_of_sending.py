"""Proved here: large vectors go to one neighbour at a time, in an order in which each receives one at a time, and every
exchange has the values that it would have without an order, also if a neighbour is late."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers.workers import kept_workers

from lightning_decentral.flat import Vector
from lightning_decentral.protocol import NeighborExchange
from lightning_decentral.topology import AbstractTopology, Complete, DirectedGraph, Exponential, Ring
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings
from lightning_decentral.transport.exchanges import _in_turns

WORKERS, LARGE, SMALL, LATE_SECONDS = 4, 300_000, 3, 0.1


@pytest.mark.parametrize("graph", [Ring(7), Exponential(8), Complete(5)], ids=repr)
def test_in_each_turn_every_worker_receives_one_message(graph: AbstractTopology) -> None:
    turns = [_in_turns(rank, graph.size, graph.out_neighbors(rank, 0)) for rank in range(graph.size)]
    for rank, mine in enumerate(turns):
        assert sorted(mine) == sorted(graph.out_neighbors(rank, 0))
    for targets in zip(*turns, strict=True):
        assert sorted(targets) == list(range(graph.size))


def exchange(rank: int, graph: AbstractTopology) -> list[dict[int, float]]:
    """What a worker receives in exchanges of large and small vectors, of which one worker is late in some."""
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS, timeout=timedelta(seconds=60))
    communicator = Communicator(
        ConnectionSettings(torch.device("cpu"), "127.0.0.1", 60.0, timedelta(seconds=60), shared_memory=False)
    )
    answers = []
    for step in range(6):
        if step in (1, 4) and rank == step % WORKERS:
            time.sleep(LATE_SECONDS)
        value = Vector([torch.full((SMALL if step % 3 == 2 else LARGE,), 10.0 * step + rank)])
        request = NeighborExchange(value, graph.out_neighbors(rank, step), graph.in_neighbors(rank, step))
        received = communicator.exchanges.begin(request, 0).result(60)
        assert all(bool((vector.buffers[0] == vector.buffers[0][0]).all()) for vector in received.values())
        answers.append({source: float(vector.buffers[0][0]) for source, vector in received.items()})
    communicator.barrier()
    communicator.close()
    dist.destroy_process_group()
    return answers


@pytest.mark.parametrize("graph", [Ring(WORKERS), DirectedGraph([[1, 2, 3], [2], [3], [0]])], ids=["ring", "directed"])
def test_each_receives_what_was_sent_to_it(graph: AbstractTopology) -> None:
    for rank, answers in enumerate(kept_workers(WORKERS).run(exchange, graph)):
        for step, received in enumerate(answers):
            assert received == {source: 10.0 * step + source for source in graph.in_neighbors(rank, step)}
