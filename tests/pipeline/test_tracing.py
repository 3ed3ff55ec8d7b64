"""Proved here: a module that names no blocks is traced and cut where one value alone is alive, and trains as it does
uncut; what cannot be traced, or another shape than the traced one, is refused with what to write."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.local import LocalPipeline
from lightning_decentral.pipeline.schedules import Schedule, dsp, gpipe
from lightning_decentral.pipeline.tracing import module_to_trace, traced_chain


class Residual(nn.Module):
    """A net with a skip, batch normalization, dropout, a layer that is called twice, and no blocks."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.second, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(dropout), nn.Linear(8, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.drop(x + torch.tanh(self.second(x)))
        x = torch.tanh(self.second(x))
        return self.last(x.view(x.size(0), -1))


def traced(schedule: Schedule, net: nn.Module) -> LocalPipeline:
    return LocalPipeline(
        schedule,
        net,
        lambda x: net(x).square().mean(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        traced=True,
    )


def backpropagate(net: nn.Module, data: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_a_traced_module_trains_as_it_does_uncut() -> None:
    """Without delays it is backpropagation bit for bit, with running statistics that are counted once."""
    net, data = Residual(dropout=0.0), batches(4)
    whole = copy.deepcopy(net)
    pipeline = traced(dsp(3, forward_delays=(0, 0, 0)), net)
    for batch in data:
        pipeline.train(batch)
    backpropagate(whole, data)
    assert len(pipeline.stages) == 3
    assert all(list(stage.module.parameters()) for stage in pipeline.stages)
    for (name, value), expected in zip(net.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    with pytest.raises(ConfigurationError, match=r"drop_last=True"):
        pipeline.train(data[0][:4])


def test_delays_and_dropout_of_a_traced_module() -> None:
    """What is written down draws, and a replay of it leaves running statistics alone."""
    net, data = Residual(dropout=0.3), batches(6)
    pipeline = traced(dsp(3), net)
    for batch in data:
        pipeline.train(batch)
    assert pipeline.under_way == 6
    assert not torch.equal(pipeline.train(data[0]), pipeline.train(data[0]))
    pipeline.drain()
    assert int(net.norm.num_batches_tracked) == len(data) + 2


def test_micro_batches_of_a_traced_module() -> None:
    net, (batch,) = Residual(dropout=0.0), batches(1)
    net.norm = nn.Identity()  # type: ignore[assignment]
    whole = copy.deepcopy(net)
    traced(gpipe(2, 2), net).train(batch)
    backpropagate(whole, [batch])
    for one, expected in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-13)


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool(x.sum() > 0) else x


def test_what_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot trace ByValue.*configure_stages"):
        traced_chain(ByValue(), torch.ones(2, 4))
    with pytest.raises(ConfigurationError, match="called with dict"):
        traced_chain(ByValue(), {"x": torch.ones(2, 4)})


def test_the_module_is_found() -> None:
    inner = Residual(dropout=0.0)
    assert module_to_trace(nn.ModuleDict({"net": inner, "loss": nn.MSELoss()})) is inner
    assert module_to_trace(inner) is inner
