"""Large batches on the image recipe: CLARS without warm-up against LARS and others with and without it, over seeds.

    python benchmarks/large_batch.py [--seeds 3] [--epochs 6] [--record FILE.csv] [--plot FILE.png]

A step is 256 images, as 8 micro-batches of 32, on one device. Every contender first gets the best of four settings, by
the validation loss of one seed that is not used again: LARS and CLARS of two learning rates and two values of
``trust``, the others of four learning rates. Then it is trained with it on each seed. The record has a line for each
epoch of each run; runs that are in it are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from report import logging_off

from lightning_decentral.bench.report import environment
from lightning_decentral.callbacks import MicroBatchNorms
from lightning_decentral.recipes import EmbeddedImages, LargeBatchResNet

PARTS, PART_IMAGES, TRAINING_IMAGES = 8, 32, 4000
SCALE = 4.0  # 256 images over the 64 that the learning rates are for
TUNING_SEED = 1000
LAYERWISE = [(0.05, 0.16), (0.05, 0.32)]
Key = tuple[str, float, float, int]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Contender:
    """An optimizer and what is tried for it: learning rates (for 64 images) and ``trust``."""

    optimizer: Literal["sgd", "lars", "clars", "lamb"]
    warmup: float  # fraction of the steps
    settings: list[tuple[float, float]]
    rate_in_buffer: bool = False


CONTENDERS = {
    "CLARS": Contender("clars", 0.0, LAYERWISE),
    "CLARS, rate in the buffer": Contender("clars", 0.0, LAYERWISE, rate_in_buffer=True),
    "LARS": Contender("lars", 0.0, LAYERWISE),
    "LARS, warm-up": Contender("lars", 0.2, LAYERWISE),
    "momentum SGD": Contender("sgd", 0.0, [(0.04 * 2**k, 0.1) for k in range(4)]),
    "momentum SGD, warm-up": Contender("sgd", 0.2, [(0.04 * 2**k, 0.1) for k in range(4)]),
    "LAMB, warm-up": Contender("lamb", 0.2, [(0.004 * 2**k, 0.1) for k in range(4)]),
}


class Curve(Callback):
    """Validation loss and accuracy of every epoch."""

    def __init__(self) -> None:
        self.points: Points = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.points.append((float(metrics["val_loss"]), float(metrics["val_accuracy"])))


def run(contender: Contender, rate: float, trust: float, epochs: int, seed: int) -> Points:
    """Losses and accuracies by epoch."""
    seed_everything(seed, verbose=False)
    curve = Curve()
    steps = epochs * math.ceil(TRAINING_IMAGES // PART_IMAGES / PARTS)
    model = LargeBatchResNet(
        optimizer=contender.optimizer,
        learning_rate=rate,
        trust=trust,
        scale=SCALE,
        rate_in_buffer=contender.rate_in_buffer,
        warmup_steps=round(contender.warmup * steps),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=PARTS,
        callbacks=[curve, *([MicroBatchNorms()] if contender.optimizer == "clars" else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, EmbeddedImages(batch_size=PART_IMAGES, shift_pixels=2))
    return curve.points


class Record:
    """The runs that were made, in a file."""

    def __init__(self, path: Path, epochs: int, seconds: float) -> None:
        self.path, self.epochs = path, epochs
        self.end = time.monotonic() + seconds
        self.curves: dict[Key, Points] = {}
        if path.exists():
            with open(path) as file:
                for row in csv.DictReader(file):
                    key = (row["contender"], float(row["learning_rate"]), float(row["trust"]), int(row["seed"]))
                    points = self.curves.setdefault(key, [])
                    points.append((float(row["val_loss"]), float(row["val_accuracy"])))

    def curve(self, name: str, setting: tuple[float, float], seed: int) -> Points:
        """From the file, or from a run."""
        key = (name, *setting, seed)
        if len(self.curves.get(key, [])) < self.epochs:
            if time.monotonic() > self.end:
                sys.exit("Out of time: start again with the same record.")
            self.curves[key] = run(CONTENDERS[name], *setting, self.epochs, seed)
            new = not self.path.exists()
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    columns = ("contender", "learning_rate", "trust", "seed", "epoch", "val_loss", "val_accuracy")
                    writer.writerow(columns)
                for epoch, (loss, accuracy) in enumerate(self.curves[key], 1):
                    writer.writerow([*key, epoch, f"{loss:.5f}", f"{accuracy:.4f}"])
        return self.curves[key]


def final_loss(points: Points) -> float:
    """After the last epoch; infinite if it is not a number."""
    return points[-1][0] if not math.isnan(points[-1][0]) else math.inf


def draw(curves: dict[str, list[Points]], path: Path) -> None:
    """Validation loss over epochs: the geometric mean over seeds, and the smallest and largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, runs in curves.items():
        by_epoch = list(zip(*[[loss for loss, _ in points] for points in runs], strict=True))
        epochs = range(1, len(by_epoch) + 1)
        (line,) = axes.plot(epochs, [statistics.geometric_mean(values) for values in by_epoch], label=name)
        lows, highs = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
        axes.fill_between(epochs, lows, highs, color=line.get_color(), alpha=0.12)
    axes.set(yscale="log", xlabel="epoch", ylabel="validation loss")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--contenders", default=None, help="names, separated by a semicolon; all")
    parser.add_argument("--record", default="large_batch.csv", type=Path, help="runs already in this file are kept")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so long; start again")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    record = Record(options.record, options.epochs, options.seconds)
    names = options.contenders.split(";") if options.contenders else list(CONTENDERS)
    tuned: dict[str, dict[tuple[float, float], float]] = {}
    best: dict[str, tuple[float, float]] = {}
    curves: dict[str, list[Points]] = {}
    for name in names:
        settings = CONTENDERS[name].settings
        tuned[name] = {setting: final_loss(record.curve(name, setting, TUNING_SEED)) for setting in settings}
        best[name] = min(tuned[name], key=lambda setting: tuned[name][setting])
    for seed in range(1, options.seeds + 1):
        for name in names:
            curves.setdefault(name, []).append(record.curve(name, best[name], seed))
    print(f"# Large batches\n\n{environment()}\n")
    steps = options.epochs * math.ceil(TRAINING_IMAGES // PART_IMAGES / PARTS)
    print(
        f"`python benchmarks/large_batch.py --seeds {options.seeds} --epochs {options.epochs}`: ResNet-8 of width 8 on "
        f"4,000 MNIST digits, {PARTS * PART_IMAGES} images per step as {PARTS} micro-batches of {PART_IMAGES}, {steps} "
        "steps in all; validated on 500 images, so one image is 0.2 points. Warm-up: the first fifth of the steps. "
        f"Learning rates are for 64 images; the peak is {SCALE:g} times that.\n"
    )
    print("| contender | learning rate | trust | accuracy (%) | loss |\n|---|---|---|---|---|")
    for name, runs in curves.items():
        trust = f"{best[name][1]:g}" if "LARS" in name else ""
        accuracy = spread([100 * points[-1][1] for points in runs], ".1f")
        print(f"| {name} | {best[name][0]:g} | {trust} | {accuracy} | {spread(map(final_loss, runs), '.3f')} |")
    print("\nLoss of the tuning seed, with the settings in the order in which they are tried:\n")
    for name, losses in tuned.items():
        print(f"* {name}: {', '.join(f'{loss:.2f}' for loss in losses.values())}")
    if options.plot:
        draw(curves, options.plot)


def spread(values: Iterable[float], digits: str) -> str:
    """Mean, smallest and largest."""
    numbers = list(values)
    return f"{statistics.mean(numbers):{digits}} ({min(numbers):{digits}} to {max(numbers):{digits}})"


if __name__ == "__main__":
    main()
