"""Proved here: a parameter that is elsewhere keeps its identity and shape, has the memory of one number, is passed over
by optimizers and clipping, names its worker to whoever reads it, and is whole again for whoever writes all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.residence import is_here, send_away


def without_weight() -> nn.Linear:
    module = nn.Linear(64, 32)
    send_away(module.weight, "net.weight", 3)
    return module


def test_who_only_asks_what_it_is_gets_an_answer() -> None:
    module = without_weight()
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    assert not is_here(weight)
    assert (weight.shape, weight.numel(), weight.dtype, weight.grad) == ((32, 64), 2048, torch.float32, None)
    with torch._C.DisableTorchFunctionSubclass():
        assert weight.untyped_storage().nbytes() == 4
    assert set(module.parameters()) == {weight, module.bias}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    module.bias.grad = torch.ones(32)
    before = module.bias.detach().clone()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(module.bias, before)
    assert weight not in optimizer.state
    module.to(torch.float64).cpu()
    with torch._C.DisableTorchFunctionSubclass():
        assert (weight.dtype, weight.shape, weight.untyped_storage().nbytes()) == (torch.float64, (32, 64), 8)
    assert not is_here(weight)


@pytest.mark.parametrize(
    "read",
    [
        lambda module: module(torch.ones(1, 64)),
        lambda module: module.state_dict(),
        lambda module: module.weight.data,
        lambda module: module.weight.clamp_(-1, 1),
        lambda module: nn.utils.parameters_to_vector(module.parameters()),
        lambda module: torch.stack([module.weight]),
        lambda module: copy.deepcopy(module),
        lambda module: repr(module.weight),
        lambda module: module.weight.add_(module.weight),
    ],
)
def test_who_reads_it_is_told_where_it_is(read: Callable[[nn.Linear], Any]) -> None:
    with torch.no_grad(), pytest.raises(ConfigurationError, match=r"'net.weight'.* is on worker 3"):
        read(without_weight())


def test_who_writes_all_of_it_has_it() -> None:
    module, whole = without_weight(), nn.Linear(64, 32)
    weight = module.weight
    module.load_state_dict(whole.state_dict())
    assert module.weight is weight
    assert is_here(weight)
    assert type(weight) is nn.Parameter
    assert torch.equal(module(torch.ones(1, 64)), whole(torch.ones(1, 64)))
    weight.sum().backward()
    assert weight.grad is not None
