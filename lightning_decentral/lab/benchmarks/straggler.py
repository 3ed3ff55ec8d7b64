"""One worker of four 10 times slower: what the others do under AD-PSGD, under DDP, and without communication.

    python -m lightning_decentral.lab.benchmarks.straggler [--rounds 3] [--slowdown 10]

Compute is a sleep, so that the processor is not what is measured. Every round runs the three contenders one after the
other. Reported: steps per second of the fast workers and of all workers together, counted for ``--seconds`` after each
worker's first step, as ratios within the round.
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

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral import AsyncStrategy, GossipStrategy
from lightning_decentral.callbacks import Stragglers
from lightning_decentral.lab.bench.contenders.ours import NoCommunication
from lightning_decentral.lab.benchmarks.report import QUIET, logging_off
from lightning_decentral.lab.results import environment

CONTENDERS = ("no communication", "AD-PSGD", "torch DDP")


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(256, 256)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class StopAfter(Callback):
    """Ends each worker's steps after the same time, and writes how many it made."""

    def __init__(self, path: str, seconds: float) -> None:
        self.path, self.seconds, self.steps, self.began = path, seconds, 0, 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if self.began == 0.0:  # the first step connects and warms up
            self.began = time.perf_counter()
            return
        if time.perf_counter() - self.began < self.seconds:
            self.steps += 1

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        torch.save(self.steps / self.seconds, f"{self.path}-{trainer.global_rank}")


def run(name: str, compute_seconds: float, slowdown: float, seconds: float) -> list[float]:
    """Steps per second of each worker."""
    workers = 4
    strategy: object = "ddp_fork"
    if name == "AD-PSGD":
        strategy = AsyncStrategy(start_method="fork")
    elif name == "no communication":
        strategy = GossipStrategy(NoCommunication(), start_method="fork", average_at_end=False)
    seed_everything(0, verbose=False)
    # Batches enough for the time: the asynchronous workers share them, the others take equal numbers of them.
    fast = (seconds + 2) / compute_seconds
    slow = fast / slowdown
    batches = (workers - 1) * fast + slow if name == "AD-PSGD" else workers * (slow if name == "torch DDP" else fast)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy=strategy,  # type: ignore[arg-type]
            accelerator="cpu",
            devices=workers,
            max_epochs=1,
            **QUIET,
            callbacks=[Stragglers({3: slowdown}, compute_seconds), StopAfter(f"{folder}/worker", seconds)],
        )
        trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(int(batches) * 4, 256)), batch_size=4))
        return [torch.load(f"{folder}/worker-{rank}") for rank in range(workers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slowdown", type=float, default=10.0)
    parser.add_argument("--compute", type=float, default=0.05)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", choices=CONTENDERS, help="run one contender and print its figures as JSON")
    options = parser.parse_args()
    if options.only is not None:
        warnings.filterwarnings("ignore")
        logging_off()
        torch.set_num_threads(1)
        print(json.dumps(run(options.only, options.compute, options.slowdown, options.seconds)))
        return
    fast_ratio, total_ratio, fast_rates = [], [], []
    for _ in range(options.rounds):
        rates: dict[str, list[float]] = {}
        for name in CONTENDERS:
            command = [
                sys.executable,
                "-m",
                "lightning_decentral.lab.benchmarks.straggler",
                *sys.argv[1:],
                "--only",
                name,
            ]
            finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            rates[name] = json.loads(finished.stdout.splitlines()[-1])
            print(f"  {name}: {[round(rate, 2) for rate in rates[name]]}", file=sys.stderr, flush=True)
        fast = {name: statistics.mean(values[:3]) for name, values in rates.items()}
        fast_rates.append(fast["AD-PSGD"])
        fast_ratio.append(fast["AD-PSGD"] / fast["torch DDP"])
        total_ratio.append(sum(rates["AD-PSGD"]) / sum(rates["no communication"]))
    print(f"# One worker of four slowed {options.slowdown:g} times\n\n{environment()}\n")
    print(
        f"`python -m lightning_decentral.lab.benchmarks.straggler --rounds {options.rounds} "
        f"--slowdown {options.slowdown:g} --compute "
        f"{options.compute} --seconds {options.seconds:g}`: compute is a sleep of {options.compute} s; 66 thousand "
        f"parameters, loopback. A fast AD-PSGD worker made {statistics.median(fast_rates):.1f} steps per second.\n"
    )
    print("| ratio, of one interleaved round | median (min to max) |\n|---|---|")
    for text, values in (
        ("steps per second of a fast worker, AD-PSGD / torch DDP", fast_ratio),
        ("steps per second of all workers, AD-PSGD / no communication", total_ratio),
    ):
        print(f"| {text} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")


if __name__ == "__main__":
    main()
