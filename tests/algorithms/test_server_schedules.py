"""Proved here, for every method with a server: no gradient is applied twice, or lost without being counted, in
schedules of workers, speeds and lengths that are drawn from seeds; and the check finds one that counts twice, and a
lost one. A thousand schedules of each method: ``python -m lightning_decentral.lab.benchmarks.schedules``."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_decentral.algorithms import APSGD
from lightning_decentral.algorithms.server import AbstractServer
from lightning_decentral.flat import AbstractVector
from lightning_decentral.lab.benchmarks.schedules import METHODS, check
from lightning_decentral.worker import Worker


def check_all(method: AbstractServer, seeds: int) -> None:
    for seed in range(seeds):
        check(method, seed)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_no_gradient_is_applied_twice_or_lost_without_being_counted(method: AbstractServer) -> None:
    check_all(method, 25)


@dataclass(frozen=True, repr=False)
class Doubling(APSGD):
    """Applies the first gradient twice as much."""

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        return super().direction(worker, source, gradient, weight * (1 + (worker.state["version"] == 0)))


@dataclass(frozen=True, repr=False)
class Losing(APSGD):
    """Says that it has accepted what it does not apply."""

    def direction(self, worker: Worker, source: int, gradient: AbstractVector, weight: float) -> AbstractVector | None:
        return None if source == 1 else super().direction(worker, source, gradient, weight)


@pytest.mark.parametrize("method", [Doubling(), Losing()], ids=["twice", "lost"])
def test_the_check_finds_what_is_wrong(method: AbstractServer) -> None:
    with pytest.raises(AssertionError, match="seed"):
        check_all(method, 5)
