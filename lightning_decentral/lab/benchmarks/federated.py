"""Federated learning in one process: FedMom against FedAvg, rounds to an accuracy; and what a thousand clients cost.

    python -m lightning_decentral.lab.benchmarks.federated rounds [--seeds 1,2,3,4,5] [--rounds 100] [--target 0.9]
    python -m lightning_decentral.lab.benchmarks.federated cost [--repeats 3]

``rounds``: 4,000 MNIST digits of 100 clients that differ (Dirichlet 0.1 for each class by client), 10 of them in a
round, a network of one hidden layer. Both methods are tuned over the same grid of local and server rates with the first
seed; then each seed is run with both. Reported: the rounds until the accuracy on 500 other digits is reached, and the
ratio of the two with the same seed.

``cost``: ResNet-20, 1,000 clients of 16 random images, 20 in a round, 2 steps each. Reported, in processor time: which
share of the run is in forward passes, backward passes and updates, and the same of Lightning's own loop on one device
over as many batches, in the same process; a plain loop's time over that of the run, whose module logs and which loads
its data; and the largest memory of a process with 1,000 clients and with 25, of the same images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_decentral import SimulatedStrategy
from lightning_decentral.algorithms import FedAvg, FedMom
from lightning_decentral.federated import ClientData, Clients, dirichlet_by_client, iid
from lightning_decentral.lab.benchmarks.report import QUIET, logging_off
from lightning_decentral.lab.digits import digits
from lightning_decentral.lab.results import environment
from lightning_decentral.recipes import ResNetClassifier

LOCAL_RATES, SERVER_RATES = (0.03, 0.1, 0.3), (0.3, 1.0)


class Network(LightningModule):
    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        self.learning_rate = learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Accuracy(Callback):
    """The common model's accuracy on other digits after each round; training ends when the target is reached."""

    def __init__(self, images: Tensor, labels: Tensor, target: float) -> None:
        self.images, self.labels, self.target = images, labels, target
        self.best, self.reached = 0.0, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Network)
        with torch.no_grad():
            right = float((pl_module.net(self.images).argmax(1) == self.labels).double().mean())
        self.best = max(self.best, right)
        if right >= self.target:
            self.reached = trainer.current_epoch + 1
            trainer.should_stop = True


def trainer_of(strategy: Any, rounds: int, callbacks: list[Callback], **options: Any) -> Trainer:
    """Make a trainer that prints and writes nothing."""
    return Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_epochs=rounds,
        callbacks=callbacks,
        **QUIET,
        **options,
    )


def run(method: str, local_rate: float, server_rate: float, seed: int, rounds: int, target: float) -> tuple[int, float]:
    """Return the rounds to the target, or 0 if it is not reached; and the best accuracy."""
    seed_everything(seed, verbose=False)
    images, labels = digits("train")
    partition = dirichlet_by_client(labels, 100, 1.0, seed)  # 0.1 for each of 10 classes
    data = ClientData(torch.utils.data.TensorDataset(images, labels), partition)
    algorithm = FedMom(10, server_rate) if method == "FedMom" else FedAvg(10, server_rate)
    clients = Clients(100, 10, local_epochs=2, seed=seed)
    accuracy = Accuracy(*digits("val"), target)
    trainer = trainer_of(SimulatedStrategy(algorithm, clients=clients), rounds, [accuracy])
    trainer.fit(Network(local_rate), DataLoader(data, batch_size=10))
    return accuracy.reached, accuracy.best


def compare_rounds(options: argparse.Namespace) -> None:
    """Tune both methods over the same grid with the first seed, and run all seeds."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    best: dict[str, tuple[float, float]] = {}
    print(f"# FedMom against FedAvg: rounds to {options.target:.0%}\n\n{environment()}\n")
    print("| method | local rate | server rate | seed | rounds | best accuracy |\n|---|---|---|---|---|---|")

    def row(method: str, rates: tuple[float, float], seed: int) -> tuple[int, float]:
        reached, accuracy = run(method, *rates, seed, options.rounds, options.target)
        print(f"| {method} | {rates[0]} | {rates[1]} | {seed} | {reached or '-'} | {accuracy:.3f} |", flush=True)
        return reached, accuracy

    found: dict[str, dict[int, int]] = {}
    for method in ("FedAvg", "FedMom"):
        grid = {rates: row(method, rates, seeds[0]) for rates in itertools.product(LOCAL_RATES, SERVER_RATES)}
        best[method] = min(grid, key=lambda rates: (grid[rates][0] or 10**9, -grid[rates][1]))
        found[method] = {seeds[0]: grid[best[method]][0]}
    for seed, method in itertools.product(seeds[1:], ("FedAvg", "FedMom")):
        found[method][seed] = row(method, best[method], seed)[0]
    ratios = [found["FedMom"][s] / found["FedAvg"][s] for s in seeds if found["FedMom"][s] and found["FedAvg"][s]]
    if ratios:
        print(
            f"\nRounds of FedMom to those of FedAvg with the same seed: {statistics.mean(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), {len(ratios)} of {len(seeds)} seeds in which both reached it."
        )


class Stopwatch:
    """Adds up the processor seconds that are spent in something."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def begin(self) -> None:
        """Begin to count."""
        self._began = time.process_time()

    def end(self) -> None:
        """Count what has passed since."""
        self.seconds += time.process_time() - self._began


class TimedSGD(torch.optim.SGD):
    """Counts its updates, without what their closures do."""

    def __init__(self, parameters: Any, watch: Stopwatch) -> None:
        super().__init__(parameters, lr=0.1, weight_decay=1e-4)
        self.watch = watch

    def step(self, closure: Any = None) -> Any:
        """Make an update."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.watch.begin()
        super().step()
        self.watch.end()
        return result


class TimedClassifier(ResNetClassifier):
    """Counts its forward passes, backward passes and updates."""

    def __init__(self) -> None:
        super().__init__(depth=20, in_channels=1, schedule="constant", momentum=0.0, nesterov=False)
        self.watch = Stopwatch()

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of classes."""
        self.watch.begin()
        scores = super().forward(images)
        self.watch.end()
        return scores

    def on_before_backward(self, loss: Tensor) -> None:
        """Learn that a backward pass begins."""
        self.watch.begin()

    def on_after_backward(self) -> None:
        """Learn that it has ended."""
        self.watch.end()

    def configure_optimizers(self) -> Any:
        """Return one that counts."""
        return TimedSGD(self.parameters(), self.watch)


def cost(clients: int) -> dict[str, float]:
    """Measure processor seconds of a run, of Lightning's own loop and of a plain one over as many batches; memory."""
    rounds, per_round, batch = 4, 20, 16
    seed_everything(0, verbose=False)
    images, labels = torch.randn(1000 * batch, 1, 28, 28), torch.randint(10, (1000 * batch,))
    data = ClientData(torch.utils.data.TensorDataset(images, labels), iid(len(images), clients, 0))
    module, watch = TimedClassifier(), Stopwatch()
    population = Clients(clients, per_round, local_steps=2)

    def share_of_fit(trainer: Trainer) -> float:
        """Train; return which share of the time was in passes and updates."""
        module.watch.seconds, before = 0.0, watch.seconds
        watch.begin()
        trainer.fit(module, DataLoader(data, batch_size=batch))
        watch.end()
        return module.watch.seconds / (watch.seconds - before)

    own = share_of_fit(trainer_of(SimulatedStrategy(FedAvg(), clients=population), rounds, []))
    whole = watch.seconds
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lightning = share_of_fit(trainer_of("auto", 1, [], limit_train_batches=rounds * per_round * 2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=1e-4)
    module.train()
    watch.seconds = 0.0
    watch.begin()
    for index in range(rounds * per_round * 2):
        picked = slice(batch * index, batch * (index + 1))
        optimizer.zero_grad()
        F.cross_entropy(module.network(images[picked]), labels[picked]).backward()
        optimizer.step()
    watch.end()
    return {"own": own, "lightning": lightning, "plain": watch.seconds / whole, "memory": memory}


def compare_cost(options: argparse.Namespace) -> None:
    """Run both numbers of clients by turns, each in a process of its own."""
    found: dict[int, list[dict[str, float]]] = {1000: [], 25: []}
    for _ in range(options.repeats):
        for clients, runs in found.items():
            command = [sys.executable, "-m", "lightning_decentral.lab.benchmarks.federated", "one", str(clients)]
            finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            runs.append(json.loads(finished.stdout.splitlines()[-1]))
    print(f"# A thousand clients, 20 in a round, ResNet-20\n\n{environment()}\n")
    print(
        "| clients | in passes and updates | of Lightning's own loop | plain loop / run | largest memory, MB |\n"
        "|---|---|---|---|---|"
    )
    for clients, runs in found.items():
        columns = (
            [each["own"] for each in runs],
            [each["lightning"] for each in runs],
            [each["plain"] for each in runs],
            [each["memory"] for each in runs],
        )
        cells = (f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in columns)
        print(f"| {clients} | {' | '.join(cells)} |")


def main() -> None:
    """Run one of the two benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rounds = commands.add_parser("rounds")
    rounds.add_argument("--seeds", default="1,2,3,4,5")
    rounds.add_argument("--rounds", type=int, default=100)
    rounds.add_argument("--target", type=float, default=0.9)
    repeats = commands.add_parser("cost")
    repeats.add_argument("--repeats", type=int, default=3)
    commands.add_parser("one").add_argument("clients", type=int)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    if options.command == "one":
        print(json.dumps(cost(options.clients)))
    elif options.command == "rounds":
        compare_rounds(options)
    else:
        compare_cost(options)


if __name__ == "__main__":
    main()
