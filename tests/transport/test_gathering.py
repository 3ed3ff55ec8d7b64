"""Proved here, with three forked workers on gloo without shared memory: what goes from each to each, small, and what
goes round a ring, large, has the same mean; numbers that are reduced at a meeting; who brings others is told so."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from helpers.workers import kept_workers
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.transport import collectives, gathering, reductions
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.connections import ConnectionSettings

WORKERS = 3
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def values(rank: int, dtype: torch.dtype, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def gather(rank: int) -> None:
    """One worker's part."""
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS, timeout=timedelta(seconds=60))
    settings = ConnectionSettings(torch.device("cpu"), "127.0.0.1", 60.0, timedelta(seconds=60), shared_memory=False)
    communicator = Communicator(settings)
    made = communicator.collectives

    assert gathering.gather_objects("x" * 3**rank) == ["x", "xxx", "x" * 9]
    assert communicator.gather(b"y" * rank) == [b"", b"y", b"yy"]

    for limit, dtype, size in product((1 << 18, 0), TYPES, (1, 2, 100)):
        collectives.DIRECT_BYTES = reductions.DIRECT_BYTES = limit
        rows = torch.stack([values(each, dtype, size) for each in range(WORKERS)]).double()
        for among, weights in (((0, 1, 2), [1.0] * 3), ((0, 1, 2), [1.0, 0.0, 3.0]), ((0, 2), [2.0, 9.9, 6.0])):
            own = Vector([values(rank, dtype, size)])
            if rank in among:
                whole = None if len(among) == WORKERS else among
                communicator.wait(communicator.submit(partial(made.all_reduce, own, whole, weights[rank])))
                shares = torch.tensor([weights[each] for each in among], dtype=torch.float64)
                mean = (rows[list(among)] * (shares / shares.sum())[:, None]).sum(0)
                near = 4 * torch.finfo(dtype).eps * float(rows.abs().max())
                assert torch.allclose(own.buffers[0].double(), mean, rtol=0, atol=near), (limit, dtype, size, among)
        own = communicator.consensus(Vector([values(rank, dtype, size)]))
        assert torch.allclose(own.buffers[0].double(), rows.mean(0), rtol=0, atol=4 * torch.finfo(dtype).eps)

    for dtype, operation in product((torch.float32, torch.int64), ("mean", "sum", "product", "max", "min")):
        own = torch.tensor([rank + 1, 10 - rank], dtype=dtype)
        expected = {"mean": [2, 9], "sum": [6, 27], "product": [6, 720], "max": [3, 10], "min": [1, 8]}[operation]
        assert communicator.reduce(own, operation).tolist() == expected
        assert own.tolist() == [rank + 1, 10 - rank]
    assert communicator.reduce(torch.tensor([rank - 3]), "mean").tolist() == [-2]
    assert (
        communicator.reduce(torch.tensor(3 * 2**60 + rank), "max").item() == 3 * 2**60 + 2
    )  # beyond doubles' integers

    with pytest.raises(
        ConfigurationError, match=r"workers 0, 1 at a reduction \(sum\) of 2 numbers; worker 2 at .* of 1"
    ):
        communicator.reduce(torch.ones(2 - rank // 2), "sum")
    communicator.close()
    dist.destroy_process_group()


def test_small_and_large_values_of_all_are_gathered_and_reduced() -> None:
    kept_workers(WORKERS).run(gather)
