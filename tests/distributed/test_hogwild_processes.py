"""Proved here, with processes that share one model: reads are torn, and do no harm; of sparse updates of different rows
none is lost; with and without a copy for the gradient."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from words.real import RATE, Loop, connected, run_workers

from lightning_decentral.algorithms import Hogwild
from lightning_decentral.engine.rest import come_to_rest

WORKERS, SIZE, SECONDS = 2, 1 << 19, 60.0


class Same:
    """The same quadratic on all workers, with its optimum at 1."""

    def __init__(self, size: int, rows: int = 0) -> None:
        self.start = torch.zeros(WORKERS, size, dtype=torch.float64)
        self.size, self.rows = size, rows

    def gradient(self, x: Tensor, rank: int) -> Tensor:
        if not self.rows:
            return x - 1.0
        return torch.sparse_coo_tensor(torch.tensor([[rank]]), torch.ones(1, dtype=torch.float64), (self.size,))


def hogwild(problem: Any, copy: bool, rank: int, workers: int, steps: int, until_torn: bool = False) -> tuple[Any, ...]:
    communicator = connected(rank, 1)
    loop = Loop(Hogwild(copy), problem, communicator)
    loop.stepper.share()
    communicator.barrier()
    torn, since = 0, time.monotonic()
    for _ in range(steps):
        loop.step()
        if until_torn:
            snapshot = loop.stepper.snapshot.buffers[0]
            torn += bool(snapshot.min() != snapshot.max())
            if time.monotonic() - since > SECONDS:
                break
    come_to_rest(communicator, [loop.stepper], "the end")
    result = loop.x, torn, communicator.traffic.bytes_sent
    communicator.barrier()
    communicator.close()
    return result


def test_reads_are_torn_and_do_no_harm(tmp_path: Path) -> None:
    """A whole update of a large model moves all elements alike: a copy in which they differ is torn. In the end the
    model is where one process alone would have brought it."""
    work = partial(hogwild, Same(SIZE), True, steps=150, until_torn=True)
    results = run_workers(WORKERS, lambda rank, workers: work(rank=rank, workers=workers), tmp_path)
    assert sum(torn for _, torn, _ in results) > 0
    for x, _, sent in results:
        assert torch.equal(x, results[0][0])
        assert sent == 0
        # 300 updates of (1 - 0.05), of which some elements may have lost some.
        assert float((x - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("copy", [True, False], ids=["at a copy", "in place"])
def test_no_sparse_update_of_another_row_is_lost(copy: bool, tmp_path: Path) -> None:
    work = partial(hogwild, Same(8, rows=WORKERS), copy, steps=400)
    for x, _, _ in run_workers(WORKERS, lambda rank, workers: work(rank=rank, workers=workers), tmp_path):
        expected = torch.zeros(8, dtype=torch.float64)
        expected[:WORKERS] = -RATE * 400
        torch.testing.assert_close(x, expected, rtol=0.0, atol=1e-10)
