"""What the methods cost where no network limits them: step time and memory against the same loop without communication.

    python -m lightning_decentral.lab.benchmarks.overhead [--workers 2] [--rounds 5] [--compute 0.5]

Every round trains each contender for some steps in fresh processes, one contender after the other, so that a machine
that changes its speed changes it for all. Compute is a sleep that stands for an accelerator; the gradient of all
parameters is real. Reported: each round's median step time over all workers and steps, as a ratio to the loop without
communication of the same round; and resident memory at the end of training minus that of the loop without
communication, in copies of the model. Memory that workers of one machine share counts for each of them with its share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral import AsyncStrategy, GossipStrategy
from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, SyncSGD
from lightning_decentral.lab.bench.contenders.ours import NoCommunication
from lightning_decentral.lab.benchmarks.report import QUIET, logging_off
from lightning_decentral.lab.results import environment
from lightning_decentral.topology import Complete, Ring


class Model(LightningModule):
    """A linear layer of the wanted size and a sleep."""

    def __init__(self, parameters: int, compute_seconds: float) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1000, parameters // 1000, bias=False)
        self.compute_seconds = compute_seconds

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(self.compute_seconds)
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Measure(Callback):
    def __init__(self, path: str) -> None:
        self.path = path
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        steps = [b - a for a, b in zip(self.times[3:], self.times[4:], strict=False)]
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        memory = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        torch.save({"steps": steps, "memory": memory}, f"{self.path}-{trainer.global_rank}")


def run(strategy: object, workers: int, parameters: int, compute_seconds: float, steps: int) -> tuple[float, float]:
    """Median step seconds and mean resident bytes of a worker."""
    seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy=strategy,  # type: ignore[arg-type]
            accelerator="cpu",
            devices=workers,
            max_steps=steps,
            max_epochs=-1,
            **QUIET,
            callbacks=[Measure(f"{folder}/worker")],
        )
        data = TensorDataset(torch.randn(4 * workers * steps, 1000))
        trainer.fit(Model(parameters, compute_seconds), DataLoader(data, batch_size=4))
        results = [torch.load(f"{folder}/worker-{rank}") for rank in range(workers)]
    all_steps = [seconds for result in results for seconds in result["steps"]]
    return statistics.median(all_steps), statistics.mean(result["memory"] for result in results)


def contender(name: str, workers: int) -> object:
    """Return the strategy of that name."""
    ring = Ring(workers) if workers >= 3 else Complete(workers)
    lazy = Ring(workers, lazy=True) if workers >= 3 else Complete(workers)
    algorithms = {
        "no communication": NoCommunication(),
        "D-PSGD, one peer": DPSGD(),
        "D-PSGD, ring": DPSGD(topology=ring),
        "D2, lazy ring": D2(topology=lazy),
        "synchronous SGD": SyncSGD(),
    }
    if name in algorithms:
        return GossipStrategy(algorithms[name], start_method="fork", average_at_end=False)
    if name == "AD-PSGD":  # all call, as they do by default from three workers on
        return AsyncStrategy(ADPSGD(topology=Complete(workers)), start_method="fork", average_at_end=False)
    return "ddp_fork"


CONTENDERS = (
    "no communication",
    "D-PSGD, one peer",
    "D-PSGD, ring",
    "D2, lazy ring",
    "AD-PSGD",
    "synchronous SGD",
    "torch DDP",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--parameters", type=float, default=25e6)
    parser.add_argument("--compute", type=float, default=0.5)
    parser.add_argument("--only", choices=CONTENDERS, help="run one contender and print its figures as JSON")
    options = parser.parse_args()
    n = options.workers
    if options.only is not None:
        warnings.filterwarnings("ignore")
        logging_off()
        torch.set_num_threads(1)
        strategy = contender(options.only, n)
        print(json.dumps(run(strategy, n, int(options.parameters), options.compute, options.steps)))
        return
    ratios: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    copies: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    seconds: list[float] = []
    for _ in range(options.rounds):
        base = (1.0, 0.0)
        for name in CONTENDERS:
            # A process of its own: what an earlier run left in memory would be forked along and counted.
            command = [
                sys.executable,
                "-m",
                "lightning_decentral.lab.benchmarks.overhead",
                *sys.argv[1:],
                "--only",
                name,
            ]
            finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            result = json.loads(finished.stdout.splitlines()[-1])
            if name == "no communication":
                base = result
                seconds.append(result[0])
            ratios[name].append(result[0] / base[0])
            copies[name].append((result[1] - base[1]) / (4 * options.parameters))
            print(f"  {name}: {ratios[name][-1]:.3f}, {copies[name][-1]:+.2f} copies", file=sys.stderr, flush=True)
    print(f"# Overhead without a limiting network\n\n{environment()}\n")
    print(
        f"`python -m lightning_decentral.lab.benchmarks.overhead --workers {n} --rounds {options.rounds} "
        f"--steps {options.steps} --parameters "
        f"{options.parameters:g} --compute {options.compute}`: {options.parameters / 1e6:g} million float32 "
        f"parameters, {options.compute} s of compute per step (a sleep that stands for an accelerator; the gradient of "
        f"all parameters is real), loopback. Median step without communication {statistics.median(seconds):.3f} s.\n"
    )
    print("| contender | step time / no communication: median (min to max) | extra memory, model copies |")
    print("|---|---|---|")
    for name in CONTENDERS:
        r, c = ratios[name], copies[name]
        print(f"| {name} | {statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f}) | {statistics.median(c):.2f} |")


if __name__ == "__main__":
    main()
