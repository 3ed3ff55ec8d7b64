"""Proved here: a loop of another package in the race to a loss trains the recipe's model at the race's pace, and leaves
a curve as Lightning's logger does, which ends at the target or when the time is up. The packages are not needed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_decentral.commands.telling import SECONDS, read_curve
from lightning_decentral.lab.bench.contenders import CONTENDERS
from lightning_decentral.lab.bench.to_a_loss import PEERS, Loop

SETTINGS: dict[str, Any] = {
    "may_lose": True,
    "target": 1.0,
    "seconds": 0.2,
    "compute_seconds": 0.03,
    "seed": 1,
    "model": {"width": 32, "depth": 1, "heads": 2, "context_length": 16, "optimizer": "adamw"},
    "data": {"context_length": 16, "batch_size": 4, "samples_per_epoch": 16, "validation_samples": 8},
}


@pytest.mark.parametrize("target", [0.5, 100.0])
def test_a_loop_trains_and_leaves_a_curve(target: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    loop, seen = Loop({**SETTINGS, "target": target}, tmp_path), list[str]()
    optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        began = time.perf_counter()
        loop.pass_through(loop.model, batch, lambda: None)
        assert time.perf_counter() - began >= 0.03
        optimizer.step()

    loop.run(step, lambda: seen.append("together"), lambda: seen.append("apart"))
    curve = read_curve(tmp_path / "curve" / "metrics.csv")
    assert seen == ["together", "apart"] * len(curve)
    assert all(0.5 < point["val_loss"] < 100.0 for point in curve)
    assert curve[0][SECONDS] >= 0.12  # four batches that take 0.03 s each at least
    if target == 100.0:
        assert len(curve) == 1
    else:
        assert curve[-1][SECONDS] >= SETTINGS["seconds"]
        assert all(point[SECONDS] < SETTINGS["seconds"] for point in curve[:-1])


def test_each_peer_has_an_environment() -> None:
    for name in PEERS.values():
        assert CONTENDERS[name].packages
