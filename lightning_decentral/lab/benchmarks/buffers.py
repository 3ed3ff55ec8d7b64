"""What becomes of BatchNorm where workers have other classes, under each policy for buffers.

    python -m lightning_decentral.lab.benchmarks.buffers --seeds 1,2,3

A network of five BatchNorms learns 4,000 embedded digits with D-PSGD on a ring of five workers (forked), under two
divisions of the data: two shards of sorted digits on each worker, and a Dirichlet division. The policies train in turn,
each from the same start and on the same batches. 500 other digits are classified by the consensus as each worker has
it, and at the end by each worker's own model. GroupNorm, which has no buffers, is the control.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral import DPSGD, GossipStrategy, Ring
from lightning_decentral.federated.partition import dirichlet_by_client, shards
from lightning_decentral.lab.benchmarks.report import QUIET, logging_off, spread
from lightning_decentral.lab.digits import digits
from lightning_decentral.lab.results import environment

WORKERS = 5
POLICIES = ("local", "evaluation", "gossip")
DIVISIONS = ("two shards on each worker", "Dirichlet, alpha 0.1")


def network(norm: str) -> nn.Sequential:
    """Make convolutions and linear layers, each with a normalization after it."""

    def normalized(channels: int, flat: bool = False) -> nn.Module:
        if norm == "group":
            return nn.GroupNorm(4, channels)
        return nn.BatchNorm1d(channels) if flat else nn.BatchNorm2d(channels)

    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, bias=False), normalized(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, bias=False), normalized(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, bias=False), normalized(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 64, bias=False), normalized(64, flat=True), nn.ReLU()),
        *(nn.Linear(64, 32, bias=False), normalized(32, flat=True), nn.ReLU()),
        nn.Linear(32, 10),
    )


class Digits(LightningModule):
    """A worker's own digits, in batches that its seed draws."""

    def __init__(self, norm: str, division: str, seed: int, steps: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = network(norm)
        self.division, self.seed, self.steps = division, seed, steps

    def training_step(self, batch: Any) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: Any) -> None:
        """Leave it to a callback."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        images, labels = digits("train")
        if self.division == DIVISIONS[0]:
            parts = shards(labels, WORKERS, per_client=2, seed=self.seed)
        else:
            parts = dirichlet_by_client(labels, WORKERS, alpha=0.1, seed=self.seed)
        own = parts.of(self.global_rank)
        generator = torch.Generator().manual_seed(1000 * self.seed + self.global_rank)
        drawn = own[torch.randint(len(own), (self.steps * 32,), generator=generator)]
        return DataLoader(TensorDataset(images[drawn], labels[drawn]), batch_size=32)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(WORKERS, 1)))


class Accuracies(Callback):
    """Of the consensus as this worker has it, and of its own model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, float] = {}

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.found["consensus"] = accuracy(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.eval()
        self.found["own"] = accuracy(pl_module)
        torch.save(self.found, self.folder / f"{trainer.global_rank}.pt")


def accuracy(module: LightningModule) -> float:
    """Classify the digits that nobody trains on; in percent."""
    images, labels = digits("val")
    with torch.no_grad():
        predicted = module.network(images).argmax(1)  # type: ignore[operator]
    return 100.0 * float((predicted == labels).float().mean())


def run(norm: str, policy: Any, division: str, seed: int, steps: int) -> list[dict[str, float]]:
    """Train once; return both accuracies by worker."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        strategy = GossipStrategy(DPSGD(Ring), buffers=policy, start_method="fork", average_at_end=False)
        trainer = Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=WORKERS,
            max_epochs=1,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            **QUIET,
            default_root_dir=folder,
            callbacks=[Accuracies(folder)],
        )
        trainer.fit(Digits(norm, division, seed, steps))
        return [torch.load(folder / f"{rank}.pt") for rank in range(WORKERS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    logging_off()
    digits("train"), digits("val")  # before workers are forked
    torch.set_num_threads(1)
    contenders = [("batch", policy) for policy in POLICIES] + [("group", "local")]
    found: dict[tuple[str, str, str], list[list[dict[str, float]]]] = {}
    for seed in seeds:
        for division in DIVISIONS:
            for norm, policy in contenders:
                workers = run(norm, policy, division, seed, options.steps)
                found.setdefault((division, norm, policy), []).append(workers)
    print(f"# Policies for buffers: a network of BatchNorms on workers with other classes\n\n{environment()}\n")
    print(f"D-PSGD on a ring of {WORKERS} forked workers, {options.steps} steps of 32 digits each, {len(seeds)} seeds.")
    print("Accuracy on 500 other digits in percent: mean over workers and seeds (smallest to largest over seeds).\n")
    print("| data | normalization, buffers | consensus | the worst worker's consensus | a worker's own model |")
    print("|---|---|---|---|---|")
    for (division, norm, policy), runs in found.items():
        name = f"BatchNorm, `{policy}`" if norm == "batch" else "GroupNorm, none"
        consensus = [sum(worker["consensus"] for worker in workers) / WORKERS for workers in runs]
        worst = [min(worker["consensus"] for worker in workers) for workers in runs]
        own = [sum(worker["own"] for worker in workers) / WORKERS for workers in runs]
        print(f"| {division} | {name} | {spread(consensus, '.1f')} | {spread(worst, '.1f')} | {spread(own, '.1f')} |")


if __name__ == "__main__":
    main()
