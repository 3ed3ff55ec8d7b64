"""Is SAEF with 5 % of the values as good as error feedback with 10 %? On the image recipe, over rates and seeds.

    python -m lightning_decentral.lab.benchmarks.step_ahead run --contenders "EF 10 %;SAEF 5 %" \\
        --rates 0.1,0.2 --seeds 1,2,3 --record FILE.csv
    python -m lightning_decentral.lab.benchmarks.step_ahead report --seeds all --record FILE.csv

ResNet-8 of width 16, 4 virtual workers x 16 of 4,000 MNIST digits, 10 epochs, the recipe's schedule, momentum and
weight decay, in one process. Of one seed all contenders have the same initial model, the same batches and the same
shifts. The last ``x`` is evaluated on the 1,000 images that nobody trains on, with the mean of the workers' running
statistics, as the strategies have it. With ``--full`` it is evaluated after `EVALUATED` epochs, ``x`` less the mean of
the errors as well, and both also with statistics measured anew for just that model (50 batches of 16 training images).

``run`` adds a line for each evaluation to the record, and repeats nothing that is in it.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_decentral.algorithms import SAEF
from lightning_decentral.compression import Identity, TopK
from lightning_decentral.flat import Vector
from lightning_decentral.lab.benchmarks.report import mean_and_error, spread
from lightning_decentral.lab.results import environment
from lightning_decentral.normalization.conversion import GroupNormalization
from lightning_decentral.protocol import Gradient
from lightning_decentral.recipes import EmbeddedImages
from lightning_decentral.recipes.images import learning_rate_factor
from lightning_decentral.recipes.resnet import CIFARResNet
from lightning_decentral.simulation.simulator import Simulator

WORKERS, BATCH, EPOCHS, EVALUATED = 4, 16, 10, (5, 10)
MOMENTUM, WEIGHT_DECAY, WARMUP_EPOCHS = 0.9, 1e-4, 1
RECIPE_RATE, ANEW = 0.1, 50
REFERENCE = "EF 10 %"


@dataclass(frozen=True)
class Contender:
    """A setting of `SAEF`; ``share`` of the values is sent, and 1 is no compression."""

    share: float
    averaging_period: int | None = None
    step_ahead: float = 0.0

    def algorithm(self) -> SAEF:
        compressor = Identity() if self.share == 1.0 else TopK(self.share)
        return SAEF(compressor, self.averaging_period, self.step_ahead)


CONTENDERS = {
    "not compressed": Contender(1.0),
    "EF 10 %": Contender(0.1),
    "SAEF 5 %": Contender(0.05, 20, 1.0),
    "EF 5 %": Contender(0.05),
    "EF 5 %, averaged": Contender(0.05, 20),
    "SAEF 5 %, never averaged": Contender(0.05, None, 1.0),
    "SAEF 10 %, never averaged": Contender(0.1, None, 1.0),
    "SAEF 10 %": Contender(0.1, 20, 1.0),
    "DEF 5 %": Contender(0.05, 20, 0.3),
}
Place = Literal["x", "x - mean e"]
Statistics = Literal["averaged", "measured anew"]
PLACES: tuple[Place, ...] = ("x", "x - mean e")
STATISTICS: tuple[Statistics, ...] = ("averaged", "measured anew")


@dataclass(frozen=True)
class Setting:
    """Of one training."""

    contender: str
    rate: float
    seed: int
    momentum: Literal["nesterov", "plain"] = "nesterov"
    norm: Literal["batch", "group"] = "batch"


@dataclass(frozen=True)
class Evaluation:
    """Of one model with one kind of statistics; ``wrong`` of 1,000; the loss is in nats per image."""

    epoch: int
    place: Place
    statistics: Statistics
    wrong: int
    loss: float
    error: float  # norm of the mean error over that of the model


def images_of(data: EmbeddedImages, split: str, indices: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Normalized images ``[n, 1, 28, 28]`` and labels ``[n]``; all if no indices are given."""
    part = data.splits[split]
    pixels, labels = zip(*part.__getitems__(indices or list(range(len(part)))), strict=True)
    return torch.stack(pixels), torch.stack(labels)


class Run:
    """One training."""

    def __init__(self, setting: Setting, data: EmbeddedImages) -> None:
        torch.manual_seed(setting.seed)
        self.setting, self.data = setting, data
        self.network: nn.Module = CIFARResNet(8, in_channels=1, width=16)
        if setting.norm == "group":
            self.network = GroupNormalization(groups=4).convert(self.network)
        named = dict(self.network.named_parameters())
        self.names, self.shapes = list(named), [parameter.shape for parameter in named.values()]
        self.sizes = tuple(parameter.numel() for parameter in named.values())
        start = torch.cat([parameter.detach().flatten() for parameter in named.values()])
        algorithm = CONTENDERS[setting.contender].algorithm()
        self.simulator = Simulator(algorithm, [Vector([start.clone()]) for _ in range(WORKERS)], seed=setting.seed)
        # Each worker's own: parameters that are views of where the algorithm wants the gradient, and statistics.
        self.parameters: list[dict[str, nn.Parameter]] = []
        self.optimizers: list[torch.optim.SGD] = []
        self.buffers = [{n: b.clone() for n, b in self.network.named_buffers()} for _ in range(WORKERS)]

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        pieces = zip(self.names, vector.split(self.sizes), self.shapes, strict=True)
        return {name: piece.view(shape) for name, piece, shape in pieces}

    def begin(self) -> None:
        """Once the algorithm has made its vectors."""
        for worker in self.simulator.workers:
            snapshot = worker.snapshot
            assert isinstance(snapshot, Vector)
            own = {name: nn.Parameter(view) for name, view in self.views(snapshot.buffers[0]).items()}
            self.parameters.append(own)
            nesterov = self.setting.momentum == "nesterov"
            sgd = torch.optim.SGD(
                list(own.values()), momentum=MOMENTUM, nesterov=nesterov, weight_decay=WEIGHT_DECAY, lr=1.0
            )
            self.optimizers.append(sgd)

    def epoch(self, number: int) -> None:
        """Train for one, as many batches as each worker has."""
        factor = learning_rate_factor(number, EPOCHS, WARMUP_EPOCHS, "cosine", (), 1.0)
        order = torch.randperm(len(self.data.splits["train"])).tolist()
        steps = len(order) // WORKERS // BATCH
        batches = [iter([order[r::WORKERS][i * BATCH : (i + 1) * BATCH] for i in range(steps)]) for r in range(WORKERS)]
        self.network.train()
        for request, worker in self.simulator.demands((number + 1) * steps):
            if not self.parameters:
                self.begin()
            own = self.parameters[worker.rank]
            if isinstance(request, Gradient):
                images, labels = images_of(self.data, "train", next(batches[worker.rank]))
                for parameter in own.values():
                    parameter.grad = None
                images = images.contiguous(memory_format=torch.channels_last)  # a tenth less time
                scores = functional_call(self.network, (own, self.buffers[worker.rank]), (images,))
                F.cross_entropy(scores, labels).backward()
            else:
                assert request.at is worker.snapshot
                optimizer = self.optimizers[worker.rank]
                optimizer.param_groups[0]["lr"] = self.setting.rate * factor
                optimizer.step()

    def evaluate(self, epoch: int, full: bool) -> Iterator[Evaluation]:
        """Evaluate ``x`` as it is, or all four kinds."""
        consensus = self.simulator.consensus()
        assert isinstance(consensus, Vector)
        x = consensus.buffers[0]
        error = torch.stack([worker.state["error"].buffers[0] for worker in self.simulator.workers]).mean(0)
        share = (error.norm() / x.norm()).item()
        mean = {
            name: torch.stack([own[name] for own in self.buffers]).mean(0)
            for name, buffer in self.buffers[0].items()
            if buffer.is_floating_point()
        }
        pairs = [images_of(self.data, split) for split in ("val", "test")]
        images, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        for place, model in zip(PLACES, (x, x - error), strict=True):
            parameters = self.views(model)
            if place != "x" and not full:
                continue
            found = {"averaged": mean}
            if mean and full:
                found["measured anew"] = self.measured(parameters)
            self.network.eval()
            for kind in STATISTICS:
                if kind in found:
                    with torch.no_grad():
                        scores = functional_call(self.network, (parameters, found[kind]), (images,))
                        loss = F.cross_entropy(scores, labels).item()
                    wrong = int((scores.argmax(1) != labels).sum())
                    yield Evaluation(epoch, place, kind, wrong, loss if math.isfinite(loss) else math.inf, share)

    def measured(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the plain mean of the statistics of `ANEW` batches of the training images."""
        sums: dict[str, Tensor] = {}
        own = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        norms = [module for module in self.network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum, before = 1.0, norm.momentum
        self.network.train()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            order = torch.randperm(len(self.data.splits["train"])).tolist()
            for i in range(ANEW):
                images, _ = images_of(self.data, "train", order[i * BATCH : (i + 1) * BATCH])
                functional_call(self.network, (parameters, own), (images,))
                for name, value in own.items():
                    if value.is_floating_point():
                        sums[name] = sums.get(name, 0.0) + value / ANEW
        for norm in norms:
            norm.momentum = before
        return sums


FIELDS = ("contender", "rate", "seed", "momentum", "norm", "epoch", "place", "statistics", "wrong", "loss", "error")


class Record:
    """The runs that were made, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[Setting, list[Evaluation]] = {}
        if path.exists():
            with open(path) as file:
                for row in csv.DictReader(file):
                    key = Setting(row["contender"], float(row["rate"]), int(row["seed"]), row["momentum"], row["norm"])
                    value = Evaluation(
                        int(row["epoch"]),
                        row["place"],
                        row["statistics"],
                        int(row["wrong"]),
                        float(row["loss"]),
                        float(row["error"]),
                    )
                    self.runs.setdefault(key, []).append(value)

    def add(self, setting: Setting, evaluations: list[Evaluation]) -> None:
        self.runs[setting] = evaluations
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(FIELDS)
            for one in evaluations:
                setting_columns = (setting.contender, setting.rate, setting.seed, setting.momentum, setting.norm)
                numbers = (one.wrong, f"{one.loss:.5f}", f"{one.error:.5f}")
                writer.writerow([*setting_columns, one.epoch, one.place, one.statistics, *numbers])


def train(settings: Sequence[Setting], record: Record, full: bool, seconds: float) -> None:
    """Train all that are not in the record yet."""
    torch.set_num_threads(1)
    data = EmbeddedImages(batch_size=BATCH, shift_pixels=2)
    data.setup("fit")
    end = time.monotonic() + seconds
    for setting in settings:
        if setting in record.runs:
            continue
        if time.monotonic() > end:
            sys.exit("Out of time: start again with the same record.")
        run, evaluations = Run(setting, data), []
        for number in range(EPOCHS):
            run.epoch(number)
            if number + 1 == EPOCHS or (full and number + 1 in EVALUATED):
                evaluations += run.evaluate(number + 1, full)
        record.add(setting, evaluations)
        print(time.strftime("%X"), setting, next(one for one in evaluations if one.epoch == EPOCHS), flush=True)


def report(record: Record, seeds: set[int], reference: str) -> None:
    """Print two tables: the last epoch, with the difference to the reference over common seeds; all evaluations."""
    print(f"{environment()}\n")
    print(
        "| momentum, norm, rate | contender | seeds | accuracy (%) | loss | accuracy, difference | loss, difference |"
    )
    print(f"|{'---|' * 7}")
    runs = {key: {(e.epoch, e.place, e.statistics): e for e in found} for key, found in record.runs.items()}
    runs = {key: found for key, found in runs.items() if not seeds or key.seed in seeds}
    last: tuple[int, Place, Statistics] = (EPOCHS, "x", "averaged")
    groups = sorted({(key.momentum, key.norm, key.rate) for key in runs})
    for momentum, norm, rate in groups:
        for name in CONTENDERS:
            keys = [
                key for key in runs if (key.momentum, key.norm, key.rate, key.contender) == (momentum, norm, rate, name)
            ]
            if not keys:
                continue
            others = [replace(key, contender=reference) for key in keys]
            both = [(runs[a][last], runs[b][last]) for a, b in zip(keys, others, strict=True) if b in runs]
            own = [runs[key][last] for key in keys]
            cells = [
                f"{momentum}, {norm}, {rate:g}",
                name,
                " ".join(str(seed) for seed in sorted(key.seed for key in keys)),
                spread([100 - one.wrong / 10 for one in own], ".2f"),
                spread([one.loss for one in own], ".4f"),
                "" if name == reference else mean_and_error([(b.wrong - a.wrong) / 10 for a, b in both], ".2f"),
                "" if name == reference else mean_and_error([a.loss - b.loss for a, b in both], ".4f"),
            ]
            print(f"| {' | '.join(cells)} |")
    kinds = [(place, kind) for place in PLACES for kind in STATISTICS]
    print(f"\n| momentum, norm, rate | contender | epoch | error | {' | '.join(': '.join(kind) for kind in kinds)} |")
    print(f"|{'---|' * 8}")
    for momentum, norm, rate in groups:
        for name in CONTENDERS:
            keys = [
                key for key in runs if (key.momentum, key.norm, key.rate, key.contender) == (momentum, norm, rate, name)
            ]
            keys = [key for key in keys if len(runs[key]) > 1]
            for epoch in EVALUATED if keys else ():
                cells = [f"{momentum}, {norm}, {rate:g}", name, str(epoch)]
                cells.append(f"{statistics.mean(runs[key][epoch, 'x', 'averaged'].error for key in keys):.4f}")
                for kind in kinds:
                    found = [runs[key][epoch, *kind] for key in keys if (epoch, *kind) in runs[key]]
                    accuracy = statistics.mean(100 - one.wrong / 10 for one in found) if found else math.nan
                    loss = statistics.mean(one.loss for one in found) if found else math.nan
                    cells.append(f"{accuracy:.2f} {loss:.4f}")
                print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--contenders", default="not compressed;EF 10 %;SAEF 5 %", help="separated by a semicolon")
    parser.add_argument("--rates", default=str(RECIPE_RATE))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--momentum", choices=("nesterov", "plain"), default="nesterov")
    parser.add_argument("--norm", choices=("batch", "group"), default="batch")
    parser.add_argument("--full", action="store_true", help="evaluate more than the last x")
    parser.add_argument("--record", default="step_ahead.csv", type=Path, help="runs in this file are kept")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so long; start again")
    options = parser.parse_args()
    record = Record(options.record)
    if options.command == "run":
        seeds, rates = options.seeds.split(","), options.rates.split(",")
        names = [name.strip() for name in options.contenders.split(";")]
        settings = [
            Setting(name, float(rate), int(seed), options.momentum, options.norm)
            for seed in seeds
            for rate in rates
            for name in names
        ]
        train(settings, record, options.full, options.seconds)
    else:
        report(record, set() if options.seeds == "all" else {int(seed) for seed in options.seeds.split(",")}, REFERENCE)


if __name__ == "__main__":
    main()
