"""What the papers of the server methods claim, in miniature: 4,000 MNIST digits, simulated workers, seeds.

    python -m lightning_decentral.lab.benchmarks.servers staleness [--seeds 1,2,3]
    python -m lightning_decentral.lab.benchmarks.servers stragglers [--seeds 1,2,3]
    python -m lightning_decentral.lab.benchmarks.servers congested [--seeds 1,2,3]
    python -m lightning_decentral.lab.benchmarks.servers congested-8 [--seeds 1,2,3]
    python -m lightning_decentral.lab.benchmarks.servers speedup [--seeds 1,2,3]

A network of one hidden layer, plain SGD, 16 digits in a gradient, drawn by each worker from all digits. The gradients
are real; the clock is virtual: a gradient takes about one second. Accuracy is that of the model which is evaluated, on
500 other digits.

``staleness``: plain and staleness-aware asynchronous SGD at one learning rate, with 16 and 32 workers of about equal
speed; the accuracy after 2 epochs. ``stragglers``: ten workers with heavy-tailed times of a gradient; synchronous,
backup workers, asynchronous: time to an accuracy, and the best of 4 epochs. ``congested``: links that take no time for
a model, or as long as to make a server's link the limit; A-PSGD, AD-PSGD whose steps wait for their calls and whose
calls go on beside them, and synchronous SGD, with 16 workers; ``congested-8``: with 8.
``speedup``: the time that one worker needs to an accuracy over the time of several, of A-PSGD with free links and with
links that take a tenth of a second for a model. With free links the virtual workers of Hogwild make the very updates
of A-PSGD.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_decentral.algorithms import ADPSGD, APSGD, BackupWorkers, StalenessAware, SyncSGD
from lightning_decentral.flat import Vector
from lightning_decentral.lab.benchmarks.report import spread
from lightning_decentral.lab.digits import digits as read_digits
from lightning_decentral.lab.results import environment
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import BipartiteExponential, Complete

SHAPES = ((32, 784), (32,), (10, 32), (10,))
NUMBERS = sum(torch.Size(shape).numel() for shape in SHAPES)
MODEL_BYTES = 4 * NUMBERS
BATCH = 16
NEARLY_EQUAL: dict[str, Any] = {"compute_seconds": 1.0, "jitter": "lognormal", "jitter_scale": 0.1}


@dataclass(frozen=True, eq=False)
class Digits:
    """Digits to train on, and others."""

    images: Tensor
    labels: Tensor
    others: Tensor
    others_labels: Tensor

    @staticmethod
    def read() -> Digits:
        (images, labels), (others, others_labels) = read_digits("train"), read_digits("val")
        return Digits(images.flatten(1), labels, others.flatten(1), others_labels)


def parts(x: Tensor) -> list[Tensor]:
    """Take the weights and biases out of a flat vector."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [part.view(shape) for part, shape in zip(x.split(sizes), SHAPES, strict=True)]


def outputs(x: Tensor, images: Tensor) -> Tensor:
    """Apply the network."""
    first, first_bias, last, last_bias = parts(x)
    return F.linear(F.relu(F.linear(images, first, first_bias)), last, last_bias)


def start(seed: int) -> Tensor:
    """Draw the weights that all workers begin with."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(shape, generator=generator) * (2 / shape[-1]) ** 0.5 if len(shape) > 1 else torch.zeros(shape)
        for shape in SHAPES
    ]
    return torch.cat([each.flatten() for each in drawn])


@dataclass
class Run:
    """What came of a run.

    Attributes:
        seconds: virtual ones, to the target; none if it was not reached.
        best: accuracy.
        last: accuracy.
    """

    seconds: float | None = None
    best: float = 0.0
    last: float = 0.0


def train(
    method: AbstractAlgorithm,
    workers: int,
    cluster: Cluster,
    rate: float,
    seed: int,
    digits: Digits,
    epochs: float,
    target: float = 1.0,
    stops: bool = True,
) -> Run:
    """Train until an accuracy is reached, or so many gradients were computed by all workers together.

    Args:
        epochs: of gradients; one is as many as there are digits, over `BATCH`.
        target: the accuracy.
        stops: whether it ends there.
    """
    vectors = [Vector([start(seed)]) for _ in range(workers)]
    simulator = Simulator(method, vectors, cluster, seed)
    draws = [random.Random(seed * 1000 + rank) for rank in range(workers)]
    gradients: dict[int, Vector] = {}
    for worker in simulator.workers:
        worker.read_gradient = lambda rank=worker.rank: gradients[rank]  # type: ignore[misc]
    number, made, result = len(digits.labels), 0, Run()
    budget, every = int(epochs * number / BATCH), max(workers, 25)
    for request, worker in simulator.demands():
        if not isinstance(request, Gradient):
            direction = request.gradient if request.gradient is not None else gradients[worker.rank]
            request.target(worker).add_(direction, alpha=-rate)
            continue
        assert isinstance(worker.snapshot, Vector)
        x = worker.snapshot.buffers[0].clone().requires_grad_()
        picked = draws[worker.rank].choices(range(number), k=BATCH)
        loss = F.cross_entropy(outputs(x, digits.images[picked]), digits.labels[picked])
        (gradient,) = torch.autograd.grad(loss, x)
        gradients[worker.rank] = Vector([gradient])
        made += 1
        if made % every == 0 or made >= budget:
            model = simulator.consensus().buffers[0]
            result.last = float((outputs(model, digits.others).argmax(1) == digits.others_labels).float().mean())
            result.best = max(result.best, result.last)
            if result.seconds is None and result.last >= target:
                result.seconds = simulator.seconds
            if made >= budget or (stops and result.seconds is not None):
                break
    simulator.close()
    return result


def percent(values: list[float]) -> str:
    """Write accuracies in percent."""
    return spread([100 * value for value in values], ".1f")


def staleness(seeds: list[int], digits: Digits) -> None:
    """Compare plain and staleness-aware asynchronous SGD."""
    rate, cluster = 0.1, Cluster(**NEARLY_EQUAL)
    print(f"# Staleness-aware and plain asynchronous SGD, learning rate {rate}\n\n{environment()}\n")
    print("| method | workers | accuracy after 2 epochs, % |\n|---|---|---|")
    rows: list[tuple[str, AbstractAlgorithm, int]] = [("SGD, one worker", APSGD(), 1)]
    for workers in (16, 32):
        rows += [(f"A-PSGD, {workers}", APSGD(), workers), (f"staleness-aware, {workers}", StalenessAware(), workers)]
    for name, method, workers in rows:
        runs = [train(method, workers, cluster, rate, seed, digits, 2) for seed in seeds]
        print(f"| {name} | {workers} | {percent([run.last for run in runs])} |", flush=True)


def times(runs: list[Run]) -> str:
    """Write the seconds to the target, and how often it was reached."""
    reached = [run.seconds for run in runs if run.seconds is not None]
    if not reached:
        return "not reached"
    return spread(reached, ".0f") + (f", {len(reached)} of {len(runs)} seeds" if len(reached) < len(runs) else "")


def stragglers(seeds: list[int], digits: Digits) -> None:
    """Compare synchronous, backup workers and asynchronous, where some gradients take very long."""
    workers, target, rate = 10, 0.85, 0.2
    cluster = Cluster(compute_seconds=1.0, jitter="pareto", jitter_scale=1.2)
    print(f"# Ten workers, heavy-tailed times of a gradient: seconds to {target:.0%}\n\n{environment()}\n")
    print("| method | learning rate | virtual seconds | best accuracy of 4 epochs, % |\n|---|---|---|---|")
    contenders: list[tuple[str, AbstractAlgorithm, float]] = [
        ("synchronous, all ten", BackupWorkers(10), rate),
        ("8 of 10", BackupWorkers(8), rate),
        ("6 of 10", BackupWorkers(6), rate),
        ("asynchronous", APSGD(), rate / workers),
    ]
    for name, method, own in contenders:
        runs = [train(method, workers, cluster, own, seed, digits, 4, target, stops=False) for seed in seeds]
        print(f"| {name} | {own:g} | {times(runs)} | {percent([run.best for run in runs])} |", flush=True)


def congested(seeds: list[int], digits: Digits, workers: int = 16) -> None:
    """Compare AD-PSGD and A-PSGD, where a server's link is the limit."""
    target, rate = 0.85, 0.2
    print(f"# A server's link and many links: virtual seconds to {target:.0%}\n\n{environment()}\n")
    names = ("A-PSGD", "AD-PSGD, each step waits", "AD-PSGD, calls beside steps", "synchronous SGD")
    print(f"| workers, and seconds of a model on a link | {' | '.join(names)} |\n|---|---|---|---|---|")
    contenders: list[tuple[AbstractAlgorithm, float]] = [
        (APSGD(), rate / workers),
        (ADPSGD(Complete, partners="random", max_pending_steps=1), rate),
        (ADPSGD(BipartiteExponential, partners="rotating", max_pending_steps=64), rate),
        (SyncSGD(), rate),
    ]
    for seconds in (0.0, 1.0, 4.0):
        link = {"bandwidth_bytes_per_second": MODEL_BYTES / seconds} if seconds else {}
        cluster = Cluster(**NEARLY_EQUAL, **link)
        cells = [
            times([train(method, workers, cluster, own, seed, digits, 12, target) for seed in seeds])
            for method, own in contenders
        ]
        print(f"| {workers} workers, {seconds:g} s | {' | '.join(cells)} |", flush=True)


def speedup(seeds: list[int], digits: Digits) -> None:
    """Measure how much sooner several workers reach an accuracy than one does, at the learning rate of one."""
    target, rate = 0.85, 0.02
    print(f"# How much sooner {target:.0%} is reached than by one worker, learning rate {rate}\n\n{environment()}\n")
    print("| workers | A-PSGD, free links | A-PSGD, a model takes 0.1 s |\n|---|---|---|")
    slow = Cluster(**NEARLY_EQUAL, bandwidth_bytes_per_second=MODEL_BYTES / 0.1)
    columns = [(APSGD(), Cluster(**NEARLY_EQUAL)), (APSGD(), slow)]
    alone: dict[tuple[int, int], float] = {}
    for workers in (1, 2, 4, 8, 16, 32):
        cells = []
        for place, (method, cluster) in enumerate(columns):
            ratios = []
            for seed in seeds:
                run = train(method, workers, cluster, rate, seed, digits, 6, target)
                if workers == 1:
                    alone[place, seed] = run.seconds or float("nan")
                if run.seconds is not None:
                    ratios.append(alone[place, seed] / run.seconds)
            cells.append(spread(ratios, ".1f") if len(ratios) == len(seeds) else "not reached")
        print(f"| {workers} | {' | '.join(cells)} |", flush=True)


COMMANDS: dict[str, Callable[..., None]] = {
    "staleness": staleness,
    "stragglers": stragglers,
    "congested": congested,
    "congested-8": partial(congested, workers=8),
    "speedup": speedup,
}


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=COMMANDS)
    parser.add_argument("--seeds", default="1,2,3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    COMMANDS[options.claim]([int(seed) for seed in options.seeds.split(",")], Digits.read())


if __name__ == "__main__":
    main()
