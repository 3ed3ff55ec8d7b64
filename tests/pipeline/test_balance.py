"""Proved here: blocks are measured forward and backward, without a trace in buffers and random numbers; a slow one is a
stage by itself, in one process and over workers; a link that is slower than a stage is not cut."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.workers import kept_workers
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral import PipelineStrategy
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.splitting import balanced_cuts, find_chain, measured_costs

SLOW = 0.03  # seconds


class _Sleep(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Tensor:
        time.sleep(SLOW)
        return errors[0]


class Slow(nn.Module):
    """Multiplies nothing, and sleeps in its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        slept: Tensor = _Sleep.apply(x * self.weight)
        return slept


def net() -> nn.Sequential:
    layers = [nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2)]
    return nn.Sequential(Slow(), *layers)


def test_blocks_are_measured_and_left_as_they_were() -> None:
    model = net()
    torch.manual_seed(5)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    costs = measured_costs(find_chain(model), torch.ones(8, 4))
    assert costs[0].seconds > SLOW
    assert [each.bytes for each in costs] == [4 * 8 * width for width in (4, 16, 16, 16, 2)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert balanced_cuts([each.seconds for each in costs], 2) == (1,)


def test_what_is_sent_counts_where_it_is_slower_than_a_stage() -> None:
    assert balanced_cuts([2.0, 2.0, 2.0, 2.0], 2) == (2,)
    assert balanced_cuts([2.0, 2.0, 2.0, 2.0], 2, sending=[1.0, 5.0, 7.0, 0.0]) == (2,)
    assert balanced_cuts([2.0, 2.0, 2.0, 2.0], 2, sending=[1.0, 7.0, 8.0, 0.0]) == (1,)
    # In a ring the first and the last stage are one worker's; of equal loads the cheapest last stage is taken.
    assert balanced_cuts([1.0] * 6, 4, ring=True) == (1, 3, 5)
    assert balanced_cuts([0.0, 3.0, 3.0, 0.1, 1.0], 4) == (1, 2, 3)
    assert balanced_cuts([3.0, 3.0, 3.0, 1.0], 3, ring=True) == (1, 3)
    assert balanced_cuts([0.0, 3.0, 3.0, 0.1, 1.0], 4, ring=True) == (1, 2, 3)
    assert balanced_cuts([1.0] * 6, 4, sending=[9.0, 1.0, 1.0, 1.0, 1.0, 0.0], ring=True) == (2, 3, 5)
    with pytest.raises(ConfigurationError, match="a block for each stage"):
        balanced_cuts([1.0], 2)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def cuts(rank: int, folder: Path, devices: int) -> tuple[int, ...]:
    strategy = PipelineStrategy("dsp", stages=2, balance="measured", exchange_timeout_seconds=60.0)
    trainer = Trainer(
        strategy=strategy,
        devices=devices,
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    found: list[tuple[int, ...]] = []
    module = Module()
    module.on_train_end = lambda: found.append(strategy.cuts_made)  # type: ignore[method-assign]
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=8))
    return found[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_slow_block_is_a_stage(workers: int, tmp_path: Path) -> None:
    assert kept_workers(workers).run(cuts, tmp_path, workers) == [(1,)] * workers
    with pytest.raises(ConfigurationError, match='"operations" or "measured"'):
        PipelineStrategy("dsp", balance="time")  # type: ignore[arg-type]
