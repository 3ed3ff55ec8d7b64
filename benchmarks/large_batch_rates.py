"""Does CLARS train without warm-up what LARS trains with one? Over peak rates, with batch normalization and without.

    python benchmarks/large_batch_rates.py [--network plain] [--seeds 3] [--record FILE.csv] [--plot FILE.png]

``plain``: fully connected layers and no normalization, the shape of the MNIST network of the authors of CLARS, with
ReLU. ``residual``: ResNet-8 of width 8, whose batches are normalized in parts of 32. 512 of 4,000 digits in a step, 48
steps. Every contender is trained at every setting of one grid by a seed that is not used again, and then with its best
one on each seed. The record has a line for each run; runs that are in it are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_decentral.bench.report import environment
from lightning_decentral.optimizers import CLARS, LARS, GradualWarmup
from lightning_decentral.recipes import EmbeddedImages
from lightning_decentral.recipes.resnet import CIFARResNet

BATCH, STEPS, WARMUP_STEPS, WEIGHT_DECAY = 512, 48, 10, 2e-4
SIZES = (784, 200, 200, 200, 200, 10)
TUNING_SEED = 1000
GRIDS = {
    "plain": [(rate, trust) for rate in (0.1, 0.4) for trust in (0.04, 0.08, 0.16, 0.32)],
    "residual": [(0.4, 0.16), (0.8, 0.16)],
}
SHOWN_STEPS = (1, 5, 10, 20, 30, 48)


@dataclass(frozen=True)
class Contender:
    """An optimizer: ``part`` images per micro-batch, and the largest rate of a layer as a multiple of ``trust``."""

    optimizer: Literal["lars", "clars"]
    part: int = 32
    warmup_steps: int = 0
    bound: float = math.inf
    rate_in_buffer: bool = False

    def make(self, parameters: list[nn.Parameter], rate: float, trust: float) -> CLARS | LARS:
        """With weight decay on the weights and not on the biases."""
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        if self.optimizer == "lars":
            return LARS(groups, lr=rate / 100, trust=trust)
        largest = min(1e9, self.bound * trust)
        clars = CLARS(groups, lr=rate / 100, trust=trust, max_rate=largest, rate_in_buffer=self.rate_in_buffer)
        clars.observe()
        return clars


CONTENDERS = {
    "LARS": Contender("lars"),
    "LARS, warm-up": Contender("lars", warmup_steps=WARMUP_STEPS),
    "CLARS": Contender("clars", bound=10.0),
    "CLARS, not bounded": Contender("clars"),
    "CLARS, rate in the buffer": Contender("clars", rate_in_buffer=True),
    "CLARS, 64 parts of 8": Contender("clars", part=8, bound=10.0),
    "CLARS, 64 parts of 8, rate in the buffer": Contender("clars", part=8, rate_in_buffer=True),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run; ``ratios``: the rate of CLARS over that of LARS, the median over layers, at `SHOWN_STEPS`."""

    loss: float
    accuracy: float
    ratios: tuple[float, ...]


def plain() -> nn.Sequential:
    """Fully connected layers, by Kaiming He's rule."""
    network = nn.Sequential(nn.Flatten())
    for inputs, outputs in pairwise(SIZES):
        layer = nn.Linear(inputs, outputs)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        network.extend([layer, nn.ReLU()])
    return network[:-1]


def samples(split: str, data: EmbeddedImages, indices: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Normalized images ``[n, 1, 28, 28]`` and labels ``[n]``; all if no indices are given."""
    part = data.splits[split]
    pixels, labels = zip(*part.__getitems__(indices or list(range(len(part)))), strict=True)
    return torch.stack(pixels), torch.stack(labels)


def run(kind: str, contender: Contender, rate: float, trust: float, seed: int, data: EmbeddedImages) -> Outcome:
    """One training."""
    torch.manual_seed(seed)
    network = plain() if kind == "plain" else CIFARResNet(8, in_channels=1, width=8)
    optimizer = contender.make(list(network.parameters()), rate, trust)
    scheduler = GradualWarmup(optimizer, 100.0, contender.warmup_steps, STEPS)
    weights = optimizer.param_groups[0]["params"]
    # Without normalization, micro-batches are nothing to LARS.
    size = BATCH if kind == "plain" and isinstance(optimizer, LARS) else contender.part
    order, ratios = torch.empty(0, dtype=torch.long), []
    for step in range(1, STEPS + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(data.splits["train"]))
        batch, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        for part in batch.split(size):
            images, labels = samples("train", data, part.tolist())
            loss = F.cross_entropy(network(images), labels)
            (loss * len(part) / BATCH).backward()
        # What the rates of LARS would be, from the weights before the step.
        lars = [trust * w.norm() / (w.grad.norm() + WEIGHT_DECAY * w.norm()) for w in weights]
        optimizer.step()
        if isinstance(optimizer, CLARS) and step in SHOWN_STEPS:
            rates = [(optimizer.state[w]["rate"] / other).item() for w, other in zip(weights, lars, strict=True)]
            ratios.append(statistics.median(rates))
        scheduler.step()
    network.eval()
    with torch.no_grad():
        images, labels = samples("val", data)
        scores = network(images)
        loss = F.cross_entropy(scores, labels).item()
        accuracy = (scores.argmax(1) == labels).float().mean().item()
    return Outcome(loss if math.isfinite(loss) else math.inf, accuracy, tuple(ratios))


class Record:
    """The runs that were made, in a file."""

    def __init__(self, path: Path, network: str, seconds: float) -> None:
        self.path, self.network, self.end = path, network, time.monotonic() + seconds
        self.data = EmbeddedImages(batch_size=BATCH, shift_pixels=0 if network == "plain" else 2)
        self.data.setup("fit")
        self.runs: dict[tuple[str, float, float, int], Outcome] = {}
        if path.exists():
            with open(path) as file:
                for row in csv.DictReader(file):
                    key = (row["contender"], float(row["rate"]), float(row["trust"]), int(row["seed"]))
                    ratios = tuple(float(value) for value in row["ratios"].split())
                    self.runs[key] = Outcome(float(row["val_loss"]), float(row["val_accuracy"]), ratios)

    def outcome(self, name: str, setting: tuple[float, float], seed: int) -> Outcome:
        """From the file, or from a run."""
        key = (name, *setting, seed)
        if key not in self.runs:
            if time.monotonic() > self.end:
                sys.exit("Out of time: start again with the same record.")
            self.runs[key] = found = run(self.network, CONTENDERS[name], *setting, seed, self.data)
            new = not self.path.exists()
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(("contender", "rate", "trust", "seed", "val_loss", "val_accuracy", "ratios"))
                ratios = " ".join(f"{ratio:.3f}" for ratio in found.ratios)
                writer.writerow([*key, f"{found.loss:.5f}", f"{found.accuracy:.4f}", ratios])
        return self.runs[key]


def spread(values: list[float], digits: str) -> str:
    """Mean, smallest and largest."""
    return f"{statistics.mean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def draw(losses: dict[str, list[float]], grid: list[tuple[float, float]], path: Path) -> None:
    """The tuning seed's loss over ``trust``, one panel for each rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates, trusts = sorted({rate for rate, _ in grid}), sorted({trust for _, trust in grid})
    figure, panels = pyplot.subplots(1, len(rates), figsize=(4 * len(rates), 4), sharey=True, squeeze=False)
    for rate, axes in zip(rates, panels[0], strict=True):
        for name, values in losses.items():
            own = [loss for (at, _), loss in zip(grid, values, strict=True) if at == rate]
            axes.plot(trusts, own, marker="o", linestyle="--" if "warm-up" in name else "-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="trust", title=f"learning rate {rate:g}", ylim=(0.2, 3))
        axes.minorticks_off()
        axes.set_xticks(trusts, [f"{trust:g}" for trust in trusts])
    panels[0][0].set_ylabel("validation loss")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=GRIDS, default="plain")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--contenders", default=";".join(CONTENDERS), help="names, separated by a semicolon; all")
    parser.add_argument("--record", default="large_batch_rates.csv", type=Path, help="runs in this file are kept")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so long; start again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.record, options.network, options.seconds)
    grid = GRIDS[options.network]
    names = options.contenders.split(";")
    tuned = {name: [record.outcome(name, at, TUNING_SEED).loss for at in grid] for name in names}
    best = {name: grid[min(range(len(grid)), key=losses.__getitem__)] for name, losses in tuned.items()}
    seeds = range(1, options.seeds + 1)
    finals = {name: [record.outcome(name, best[name], seed) for seed in seeds] for name in names}
    print(f"# Large batches, over peak rates\n\n{environment()}\n")
    print("| contender | learning rate | trust | accuracy (%) | loss |\n|---|---|---|---|---|")
    for name, runs in finals.items():
        accuracy, loss = spread([100 * one.accuracy for one in runs], ".1f"), spread([one.loss for one in runs], ".3f")
        print(f"| {name} | {best[name][0]:g} | {best[name][1]:g} | {accuracy} | {loss} |")
    settings = " | ".join(f"{rate:g}, {trust:g}" for rate, trust in grid)
    print(f"\nLoss of the tuning seed:\n\n| contender | {settings} |\n|---|{'---|' * len(grid)}")
    for name, losses in tuned.items():
        print(f"| {name} | {' | '.join(f'{loss:.3g}' for loss in losses)} |")
    print("\nRate of CLARS over that of LARS, mean over seeds, at steps", *SHOWN_STEPS)
    for name, runs in finals.items():
        if runs[0].ratios:
            columns = zip(*(one.ratios for one in runs), strict=True)
            print(f"* {name}:", ", ".join(f"{statistics.mean(column):.2f}" for column in columns))
    if options.plot:
        draw(tuned, grid, options.plot)


if __name__ == "__main__":
    main()
