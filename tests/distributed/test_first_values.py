"""Proved here: all begin with the values of worker 0, of every type and layout, and small tensors travel together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from helpers.workers import kept_workers
from torch import Tensor

from lightning_decentral.transport import collectives


def tensors(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    numbers = torch.randn(7, 5)
    return [
        *(numbers.clone(), numbers.double()[:, ::2].t(), numbers.to(torch.bfloat16)[0], numbers[0, 0].clone()),
        *(numbers > 0, (100 * numbers).to(torch.int16), numbers[:3].to(torch.float8_e4m3fn), numbers[:, :0].clone()),
        *(torch.complex(numbers, numbers), torch.randn(300, 4), (10 * numbers).long(), numbers.to(torch.int8)[2]),
    ]


def given(rank: int) -> tuple[list[bool], int]:
    dist.init_process_group("gloo", rank=rank, world_size=3)
    calls, broadcast, bytes_of_a_bucket = [], dist.broadcast, collectives._BUCKET_BYTES
    mine = tensors(rank)

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        broadcast(*arguments)

    dist.broadcast, collectives._BUCKET_BYTES = counted, 4000
    try:
        collectives.broadcast_from_zero(mine)
    finally:
        dist.broadcast, collectives._BUCKET_BYTES = broadcast, bytes_of_a_bucket
        dist.destroy_process_group()
    first = tensors(0)
    assert [(each.dtype, each.shape, each.stride()) for each in mine] == [(t.dtype, t.shape, t.stride()) for t in first]
    equal = [torch.equal(a.to(torch.complex128), b.to(torch.complex128)) for a, b in zip(mine, first, strict=True)]
    return equal, len(calls)


def test_all_have_the_values_of_worker_0() -> None:
    for equal, calls in kept_workers(3).run(given):
        assert all(equal), equal
        assert calls == 3  # what comes before the large one, that, and what comes after it
