"""Proved here: SGD on rows, which methods of dual coordinates are compared with, trains on each row of its workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from strategies.fits import fit_kept

from lightning_decentral.primal_dual import LinearDataModule
from lightning_decentral.primal_dual.coordinates import divided
from lightning_decentral.recipes.speeches import LinearSGD


@pytest.mark.parametrize("shares", [None, [3, 1]])
def test_batches_of_all_own_rows_are_steps_of_gradient_descent(shares: list[float] | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows, classes = rng.standard_normal((24, 3)), np.where(rng.random(24) > 0.5, 1.0, -1.0)
    module = LinearSGD(features=3, regularization=0.1, learning_rate=0.5, batch_size=24)
    data = LinearDataModule(rows, classes, rounds=4, shares=shares)
    fit_kept(tmp_path, "ddp", 2, module, datamodule=data, max_epochs=1)
    weights = np.zeros(3)
    parts = divided(24, 2, 0, shares)
    assert sorted(np.concatenate(parts)) == list(range(24))
    for _ in range(4):
        slopes = -classes / (1.0 + np.exp(classes * (rows @ weights)))
        gradient = np.mean([slopes[part] @ rows[part] / len(part) for part in parts], axis=0)
        weights -= 0.5 * (gradient + 0.1 * weights)
    torch.testing.assert_close(module.weight.detach(), torch.from_numpy(weights))
