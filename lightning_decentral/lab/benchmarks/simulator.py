"""How fast the simulator is: many workers on a tiny problem, and its share of the time with a real module.

python -m lightning_decentral.lab.benchmarks.simulator
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral import Cluster, SimulatedStrategy
from lightning_decentral.algorithms import ADPSGD
from lightning_decentral.flat import Vector
from lightning_decentral.lab.benchmarks.report import QUIET, logging_off
from lightning_decentral.lab.results import environment
from lightning_decentral.recipes import ResNetClassifier
from lightning_decentral.simulation.simulator import Simulator


def quadratic(workers: int = 256, steps: int = 100, parameters: int = 10) -> float:
    """Seconds for an asynchronous run on ``a (x - b)^2 / 2``."""
    a = [0.5 + torch.rand(parameters) for _ in range(workers)]
    b = [torch.randn(parameters) for _ in range(workers)]
    start = [Vector([torch.randn(parameters)]) for _ in range(workers)]
    simulator = Simulator(ADPSGD(), start, Cluster(jitter="pareto", jitter_scale=1.5))
    began = time.perf_counter()
    simulator.run(lambda w: Vector([a[w.rank] * (w.snapshot.buffers[0] - b[w.rank])]), 0.05, steps)  # type: ignore[attr-defined]
    return time.perf_counter() - began


class Timed(SimulatedStrategy):
    """Counts the seconds of forward, backward and the optimizer's update."""

    useful = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        output = super().training_step(*args, **kwargs)
        self.useful += time.perf_counter() - began
        return output

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        output = super().backward(*args, **kwargs)
        self.useful += time.perf_counter() - began
        return output


def real_module(workers: int = 64) -> float:
    """Return the part of a training epoch that is forward, backward and optimizer."""
    seed_everything(0, verbose=False)
    strategy = Timed(workers=workers)
    data = TensorDataset(torch.randn(1600, 1, 28, 28), torch.randint(10, (1600,)))
    module = ResNetClassifier(depth=20, in_channels=1)
    trainer = Trainer(
        strategy=strategy,
        max_epochs=1,
        **QUIET,
    )
    seconds = {"epoch": 0.0}
    module.on_train_epoch_start = lambda: seconds.update(start=time.perf_counter())  # type: ignore[method-assign]
    module.on_train_epoch_end = lambda: seconds.update(epoch=time.perf_counter() - seconds["start"])  # type: ignore[method-assign]
    update = torch.optim.SGD.step

    def timed_update(optimizer: Any, closure: Any = None) -> Any:
        result = closure() if closure is not None else None
        began = time.perf_counter()
        update(optimizer)
        strategy.useful += time.perf_counter() - began
        return result

    torch.optim.SGD.step = timed_update  # type: ignore[method-assign]
    try:
        trainer.fit(module, DataLoader(data, batch_size=16))
    finally:
        torch.optim.SGD.step = update  # type: ignore[method-assign]
    return strategy.useful / seconds["epoch"]


def main() -> None:
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    runs = [quadratic() for _ in range(5)]
    share = real_module()
    print(
        f"# The simulator\n\n{environment()}\n\n`python -m lightning_decentral.lab.benchmarks.simulator`\n\n"
        "| what | figure |\n|---|---|"
    )
    print(
        "| AD-PSGD, 256 workers x 100 steps, 10 parameters, heavy-tailed compute times | "
        f"{statistics.median(runs):.2f} s ({min(runs):.2f} to {max(runs):.2f}) |"
    )
    print(f"| ResNet-20, 64 virtual workers: part of the epoch in forward, backward and update | {share:.1%} |")


if __name__ == "__main__":
    main()
