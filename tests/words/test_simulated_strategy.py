"""Proved here: virtual workers inside Lightning make what the words say with the user's optimizer: a server has one of
its own, with its momentum; a tracker is what the optimizer applies, clipped as the user says; the model that
is evaluated and saved is that of its keepers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from strategies.fits import Regression, Samples, make_trainer
from torch import Tensor, nn

from lightning_decentral import SimulatedStrategy
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import Ring
from words.methods import APSGD, SERVER, QueuedAPSGD, Tracking

RATE, MOMENTUM, BATCH = 0.05, 0.9, 4


class Watching(Callback):
    """Whose gradient each batch was for, and what all models were after it."""

    def __init__(self) -> None:
        self.ranks: list[int] = []
        self.models: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ranks.append(trainer.strategy._due.rank)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.models.append(torch.stack([each.x.buffers[0].clone() for each in trainer.strategy._simulator.workers]))


def gradient(x: Tensor, batch: int) -> Tensor:
    samples = Samples(4096)
    rows = slice(batch * BATCH, (batch + 1) * BATCH)
    inputs = torch.cat([samples.inputs[rows], torch.ones(BATCH, 1, dtype=torch.float64)], 1)
    return 2 * inputs.T @ (inputs @ x - samples.targets[rows, 0]) / BATCH


def fit(
    folder: Path, algorithm: AbstractAlgorithm, momentum: float, uneven: float, **options: Any
) -> tuple[Trainer, Watching, Tensor]:
    torch.manual_seed(2)
    module = Regression(nn.Linear(4, 1).double(), RATE, momentum, 96)
    start = torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()
    watching = Watching()
    cluster = Cluster(compute_seconds=1.0, slowdown={rank: 1 + uneven * rank for rank in range(4)})
    strategy = SimulatedStrategy(algorithm, 4, cluster)
    trainer = make_trainer(folder, strategy, 1, max_epochs=1, callbacks=[watching], **options)
    trainer.fit(module)
    return trainer, watching, start


def test_a_server_has_the_users_optimizer(tmp_path: Path) -> None:
    for algorithm in (APSGD(), QueuedAPSGD()):
        trainer, watching, start = fit(tmp_path, algorithm, MOMENTUM, 0.3)
        server, velocity = start.clone(), torch.zeros_like(start)
        local = {rank: start.clone() for rank in range(1, 4)}
        assert len(watching.ranks) == 24
        for batch, (rank, models) in enumerate(zip(watching.ranks, watching.models, strict=True)):
            assert rank != SERVER
            velocity = MOMENTUM * velocity + gradient(local[rank], batch)
            server = server - RATE * velocity
            local[rank] = server
            torch.testing.assert_close(models[SERVER], server, rtol=0.0, atol=1e-12)
        assert trainer.lightning_module is not None
        shown = torch.cat([parameter.detach().flatten() for parameter in trainer.lightning_module.parameters()])
        torch.testing.assert_close(shown, server, rtol=0.0, atol=1e-12)  # the keeper's


def test_a_tracker_is_applied_and_clipped(tmp_path: Path) -> None:
    for limit in (None, 0.05):
        options = {} if limit is None else {"gradient_clip_val": limit}
        _, watching, start = fit(tmp_path, Tracking(Ring(4)), 0.0, 0.0, **options)
        matrix, x = Ring(4).mixing_matrix(), start.expand(4, -1).clone()
        tracker = last = torch.zeros_like(x)
        for step in range(6):
            gradients = torch.empty_like(x)
            for batch in range(4 * step, 4 * step + 4):
                rank = watching.ranks[batch]
                gradients[rank] = gradient(x[rank], batch)
            tracker, last = matrix @ tracker + gradients - last, gradients
            if limit is not None:  # what clipping has made of the tracker is what is remembered
                tracker = tracker * (limit / (tracker.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
            x = matrix @ x - RATE * tracker
            torch.testing.assert_close(watching.models[4 * step + 3], x, rtol=0.0, atol=1e-12)
