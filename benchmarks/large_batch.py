"""Large batches on the image recipe: CLARS without warm-up against LARS and others with and without it, over seeds.

    python benchmarks/large_batch.py [--seeds 5] [--epochs 5] [--factors 4,8,16,32,64]

A step is 512 images, as 8 micro-batches of 64, on one device. The learning rate is that of the image recipe for 64
images, times 8. Every contender first gets the best of the given factors for its own unit, by the validation loss of
one seed that is not used again: LARS and CLARS of their `trust`, the others of the learning rate. Then it is trained
with it on each seed.
Reported: accuracy and loss on the validation images after the last epoch, and after the first third.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from report import logging_off

from lightning_decentral.bench.report import environment
from lightning_decentral.callbacks import MicroBatchNorms
from lightning_decentral.recipes import EmbeddedImages, LargeBatchResNet

PARTS, PART_IMAGES = 8, 64
# optimizer, warm-up as a fraction of the steps, unit of what is tuned
CONTENDERS = {
    "CLARS": ("clars", 0.0, 0.01),
    "CLARS, rate in the buffer": ("clars", 0.0, 0.01),
    "LARS": ("lars", 0.0, 0.01),
    "LARS, warm-up": ("lars", 0.2, 0.01),
    "momentum SGD": ("sgd", 0.0, 0.005),
    "momentum SGD, warm-up": ("sgd", 0.2, 0.005),
    "LAMB, warm-up": ("lamb", 0.2, 0.0005),
}


class Curve(Callback):
    """Validation loss and accuracy of every epoch."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.points.append((float(metrics["val_loss"]), float(metrics["val_accuracy"])))


def run(name: str, rate: float, epochs: int, seed: int) -> list[tuple[float, float]]:
    """Losses and accuracies by epoch."""
    optimizer, warmup, unit = CONTENDERS[name]
    seed_everything(seed, verbose=False)
    curve = Curve()
    data = EmbeddedImages(batch_size=PART_IMAGES, shift_pixels=2)
    steps = epochs * -(-(4000 // PART_IMAGES) // PARTS)
    model = LargeBatchResNet(
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=0.1 if optimizer in ("lars", "clars") else rate * unit,
        trust=rate * unit,
        scale=8.0,
        rate_in_buffer="buffer" in name,
        warmup_steps=round(warmup * steps),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=PARTS,
        callbacks=[curve, *([MicroBatchNorms()] if optimizer == "clars" else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    return curve.points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--factors", default="4,8,16,32,64")
    parser.add_argument("--record", default="large_batch.jsonl", help="runs already in this file are not repeated")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so long; start again")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    factors = [float(factor) for factor in options.factors.split(",")]
    record = Path(options.record)
    kept = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    done = {(name, factor, epochs, seed): curve for name, factor, epochs, seed, curve in kept}
    begun = time.monotonic()

    def curve_of(name: str, factor: float, seed: int) -> list[tuple[float, float]]:
        key = (name, factor, options.epochs, seed)
        if key not in done:
            if time.monotonic() - begun > options.seconds:
                sys.exit("Out of time: start again with the same file.")
            done[key] = run(name, factor, options.epochs, seed)
            with record.open("a") as file:
                file.write(json.dumps([*key, done[key]]) + "\n")
        return done[key]

    best: dict[str, float] = {}
    for name in CONTENDERS:
        losses = {factor: curve_of(name, factor, 1000)[-1][0] for factor in factors}
        best[name] = min(losses, key=lambda factor: losses[factor] if losses[factor] == losses[factor] else math.inf)
    curves = {name: [curve_of(name, best[name], seed) for seed in range(1, options.seeds + 1)] for name in CONTENDERS}
    print(f"# Large batches\n\n{environment()}\n")
    print(
        f"`python benchmarks/large_batch.py --seeds {options.seeds} --epochs {options.epochs} --factors "
        f"{options.factors}`: ResNet-8 of width 8 on 4,000 MNIST digits, 512 images per step as {PARTS} micro-batches "
        f"of {PART_IMAGES}, {8 * options.epochs} steps in all; validated on 500 images, so one image is 0.2 points. "
        "Warm-up: the first fifth of the steps. Learning rate of LARS and CLARS: 0.1, times 8 for the batch; `tuned` "
        "is their `trust`, and the peak of the learning rate of the others: the best of five, by the loss of a seed "
        "of its own.\n"
    )
    early = max(1, options.epochs // 3)
    print(f"| contender | tuned | accuracy (%) | loss | loss after {early} epochs |")
    print("|---|---|---|---|---|")
    for name, runs in curves.items():
        cells = [
            spread([100 * points[-1][1] for points in runs], ".1f"),
            spread([points[-1][0] for points in runs], ".3f"),
            spread([points[early - 1][0] for points in runs], ".3f"),
        ]
        print(f"| {name} | {best[name] * CONTENDERS[name][2] * (1 if 'LARS' in name else 8):g} | {' | '.join(cells)} |")


def spread(values: list[float], digits: str) -> str:
    """Mean, smallest and largest."""
    return f"{statistics.mean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


if __name__ == "__main__":
    main()
