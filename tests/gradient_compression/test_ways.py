"""Proved here, without processes: every way of aggregation, answered by arithmetic on all workers' requests at once,
gives all of them the same bits, and the mean where nothing is lost; on sizes alone it makes the same requests of the
same bytes, so that what is planned is what is sent; both interpreters know every request; a gradient that is not finite
stops all workers after the same request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_decentral.compression import COMPRESSORS, AbstractCompressor, Cast, Int8, TopK, compressor
from lightning_decentral.gradient_compression import requests
from lightning_decentral.gradient_compression.aggregation import exchanged
from lightning_decentral.gradient_compression.collectives import Collectives
from lightning_decentral.gradient_compression.groups import Group
from lightning_decentral.gradient_compression.requests import (
    AbstractRequest,
    AllGather,
    AllGatherNumber,
    AllReduce,
    AllToAll,
    Spread,
)
from lightning_decentral.gradient_compression.scheme import UNCOMPRESSED, WAYS, Scheme, Way, helps_feedback, ways
from lightning_decentral.gradient_compression.sizes import NUMBER_BYTES, bytes_sent, rounds
from lightning_decentral.gradient_compression.step import Exchange, Step
from lightning_decentral.traffic import all_reduce_bytes

ELEMENTS, WORKERS = 3001, 3
REQUIRED = {"threshold": {"threshold": 0.5}, "topk": {"ratio": 0.2}, "powersgd": {"rank": 2}}


def answered(asked: list[Any]) -> tuple[list[Any], list[float]]:
    """What one request of all workers gives each, and how many bytes each sends to others."""
    n, first = len(asked), asked[0]
    assert len({type(request) for request in asked}) == 1
    if isinstance(first, AllReduce):
        for tensors in zip(*(request.tensors for request in asked), strict=True):
            stacked = torch.stack(list(tensors))
            total = stacked.amax(0) if first.largest else stacked.sum(0, dtype=stacked.dtype)
            for tensor in tensors:
                tensor.copy_(total)
        return [None] * n, [sum(all_reduce_bytes(tensor.nbytes, n) for tensor in first.tensors)] * n
    if isinstance(first, AllGatherNumber):
        return [[request.number for request in asked]] * n, [(n - 1) * NUMBER_BYTES] * n
    if isinstance(first, AllGather):
        rows = [request.message for request in asked]
        return [[row.clone() for row in rows] for _ in rows], [(n - 1) * rows[0].nbytes] * n
    assert all(list(request.sizes) == list(first.sizes) for request in asked)
    if isinstance(first, AllToAll):
        slots = [torch.split(request.outgoing, list(request.sizes)) for request in asked]
        sent = [sum(first.sizes) - own for own in first.sizes]
        return [torch.stack([row[rank] for row in slots]) for rank in range(n)], sent
    assert isinstance(first, Spread)
    means = [request.message[:size] for request, size in zip(asked, first.sizes, strict=True)]
    return [[mean.clone() for mean in means] for _ in means], [(n - 1) * size for size in first.sizes]


def run(scheme: Scheme, way: Way, vectors: list[Tensor]) -> tuple[list[Exchange], list[list[list[float]]]]:
    """All workers' exchanges of one vector each, and what each sent: [coroutine][request][worker]."""
    workers, exchanges = len(vectors), []
    for rank, vector in enumerate(vectors):
        group = Group(scheme, ["vector"], [0], [0], [vector.numel()], way)
        if way == "two_phase":
            group.cut(scheme, workers, rank, vector.dtype)
        if scheme.feedback:
            group.remember(vector.dtype, vector.device)
        x = vector.clone()
        exchanges.append(Exchange(Step(rank, workers, epoch=100, dense=False), group, x, [x]))
    sent: list[list[list[float]]] = []
    for coroutines in zip(*(exchanged([exchange]) for exchange in exchanges), strict=True):
        sent.append([])
        answers: list[Any] = [None] * workers
        while True:
            asked = []
            for coroutine, answer in zip(coroutines, answers, strict=True):
                try:
                    asked.append(coroutine.send(answer))
                except StopIteration:
                    asked.append(None)
            if asked[0] is None:
                assert asked == [None] * workers  # all end together
                break
            answers, bytes_of = answered(asked)
            sent[-1].append(bytes_of)
    return exchanges, sent


def gradients(workers: int = WORKERS, elements: int = ELEMENTS) -> list[Tensor]:
    return [torch.randn(elements, generator=torch.Generator().manual_seed(rank)) for rank in range(workers)]


def possible() -> list[Any]:
    found = []
    for name in sorted(set(COMPRESSORS) - {"lattice"}):
        made = compressor(name, **REQUIRED.get(name, {}))
        for way in ways(Scheme(made, helps_feedback(made))):
            found.append(pytest.param(Scheme(made, helps_feedback(made)), way, id=f"{name}, {way}"))
    return found


@pytest.mark.parametrize(("scheme", "way"), possible())
def test_what_is_counted_on_sizes_is_what_is_sent(scheme: Scheme, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_decentral.gradient_compression.groups._SMALLEST_PIECE", 500)
    exchanges, sent = run(scheme, way, gradients())
    assert all(torch.equal(exchanges[0].x, other.x) for other in exchanges)
    assert not any(exchange.step.refused for exchange in exchanges)
    counted = rounds(scheme, way, ELEMENTS, WORKERS)
    assert [len(each) for each in counted] == [len(each) for each in sent]
    for of_sizes, of_workers in zip(counted, sent, strict=True):
        for one, each in zip(of_sizes, of_workers, strict=True):
            if scheme.compressor.traits.fixed_size:
                assert one.bytes_sent == pytest.approx(sum(each) / WORKERS)
            else:  # the largest message that there may be
                assert one.bytes_sent >= sum(each) / WORKERS
    if scheme.compressor.traits.fixed_size:
        total = sum(value for coroutine in sent for request in coroutine for value in request)
        assert bytes_sent(scheme, way, ELEMENTS, WORKERS) == pytest.approx(total / WORKERS)


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("way", WAYS)
def test_without_loss_every_way_gives_the_mean(way: Way, workers: int) -> None:
    lossless: AbstractCompressor = UNCOMPRESSED.compressor if way == "all_reduce" else TopK(1.0)
    exchanges, _ = run(Scheme(lossless, feedback=False), way, gradients(workers))
    for exchange in exchanges:  # the order of float32 sums of values up to 4
        torch.testing.assert_close(exchange.x, torch.stack(gradients(workers)).mean(0), atol=1e-6, rtol=0)


def test_every_interpreter_knows_every_request() -> None:
    known = [each for each in vars(requests).values() if isinstance(each, type) and issubclass(each, AbstractRequest)]
    words = set(known) - {AbstractRequest}
    assert words == {AllReduce, AllGather, AllGatherNumber, AllToAll, Spread}
    assert set(Collectives._BEGINS) == words
    asked: dict[Way, AbstractCompressor] = {"all_reduce": Cast(), "all_gather": Int8(), "two_phase": Int8()}
    patterns = {
        way: [[one.pattern for one in each] for each in rounds(Scheme(made, False), way, 100, 3)]
        for way, made in asked.items()
    }
    assert patterns == {
        "all_reduce": [["twice_around"]],
        "all_gather": [["once_around"]],
        "two_phase": [["to_all", "to_all"]],
    }


@pytest.mark.parametrize(
    ("scheme", "way"),
    [
        (Scheme(Int8(), True), "two_phase"),
        (Scheme(Int8(), True), "all_gather"),
        (Scheme(Cast(), False), "all_reduce"),
        (Scheme(compressor("terngrad"), False), "all_reduce"),
        (Scheme(compressor("powersgd", rank=1), True), "all_reduce"),
        (Scheme(compressor("threshold", threshold=0.1), False), "all_gather"),
    ],
)
def test_one_gradient_that_is_not_finite_stops_all_workers(scheme: Scheme, way: Way) -> None:
    vectors = gradients()
    vectors[1][7] = torch.inf
    exchanges, _ = run(scheme, way, vectors)
    for exchange in exchanges:
        assert exchange.step.refused
        assert bool(exchange.x.isnan().all())
    assert [exchange.step.names for exchange in exchanges] == [[], ["vector"], []]
