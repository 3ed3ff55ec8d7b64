"""Does CLARS train without warm-up what LARS trains with one? On the large-batch recipe and on others, over seeds.

    python -m lightning_decentral.lab.benchmarks.large_batch [--task recipe] [--seeds 8] \\
        [--record FILE.csv] [--plot FILE.png]

Every contender is tuned by the validation loss, the mean over seeds that are not used again: from one common setting
it walks over a grid of peak learning rates and ``trust``, each twice the one before, until none of the four neighbours
is better; so the best setting is never at an edge. Then it is trained with it on each of the other seeds, and judged by
images that nothing was chosen by. The record has a line for each run; runs that are in it are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_decentral.callbacks import MicroBatchNorms
from lightning_decentral.lab.benchmarks.report import QUIET, logging_off, mean_and_error, spread
from lightning_decentral.lab.results import environment
from lightning_decentral.optimizers import CLARS
from lightning_decentral.recipes import EmbeddedImages, LargeBatchResNet
from lightning_decentral.recipes.resnet import CIFARResNet

TRAINING_IMAGES = 4000
SCORES = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")
FIRST_TUNING_SEED = 1000
SHOWN_STEPS = (1, 5, 10, 20, 30, 48)
BASELINE = "LARS, warm-up"
Setting = tuple[float, float]
"""Peak learning rate, and ``trust``."""
Key = tuple[str, str, float, float, int]
"""The first five columns of a run."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    ``depth`` above 0: a residual network of width 8, whose batches are normalized in parts. 0: fully connected layers
    without normalization, ``hidden`` of 200 numbers; with 4, the shape of the MNIST network of the authors of CLARS,
    but with ReLU. A warm-up begins at the peak over ``scale``; ``warmup`` is its part of the steps.
    """

    depth: int = 8
    images: int = 256
    part: int = 32
    epochs: int = 6
    scale: float = 4.0
    warmup: float = 0.2
    start: Setting = (0.2, 0.32)
    hidden: int = 4

    @property
    def parts(self) -> int:
        return self.images // self.part

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(TRAINING_IMAGES // self.part / self.parts)

    def network(self) -> nn.Module:
        if self.depth:
            return CIFARResNet(self.depth, in_channels=1, width=8)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise((784, *[200] * self.hidden, 10)):
            layer = nn.Linear(inputs, outputs)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1])


TASKS = {
    "recipe": Task(),  # recipes/large_batch
    "recipe_12_epochs": Task(epochs=12),
    "recipe_parts_of_8": Task(part=8),
    "resnet20": Task(depth=20),
    "plain": Task(depth=0, images=512, scale=100.0, start=(0.2, 0.16)),
    "plain_parts_of_8": Task(depth=0, images=512, part=8, scale=100.0, start=(0.2, 0.16)),
    "plain_10_layers": Task(depth=0, images=512, scale=100.0, start=(0.1, 0.08), hidden=10),
    "plain_half_warmup": Task(depth=0, images=512, scale=100.0, warmup=0.5, start=(0.2, 0.16)),
}


@dataclass(frozen=True)
class Contender:
    """An optimizer. ``bound``: the largest rate of a layer, as a multiple of ``trust``; the authors' code has 10."""

    optimizer: Literal["sgd", "lars", "clars", "lamb"]
    warmed_up: bool = False
    rate_in_buffer: bool = False
    bound: float = 1e4

    @property
    def has_trust(self) -> bool:
        return self.optimizer in ("lars", "clars")


CONTENDERS = {
    "CLARS": Contender("clars"),
    "CLARS, bounded": Contender("clars", bound=10.0),
    "CLARS, rate in the buffer": Contender("clars", rate_in_buffer=True),
    "LARS": Contender("lars"),
    BASELINE: Contender("lars", warmed_up=True),
    "momentum SGD": Contender("sgd"),
    "momentum SGD, warm-up": Contender("sgd", warmed_up=True),
    "LAMB, warm-up": Contender("lamb", warmed_up=True),
}
CLAIM = ("CLARS", "CLARS, rate in the buffer", "LARS", BASELINE)


@dataclass(frozen=True)
class Run:
    """One training: what it was, and what came out. ``ratios``: see `Ratios`."""

    task: str
    contender: str
    peak_rate: float
    trust: float
    seed: int
    val_loss: float
    val_accuracy: float
    test_loss: float
    test_accuracy: float
    ratios: str


class Ratios(Callback):
    """The rate of CLARS over what that of LARS would be, the median over layers, at `SHOWN_STEPS`."""

    def __init__(self, trust: float) -> None:
        self.trust = trust
        self.lars: dict[Tensor, Tensor] = {}
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if isinstance(optimizer, CLARS) and trainer.global_step + 1 in SHOWN_STEPS:
            group = optimizer.param_groups[0]
            for w in group["params"]:
                self.lars[w] = self.trust * w.norm() / (w.grad.norm() + group["weight_decay"] * w.norm())

    def on_train_batch_end(self, trainer: Trainer, *unused: Any) -> None:
        if self.lars:
            state = trainer.optimizers[0].state
            self.found.append(statistics.median((state[w]["rate"] / rate).item() for w, rate in self.lars.items()))
            self.lars.clear()


def train(task: Task, contender: Contender, setting: Setting, seed: int) -> tuple[list[float], list[float]]:
    """Loss and accuracy at the end, of the validation and of the test images; and the ratios."""
    seed_everything(seed, verbose=False)
    peak, trust = setting
    model = LargeBatchResNet(
        optimizer=contender.optimizer,
        learning_rate=peak / task.scale,
        trust=trust,
        scale=task.scale,
        max_rate=contender.bound * trust,
        rate_in_buffer=contender.rate_in_buffer,
        warmup_steps=round(task.warmup * task.steps) if contender.warmed_up else 0,
    )
    model.network = task.network()
    for parameter in model.parameters():
        if parameter.dim() == 4:  # this order of the numbers changes the time only: 0.6 of it on a CPU
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    ratios = Ratios(trust)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=task.epochs,
        accumulate_grad_batches=task.parts,
        callbacks=[MicroBatchNorms(), ratios] if contender.optimizer == "clars" else [],
        limit_val_batches=0,
        **QUIET,
    )
    trainer.fit(model, EmbeddedImages(batch_size=task.part, shift_pixels=2 if task.depth else 0))
    images = EmbeddedImages(batch_size=500)
    judge = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    (validation,) = judge.validate(model, images, verbose=False)
    (test,) = judge.test(model, images, verbose=False)
    return [{**validation, **test}[name] for name in SCORES], ratios.found


@dataclass
class Record:
    """The runs that were made, in a file."""

    path: Path
    runs: dict[Key, Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            with open(self.path) as file:
                for row in csv.DictReader(file):
                    key = (
                        row["task"],
                        row["contender"],
                        float(row["peak_rate"]),
                        float(row["trust"]),
                        int(row["seed"]),
                    )
                    self._add(key, [float(row[name]) for name in SCORES], row["ratios"])

    def _add(self, key: Key, scores: list[float], ratios: str) -> Run:
        val_loss, val_accuracy, test_loss, test_accuracy = scores
        self.runs[key] = Run(*key, val_loss, val_accuracy, test_loss, test_accuracy, ratios)
        return self.runs[key]

    def run(self, task: str, contender: str, setting: Setting, seed: int) -> Run:
        """Take the result from the file, or train for it."""
        key = (task, contender, *setting, seed)
        if key not in self.runs:
            found, ratios = train(TASKS[task], CONTENDERS[contender], setting, seed)
            # A loss that is not a number is the largest of all.
            scores = [round(value, 5) if math.isfinite(value) else math.inf for value in found]
            run = self._add(key, scores, " ".join(f"{ratio:.3f}" for ratio in ratios))
            new = not self.path.exists()
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if new:
                    writer.writerow(column.name for column in fields(Run))
                writer.writerow(astuple(run))
        return self.runs[key]


def descend(loss: Callable[[Setting], float], start: Setting, with_trust: bool) -> Setting:
    """Go from ``start`` to the best neighbour, half or twice as large in one of the two, until none is better."""
    best = start
    while True:
        rate, trust = best
        around = [(2 * rate, trust), (rate / 2, trust)]
        if with_trust:
            around += [(rate, 2 * trust), (rate, trust / 2)]
        nearest = min(around, key=loss)
        if loss(nearest) >= loss(best):
            return best
        best = nearest


def report(record: Record, task: str, names: list[str], best: dict[str, Setting], seeds: list[int]) -> None:
    """Print what was tried, and what the best of it came to on other seeds."""
    for name in names:
        tried: dict[Setting, list[float]] = {}
        for run in record.runs.values():
            if (run.task, run.contender) == (task, name) and run.seed >= FIRST_TUNING_SEED:
                tried.setdefault((run.peak_rate, run.trust), []).append(run.val_loss)
        print(f"\n{name}: validation loss of the tuning seeds\n")
        trusts = sorted({trust for _, trust in tried})
        print(f"| peak rate | {' | '.join(f'trust {trust:g}' for trust in trusts)} |\n|---|{'---|' * len(trusts)}")
        for rate in sorted({rate for rate, _ in tried}):
            cells = [tried.get((rate, trust)) for trust in trusts]
            print(
                f"| {rate:g} | {' | '.join(f'{statistics.mean(losses):.3g}' if losses else '' for losses in cells)} |"
            )
    if not seeds:
        return
    print("\n| contender | peak rate | trust | test accuracy (%) | test loss | loss - loss of LARS, warm-up |")
    print("|---|---|---|---|---|---|")
    finals = {name: [record.run(task, name, best[name], seed) for seed in seeds] for name in names}
    for name, runs in finals.items():
        trust = f"{best[name][1]:g}" if CONTENDERS[name].has_trust else ""
        losses, accuracies = [run.test_loss for run in runs], [100 * run.test_accuracy for run in runs]
        against = ""
        if name != BASELINE and BASELINE in finals:
            pairs = list(zip(runs, finals[BASELINE], strict=True))
            points = mean_and_error([100 * (own.test_accuracy - other.test_accuracy) for own, other in pairs], ".2f")
            against = (
                f"{mean_and_error([own.test_loss - other.test_loss for own, other in pairs], '.4f')} ({points} points)"
            )
        setting = f"{best[name][0]:g} | {trust}"
        print(f"| {name} | {setting} | {spread(accuracies, '.1f')} | {spread(losses, '.3f')} | {against} |")
    print("\nRate of CLARS over that of LARS, mean over seeds, at steps", *SHOWN_STEPS)
    for name, runs in finals.items():
        if runs[0].ratios:
            columns = zip(*(map(float, run.ratios.split()) for run in runs), strict=True)
            print(f"* {name}:", ", ".join(f"{statistics.mean(column):.2f}" for column in columns))


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Test loss of the contenders, a line for each seed, and their means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    names = list(losses)
    for by_contender in zip(*losses.values(), strict=True):
        axes.plot(names, by_contender, marker="o", color="0.7", markersize=4, linewidth=1)
    axes.plot(names, [statistics.mean(values) for values in losses.values()], "k_", markersize=40, label="mean")
    axes.set(ylabel="test loss", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="recipe")
    parser.add_argument("--contenders", default=";".join(CLAIM), help=f"some of: {'; '.join(CONTENDERS)}")
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--settings", help="PEAK,TRUST;...: tune over these and do not walk")
    parser.add_argument("--seeds", type=int, default=8, help="after tuning; 0: only tune")
    parser.add_argument("--record", default="large_batch.csv", type=Path, help="runs in this file are kept")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    record = Record(options.record)
    names = options.contenders.split(";")
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
    best: dict[str, Setting] = {}
    for name in names:

        def loss(setting: Setting, name: str = name) -> float:
            return statistics.mean(record.run(options.task, name, setting, seed).val_loss for seed in tuning)

        if options.settings:
            pairs = [pair.split(",") for pair in options.settings.split(";")]
            best[name] = min(((float(rate), float(trust)) for rate, trust in pairs), key=loss)
        else:
            best[name] = descend(loss, TASKS[options.task].start, CONTENDERS[name].has_trust)
    seeds = list(range(1, options.seeds + 1))
    for seed in seeds:
        for name in names:
            record.run(options.task, name, best[name], seed)
    print(f"# Large batches: {options.task}\n\n{environment()}\n\n{TASKS[options.task]}")
    report(record, options.task, names, best, seeds)
    if options.plot:
        losses = {
            name: [record.run(options.task, name, best[name], seed).test_loss for seed in seeds] for name in names
        }
        draw(losses, options.plot)


if __name__ == "__main__":
    main()
