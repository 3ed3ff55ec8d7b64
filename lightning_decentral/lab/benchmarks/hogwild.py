"""How much faster Hogwild's processes train one model on one machine than one process does.

    python -m lightning_decentral.lab.benchmarks.hogwild [--workers 2] [--rounds 3] [--seconds 10]

Two tasks. *Sparse*: logistic regression on the speeches of Shakespeare, whose gradient has the words of its batch alone
(``nn.EmbeddingBag(sparse=True)``, ``Hogwild(copy=False)``). *Dense*: ResNet-8 on images of noise. All processes have
one thread. Each round runs one process (Lightning's own strategy) and then several, of each task; reported are the
gradients of all processes in a second, counted for ``--seconds`` after each one's first step, as ratios within a round.
It needs as many free cores as there are workers: the load of the machine before it began is told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_decentral import AsyncStrategy
from lightning_decentral.algorithms import Hogwild
from lightning_decentral.lab.benchmarks.report import QUIET, logging_off, spread
from lightning_decentral.lab.benchmarks.straggler import StopAfter
from lightning_decentral.lab.results import environment
from lightning_decentral.recipes.resnet import CIFARResNet
from lightning_decentral.recipes.speeches import speeches

TASKS = ("sparse", "dense")
MOST_STEPS = {"sparse": 2000, "dense": 60}  # of a process in a second: more batches than it can take


class Examples(Dataset[int]):
    """Numbers of examples; who collates a batch draws the examples."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Words:
    """Collates speeches to the words of a batch, as `nn.EmbeddingBag` takes them."""

    def __init__(self) -> None:
        rows, self.classes = speeches()
        self.begins, self.words, self.values = rows.crow_indices(), rows.col_indices(), rows.values().float()
        self.features = rows.shape[1]

    def __call__(self, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen = [number % len(self.classes) for number in numbers]
        spans = [(int(self.begins[each]), int(self.begins[each + 1])) for each in chosen]
        words = torch.cat([self.words[begin:end] for begin, end in spans])
        values = torch.cat([self.values[begin:end] for begin, end in spans])
        offsets = torch.tensor([0, *(end - begin for begin, end in spans)]).cumsum(0)[:-1]
        return words, offsets, values, torch.as_tensor(self.classes)[chosen].float()


class SparseClassifier(LightningModule):
    """Logistic regression on words."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weights = nn.EmbeddingBag(features, 1, mode="sum", sparse=True)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        words, offsets, values, classes = batch
        margins = classes * self.weights(words, offsets, per_sample_weights=values).squeeze(1)
        return F.softplus(-margins).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Images:
    """Collates images of noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(512, 3, 32, 32, generator=generator)
        self.classes = torch.randint(10, (512,), generator=generator)

    def __call__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        chosen = [number % 512 for number in numbers]
        return self.images[chosen], self.classes[chosen]


class DenseClassifier(LightningModule):
    """ResNet-8."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CIFARResNet(depth=8)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def run(task: str, workers: int, seconds: float) -> float:
    """Measure the gradients of all processes in a second."""
    seed_everything(0, verbose=False)
    strategy: Any = "auto"
    if workers > 1:
        strategy = AsyncStrategy(Hogwild(copy=task == "dense"), start_method="fork")
    collate: Any = Words() if task == "sparse" else Images()
    module = SparseClassifier(collate.features) if task == "sparse" else DenseClassifier()
    batch = 32
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=workers,
            max_epochs=1,
            **QUIET,
            max_time={"seconds": int(seconds) + 3},
            callbacks=[StopAfter(f"{folder}/worker", seconds)],
        )
        examples = Examples(int(batch * workers * (seconds + 5) * MOST_STEPS[task]))
        trainer.fit(module, DataLoader(examples, batch_size=batch, collate_fn=collate))
        return sum(torch.load(f"{folder}/worker-{rank}") for rank in range(workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", help="TASK,PROCESSES: run these and print their figure as JSON")
    options = parser.parse_args()
    if options.only is not None:
        warnings.filterwarnings("ignore")
        logging_off()
        torch.set_num_threads(1)
        task, workers = options.only.split(",")
        print(json.dumps(run(task, int(workers), options.seconds)))
        return
    load = os.getloadavg()[0]
    ratios: dict[str, list[float]] = {task: [] for task in TASKS}
    alone: dict[str, list[float]] = {task: [] for task in TASKS}
    for _ in range(options.rounds):
        for task in TASKS:
            rates = []
            for workers in (1, options.workers):
                command = [sys.executable, "-m", "lightning_decentral.lab.benchmarks.hogwild"]
                command += ["--seconds", str(options.seconds), "--only", f"{task},{workers}"]
                finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
                rates.append(json.loads(finished.stdout.splitlines()[-1]))
                print(f"  {task}, {workers}: {rates[-1]:.1f} per second", file=sys.stderr, flush=True)
            alone[task].append(rates[0])
            ratios[task].append(rates[1] / rates[0])
    print(f"# Hogwild: {options.workers} processes and one\n\n{environment()}\n")
    print(f"{os.cpu_count()} cores; load before it began: {load:.1f}. {options.seconds:g} s each, interleaved.\n")
    print("| task | gradients per second of one process | times as many with Hogwild |\n|---|---|---|")
    for task in TASKS:
        print(f"| {task} | {spread(alone[task], '.1f')} | {spread(ratios[task], '.2f')} |")


if __name__ == "__main__":
    main()
