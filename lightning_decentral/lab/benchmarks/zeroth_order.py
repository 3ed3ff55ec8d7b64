"""Zeroth-order methods on the recipes: objective and attack against function queries, and what vectorizing saves.

    python -m lightning_decentral.lab.benchmarks.zeroth_order sparse --output FOLDER [--seeds 3]
    python -m lightning_decentral.lab.benchmarks.zeroth_order attack --output FOLDER
    python -m lightning_decentral.lab.benchmarks.zeroth_order directions

A *query* is the loss of one sample at one point. ``sparse``: the model and data of the recipe sparse_text; each method
gets the best of the same learning rates by the objective of a seed that is not used again, and the same number of
queries. ``attack``: the recipe's attack on a classifier that is trained first. ``directions``: an estimate with all
directions in one forward pass (`torch.vmap`) against one with a forward pass for each.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_decentral.lab.benchmarks.report import QUIET, logging_off, spread
from lightning_decentral.lab.results import environment
from lightning_decentral.optimizers import (
    L1,
    ZOSGD,
    AbstractZerothOrder,
    CooSGE,
    GauSGE,
    ZOProxSAGA,
    ZOProxSGD,
    ZOProxSVRG,
)
from lightning_decentral.recipes import (
    EmbeddedImages,
    PlayPassages,
    ResNetClassifier,
    SparseTextClassifier,
    UniversalAttack,
)

WORDS, PASSAGE_WORDS, BATCH, WEIGHT, MU = 100, 600, 24, 0.01, 1e-2
PASSES = 15  # over the data, of ZO-ProxSGD; the others get as many queries
RATES = (0.05, 0.1, 0.2)
TUNING_SEED = 1000
METHODS = ("ZO-ProxSVRG", "ZO-ProxSAGA", "ZO-ProxSGD", "ZO-SGD")
Row = dict[str, Any]


# -- sparse logistic regression ---------------------------------------------------------------------------------------


@dataclass
class Passages:
    """The training and validation passages of the recipe."""

    features: Tensor
    labels: Tensor
    validation_features: Tensor
    validation_labels: Tensor

    @classmethod
    def load(cls) -> Passages:
        data = PlayPassages(WORDS, PASSAGE_WORDS)
        data.setup()
        train, validation = data.parts["train"].tensors, data.parts["val"].tensors
        return cls(train[0], train[1], validation[0], validation[1])


def losses(data: Passages, rows: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """Return the recipe's losses of some passages, as a function of the weights and the bias."""

    def loss(parameters: list[Tensor]) -> Tensor:
        scores = data.features[rows] @ parameters[0] + parameters[1]
        return torch.nn.functional.binary_cross_entropy_with_logits(scores, data.labels[rows], reduction="none")

    return loss


def objective(model: SparseTextClassifier, data: Passages) -> float:
    """Mean loss of the training passages, and the penalty."""
    everything = torch.arange(len(data.labels))
    parameters = [model.weight.detach(), model.bias.detach()]
    return float(losses(data, everything)(parameters).mean() + L1(WEIGHT).value(parameters[0]))


def optimum(data: Passages) -> tuple[float, float]:
    """Return the objective's minimum and the share of zeros there, by proximal gradient descent with momentum."""
    model = SparseTextClassifier(words=WORDS)
    loss = losses(data, torch.arange(len(data.labels)))
    rate = 4.0 / float(torch.linalg.matrix_norm(data.features, 2).square() / len(data.labels) + 1)
    ahead = [parameter.detach().clone() for parameter in (model.weight, model.bias)]
    for step in range(1500):
        point = [value.requires_grad_() for value in ahead]
        gradients = torch.autograd.grad(loss(point).mean(), point)
        with torch.no_grad():
            moved = [value - rate * gradient for value, gradient in zip(point, gradients, strict=True)]
            moved[0] = L1(WEIGHT)(moved[0], rate)
            share = step / (step + 3)
            old = [model.weight.detach().clone(), model.bias.detach().clone()]
            ahead = [new + share * (new - last) for new, last in zip(moved, old, strict=True)]
            model.weight.copy_(moved[0])
            model.bias.copy_(moved[1])
    return objective(model, data), float((model.weight == 0).float().mean())


def train(method: str, rate: float, seed: int, data: Passages) -> list[Row]:
    """Make one run, with a row for about every pass over the data."""
    generator = torch.Generator().manual_seed(seed)
    model = SparseTextClassifier(words=WORDS)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "prox": None}]
    passages = len(data.labels)
    estimator = CooSGE(MU)
    optimizer: AbstractZerothOrder
    if method == "ZO-ProxSVRG":
        optimizer = ZOProxSVRG(groups, rate, estimator, L1(WEIGHT))
    elif method == "ZO-ProxSAGA":
        optimizer = ZOProxSAGA(groups, rate, passages, estimator, L1(WEIGHT))
    elif method == "ZO-ProxSGD":
        optimizer = ZOProxSGD(groups, rate, estimator, L1(WEIGHT))
    else:
        optimizer = ZOSGD([model.weight, model.bias], rate, estimator)
    points = 2 * (WORDS + 1)
    budget, queries, rows = PASSES * passages * points, 0, []

    def note() -> None:
        scores = data.validation_features @ model.weight + model.bias
        right = ((scores > 0) == (data.validation_labels > 0)).float().mean()
        zeros = float((model.weight == 0).float().mean())
        row = {"queries": queries, "objective": objective(model, data), "zeros": zeros, "val_accuracy": float(right)}
        rows.append(row)

    with torch.no_grad():
        note()
        while queries < budget:
            batches = torch.randperm(passages, generator=generator).split(BATCH)
            if isinstance(optimizer, ZOProxSVRG):
                optimizer.snapshot(losses(data, batch) for batch in batches)
                queries += passages * points
            for batch in batches:
                loss = losses(data, batch)
                if isinstance(optimizer, ZOProxSAGA):
                    optimizer.estimate(loss, indices=batch)
                elif isinstance(optimizer, ZOSGD):  # no prox: the penalty is a part of the loss
                    optimizer.estimate(lambda p, own=loss: own(p) + WEIGHT * p[0].abs().sum())
                else:
                    optimizer.estimate(loss)
                optimizer.step()
                queries += len(batch) * points * (2 if isinstance(optimizer, ZOProxSVRG) else 1)
            note()
    return rows


def sparse(output: Path, seeds: int) -> None:
    """Make the table, the CSV file and the plot of the sparse logistic regression."""
    data = Passages.load()
    best, zeros = optimum(data)
    runs = Runs(output / "sparse.csv")

    def rows_of(method: str, rate: float, seed: int) -> list[Row]:
        return runs.get(method, rate, seed, lambda: train(method, rate, seed, data))

    tuned, curves = {}, {}
    for method in METHODS:
        finals = {rate: rows_of(method, rate, TUNING_SEED)[-1]["objective"] for rate in RATES}
        tuned[method] = min(finals, key=lambda rate: finals[rate] if finals[rate] == finals[rate] else float("inf"))
        curves[method] = [rows_of(method, tuned[method], seed) for seed in range(1, seeds + 1)]
    print(
        f"\n{len(data.labels)} passages of {PASSAGE_WORDS} words for training, {len(data.validation_labels)} for "
        f"validation; {WORDS} features; l1 {WEIGHT}; batches of {BATCH}; CooSGE(mu={MU}), {2 * (WORDS + 1)} queries "
        f"for each sample; {PASSES * len(data.labels) * 2 * (WORDS + 1) / 1e6:.1f} million queries in all, and what "
        f"is left of an epoch. Minimum {best:.5f}, with {100 * zeros:.0f} % zeros. Learning rates tried: "
        f"{', '.join(map(str, RATES))}.\n"
    )
    print("| method | learning rate | objective - minimum | zeros (%) | val_accuracy (%) |\n|---|---|---|---|---|")
    for method, curve in curves.items():
        last = [rows[-1] for rows in curve]
        cells = [
            spread([row["objective"] - best for row in last], ".5f"),
            spread([100 * row["zeros"] for row in last], ".0f"),
            spread([100 * row["val_accuracy"] for row in last], ".1f"),
        ]
        print(f"| {method} | {tuned[method]} | {' | '.join(cells)} |")

    def gap(row: Row) -> float:
        return max(row["objective"] - best, 1e-8)

    draw(output / "sparse.png", curves, gap, "objective - minimum", logarithmic=True)


# -- attack -----------------------------------------------------------------------------------------------------------


def classifier(path: Path, epochs: int) -> None:
    """Train the classifier of the image recipe (a small one) and save it."""
    seed_everything(1, verbose=False)
    model = ResNetClassifier(depth=8, in_channels=1, width=8, learning_rate=0.1)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        **QUIET,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, EmbeddedImages(batch_size=32))
    trainer.save_checkpoint(path)


def images(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return some training images with their labels, and the validation images with theirs."""
    data = EmbeddedImages(batch_size=32)
    data.setup("fit")
    train = [data.train_dataloader().dataset[i] for i in range(count)]  # type: ignore[index]
    batches = list(data.val_dataloader())
    return (
        torch.stack([torch.as_tensor(image) for image, _ in train]),
        torch.tensor([int(label) for _, label in train]),
        torch.cat([batch[0] for batch in batches]),
        torch.cat([batch[1] for batch in batches]),
    )


def fooled(model: UniversalAttack, given: Tensor, labels: Tensor, delta: Tensor) -> float:
    """Return the share of rightly classified images that a change makes wrong."""
    before = model.classifier(given).argmax(1) == labels
    after = model.classifier(given + delta).argmax(1) == labels
    return float((before & ~after).sum() / before.sum())


def attack(
    output: Path, seeds: int, count: int, batch: int, rates: tuple[float, ...], budget: int, bound: float
) -> None:
    """Make the table, the CSV file and the plot of the attack."""
    path = output / "classifier.ckpt"
    if not path.exists():
        classifier(path, 3)
    given, labels, validation, validation_labels = images(count)
    runs = Runs(output / "attack.csv")
    curves: dict[str, list[list[Row]]] = {}
    tuned = {}
    model = UniversalAttack(str(path), bound=bound).eval()

    def rows_of(name: str, rate: float, seed: int) -> list[Row]:
        def make() -> list[Row]:
            attacker = UniversalAttack(
                str(path), "svrg" if "SVRG" in name else "sgd", bound=bound, learning_rate=rate, seed=seed
            )
            return assault(attacker, given, labels, validation, validation_labels, batch, budget)

        return runs.get(name, rate, seed, make)

    for name in ("ZO-ProxSGD", "ZO-ProxSVRG"):
        final = {rate: rows_of(name, rate, TUNING_SEED)[-1]["fooled"] for rate in rates}
        tuned[name] = max(final, key=lambda rate: final[rate])
        curves[name] = [rows_of(name, tuned[name], seed) for seed in range(1, seeds + 1)]
    accuracy = float((model.classifier(validation).argmax(1) == validation_labels).float().mean())

    def noise(norm: float) -> str:
        """Tell how many images random signs of this norm fool."""
        changes = [norm / 28 * torch.randn(model.delta.shape).sign() for _ in range(20)]
        return spread([100 * fooled(model, validation, validation_labels, change) for change in changes], ".1f")

    print(
        f"\nResNet-8 of width 8, right on {100 * accuracy:.1f} % of 500 validation images; perturbation of 784 numbers "
        f"in [-{bound:g}, {bound:g}], found on {count} training images in batches of {batch}; "
        f"{model.estimator.num_directions(784)} directions.\n"
    )
    print("| method | learning rate | queries | fooled (%) | l2 norm | random signs of that norm (%) |")
    print("|---|---|---|---|---|---|")
    for name, curve in curves.items():
        last = [rows[-1] for rows in curve]
        cells = [
            f"{last[0]['queries']:.0f}",
            spread([100 * row["val_fooled"] for row in last], ".1f"),
            spread([row["l2"] for row in last], ".1f"),
            noise(statistics.mean(row["l2"] for row in last)),
        ]
        print(f"| {name} | {tuned[name]:g} | {' | '.join(cells)} |")
    draw(output / "attack.png", curves, lambda row: 100 * float(row["val_fooled"]), "fooled (%)", logarithmic=False)


def assault(
    model: UniversalAttack,
    given: Tensor,
    labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    batch: int,
    budget: int,
) -> list[Row]:
    """Make one attack, with a row for about every pass over the images."""
    model.eval()
    optimizer = model.configure_optimizers()
    generator = torch.Generator().manual_seed(model.estimator.seed)
    points = model.estimator.num_directions(784) + 1

    def loss_of(rows: Tensor) -> Callable[[list[Tensor]], Tensor]:
        own, right = given[rows], torch.nn.functional.one_hot(labels[rows], 10).bool()

        def loss(parameters: list[Tensor]) -> Tensor:
            scores = model.classifier(own + parameters[0])
            lead = torch.where(right, scores, 0.0).sum(1) - torch.where(right, -torch.inf, scores).amax(1)
            return lead.relu()

        return loss

    queries, rows = 0, []

    def note() -> None:
        delta = model.delta.detach()
        row = {"queries": queries, "fooled": fooled(model, given, labels, delta), "l2": float(delta.norm())}
        rows.append({**row, "val_fooled": fooled(model, validation, validation_labels, delta)})

    note()
    with torch.no_grad():
        while queries < budget:
            batches = torch.randperm(len(given), generator=generator).split(batch)
            if isinstance(optimizer, ZOProxSVRG):
                optimizer.snapshot(loss_of(rows) for rows in batches)
                queries += len(given) * points
            for own in batches:
                optimizer.estimate(loss_of(own))  # type: ignore[attr-defined]
                optimizer.step()
                queries += len(own) * points * (2 if isinstance(optimizer, ZOProxSVRG) else 1)
            note()
    return rows


# -- directions -------------------------------------------------------------------------------------------------------


def directions(rounds: int) -> None:
    """Times of an estimate: all directions together, and one after the other."""
    data = Passages.load()
    text = SparseTextClassifier(words=WORDS)
    given, labels, _, _ = images(32)
    network = ResNetClassifier(depth=8, in_channels=1, width=8).eval().requires_grad_(False)
    delta = torch.nn.Parameter(torch.zeros(1, 28, 28))

    def attack_loss(parameters: list[Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(network(given + parameters[0]), labels, reduction="none")

    weights = [text.weight, text.bias]
    few = 8
    cases: dict[str, tuple[list[torch.nn.Parameter], Any, Callable[[list[Tensor]], Tensor]]] = {
        f"logistic regression, {WORDS + 1} parameters, CooSGE": (weights, CooSGE(MU), losses(data, torch.arange(32))),
        f"logistic regression, {WORDS + 1} parameters, GauSGE, 64 directions": (
            weights,
            GauSGE(64, MU),
            losses(data, torch.arange(32)),
        ),
        f"ResNet-8 of width 8 on 32 images, GauSGE, {few} directions": ([delta], GauSGE(few, MU), attack_loss),
    }
    print("| losses | one at a time / together: median (min to max) | together (ms) |\n|---|---|---|")
    for name, (parameters, estimator, loss) in cases.items():
        together, alone = (ZOProxSGD(parameters, 0.1, estimator, chunk_size=size) for size in (None, 1))
        ratios, milliseconds = [], []
        for _ in range(rounds + 1):  # the first is not counted
            times = [seconds(lambda own=own, loss=loss: own.estimate(loss)) for own in (together, alone)]
            ratios.append(times[1] / times[0])
            milliseconds.append(1e3 * times[0])
        low, high = min(ratios[1:]), max(ratios[1:])
        middle = statistics.median(ratios[1:])
        print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {statistics.median(milliseconds[1:]):.1f} |")


def seconds(call: Callable[[], object]) -> float:
    """Return the shortest of three."""
    times = []
    for _ in range(3):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return min(times)


# -- what they share --------------------------------------------------------------------------------------------------


class Runs:
    """Runs by method, learning rate and seed, kept in a CSV file: those that are in it are not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, float, int], list[Row]] = {}
        if path.exists():
            with open(path) as file:
                for text in csv.DictReader(file):
                    row: Row = {name: value if name == "method" else float(value) for name, value in text.items()}
                    self.rows.setdefault((row["method"], row["learning_rate"], int(row["seed"])), []).append(row)

    def get(self, method: str, rate: float, seed: int, make: Callable[[], list[Row]]) -> list[Row]:
        """Take it from the file, or make it and add it there."""
        key = (method, rate, seed)
        if key not in self.rows:
            rows: list[Row] = [{"method": method, "learning_rate": rate, "seed": seed, **row} for row in make()]
            new = not self.path.exists()
            with open(self.path, "a", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                if new:
                    writer.writeheader()
                for row in rows:
                    writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
            self.rows[key] = rows
        return self.rows[key]


def draw(
    path: Path, curves: dict[str, list[list[Row]]], value: Callable[[Row], float], label: str, logarithmic: bool
) -> None:
    """Draw a figure over the queries: the mean over seeds, and the range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    for name, runs in curves.items():
        queries = [row["queries"] / 1e3 for row in runs[0]]
        by_point = list(zip(*[[value(row) for row in run] for run in runs], strict=True))
        (line,) = axes.plot(queries, [statistics.mean(values) for values in by_point], label=name)
        lows, highs = [min(values) for values in by_point], [max(values) for values in by_point]
        axes.fill_between(queries, lows, highs, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="queries (thousands)", ylabel=label)
    if logarithmic:
        axes.set_yscale("log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("sparse", "attack"):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--seeds", type=int, default=3)
        if name == "attack":
            command.add_argument("--images", type=int, default=128)
            command.add_argument("--batch", type=int, default=8)
            command.add_argument("--bound", type=float, default=1.0)
            command.add_argument("--rates", default="0.03,0.1,0.3")
            command.add_argument("--queries", type=int, default=30_000)
    commands.add_parser("directions").add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{environment()}\n")
    if options.command == "directions":
        directions(options.rounds)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if options.command == "sparse":
        sparse(options.output, options.seeds)
    else:
        rates = tuple(float(rate) for rate in options.rates.split(","))
        attack(options.output, options.seeds, options.images, options.batch, rates, options.queries, options.bound)


if __name__ == "__main__":
    main()
