"""How many times as fast as one device stages are, where computing is sleeping; and how long the simulator takes.

    python -m lightning_decentral.lab.benchmarks.stages [--stages 4] [--rounds 2] [--batches 24] [--forward 0.05]

Stages are equal: each sleeps ``--forward`` seconds in a forward pass of a batch and twice that in a backward pass, less
for a part of it, so that cores are no limit and the ideal speed is the number of stages. Each stage is a process in an
emulated host of its own; what goes between two of them has ``--megabytes``. Each round measures one process that has
all stages, and then every schedule, over links without a limit and over links of ``--rate``; speeds are ratios within a
round, of batches in a second once the pipeline is full. *By the clock*: of the schedule, with links that take no time.
Needs Linux and root, as every emulation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.data import DataLoader, Dataset

from lightning_decentral import PipelineStrategy
from lightning_decentral.lab.benchmarks.report import logging_off, spread
from lightning_decentral.lab.emulation import EmulatedNetwork, exit_code, run_in_hosts
from lightning_decentral.lab.results import environment
from lightning_decentral.pipeline.clock import seconds_per_batch
from lightning_decentral.pipeline.local import LocalPipeline
from lightning_decentral.pipeline.schedules import (
    Schedule,
    ddg,
    dsp,
    features_replay,
    gpipe,
    one_f_one_b,
    ouroboros,
    pipe_2bw,
)
from lightning_decentral.simulation.cluster_file import ClusterFile, Host
from lightning_decentral.units import parse_bandwidth

ROWS = 16
_TICKS, _SCALARS = 1000, 8


def contenders(stages: int) -> dict[str, Schedule]:
    """Make the schedules of so many devices, by their names in the report."""
    return {
        "DSP, replays": dsp(stages),
        "DSP, graphs kept": dsp(stages, recompute=False),
        "DDG": ddg(stages),
        "Features Replay": features_replay(stages),
        "PipeDream-2BW": pipe_2bw(stages),
        f"Ouroboros, {stages + 1} stages": ouroboros(stages + 1),
        "GPipe": gpipe(stages),
        "1F1B": one_f_one_b(stages),
    }


class _Sleep(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = 2 * seconds * len(x) / ROWS
        time.sleep(seconds * len(x) / ROWS)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return errors[0], None


class Sleeper(nn.Module):
    """Takes as long as it is told, for a batch of `ROWS` rows, and passes on what it gets, times a weight."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self._seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        slept: Tensor = _Sleep.apply(x * self.weight, self._seconds)
        return slept


class Rows(Dataset[Tensor]):
    """Rows of zeros, which take no memory."""

    def __init__(self, batches: int, width: int) -> None:
        self._length = batches * ROWS
        self._row = torch.zeros(1).expand(width)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        return self._row


class Sleeping(LightningModule):
    """As many sleepers as stages; together they take as long as the whole model on one device.

    Args:
        stages: number of them.
        seconds: of a forward pass of one.
    """

    def __init__(self, stages: int, seconds: float) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Sleeper(seconds) for _ in range(stages)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _Ends(Callback):
    """Notes when batches end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.perf_counter())


def seconds_of(ends: Sequence[float]) -> float:
    """Return the seconds of a batch in the middle half of a run: the pipeline is full, and does not drain yet."""
    begin, end = len(ends) // 4, 3 * len(ends) // 4
    return (ends[end] - ends[begin]) / (end - begin)


def trained(strategy: Any, stages: int, devices: int, options: argparse.Namespace) -> float:
    """Train, and measure the seconds of a batch on this worker.

    Args:
        strategy: of the Trainer.
        stages: in which the model is made.
        devices: how many processes train it.
        options: of the command.
    """
    ends = _Ends()
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        num_nodes=devices,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[ends],
    )
    width = int(options.megabytes * 1e6 / 4 / ROWS)
    # The whole model takes as long, in however many stages.
    module = Sleeping(stages, options.forward * options.stages / stages)
    trainer.fit(module, DataLoader(Rows(options.batches, width), batch_size=ROWS))
    return seconds_of(ends.seconds)


def work(options: argparse.Namespace) -> None:
    """Measure all schedules on one worker; worker 0 writes the seconds of a batch of each."""
    found: dict[str, float] = {}
    for name, schedule in contenders(options.stages).items():
        strategy = PipelineStrategy(schedule, cuts=range(1, schedule.stages), exchange_timeout_seconds=60.0)
        found[name] = trained(strategy, schedule.stages, options.stages, options)
        if options.rank == 0:
            print(f"  {name}: {found[name]:.3f} s", file=sys.stderr, flush=True)
    if options.rank == 0:
        Path(options.work).write_text(json.dumps(found))


def in_hosts(rate: float, options: argparse.Namespace) -> dict[str, float]:
    """Measure all schedules in emulated hosts with links of a rate."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "lightning_decentral.lab.benchmarks.stages", "--work", str(file), "--rank"]
        command += ["{rank}", "--stages", str(options.stages), "--batches", str(options.batches)]
        command += ["--forward", str(options.forward), "--megabytes", str(options.megabytes)]
        hosts = ClusterFile("stages", (Host(rate_bytes_per_second=rate),) * options.stages)
        with EmulatedNetwork(hosts, "stages") as network:
            outcomes = run_in_hosts(
                network, command, {"OMP_NUM_THREADS": "1"}, timeout_seconds=300.0, output=_to_stderr
            )
        if exit_code(outcomes):
            raise SystemExit(f"The hosts failed: {outcomes}.")
        found: dict[str, float] = json.loads(file.read_text())
    return found


def _to_stderr(host: int | None, line: str) -> None:
    print(host, line, file=sys.stderr, flush=True)


class _Number(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def simulated(ticks: int) -> tuple[float, float]:
    """Measure processor seconds for ticks of DSP with 8 stages of one number each, and for the same calls of torch in a
    plain loop."""
    net, batch = nn.Sequential(*(_Number() for _ in range(_SCALARS))), torch.ones(1)
    pipeline = LocalPipeline(
        dsp(_SCALARS),
        net,
        lambda x: net(x).square().sum(),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        tuple(range(1, _SCALARS)),
    )
    pipeline.train(batch)
    began = time.process_time()
    for _ in range(ticks):
        pipeline.train(batch)
    ours = time.process_time() - began
    blocks = [_Number() for _ in range(_SCALARS)]
    optimizers = [torch.optim.SGD(block.parameters(), lr=1e-3) for block in blocks]
    began = time.process_time()
    for _ in range(ticks):
        for block, optimizer in zip(blocks, optimizers, strict=True):
            with torch.no_grad():
                block(batch)
            leaf = batch.detach().requires_grad_()
            gradient, _error = torch.autograd.grad(block(leaf), (block.weight, leaf))
            block.weight.grad = gradient
            optimizer.step()
    return ours, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--forward", type=float, default=0.05)
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--work", help="a file: be one worker, and write there")
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    if options.work is not None:
        work(options)
        return
    links = {"free": math.inf, options.rate: parse_bandwidth("--rate", options.rate)}
    speeds: dict[tuple[str, str], list[float]] = {}
    simulations = []
    for _ in range(options.rounds):
        alone = trained("auto", options.stages, 1, options)
        for link, rate in links.items():
            for name, seconds in in_hosts(rate, options).items():
                speeds.setdefault((name, link), []).append(alone / seconds)
        simulations.append(simulated(_TICKS))
    print(f"# Stages that sleep: {options.stages} devices and one\n\n{environment()}\n")
    print(
        f"A stage sleeps {options.forward:g} s in a forward pass of a batch and {2 * options.forward:g} s in a "
        f"backward pass; {options.megabytes:g} MB go between two. {options.batches} batches, {options.rounds} rounds.\n"
    )
    print("## Speed, one device = 1\n")
    print(f"| schedule | by the clock | free links | links of {options.rate} | of the clock's, at {options.rate} |")
    print("|---|---|---|---|---|")
    for name, schedule in contenders(options.stages).items():
        share = options.stages / schedule.stages
        ideal = 3.0 * options.stages / seconds_per_batch(schedule, forward_seconds=share, backward_seconds=2.0 * share)
        free, limited = speeds[name, "free"], speeds[name, options.rate]
        parts = [each / ideal for each in limited]
        print(f"| {name} | {ideal:.2f} | {spread(free, '.2f')} | {spread(limited, '.2f')} | {spread(parts, '.2f')} |")
    print(f"\n## {_SCALARS} stages of one number each, {_TICKS} ticks of DSP in one process\n")
    print("| | processor seconds |\n|---|---|")
    print(f"| the pipeline | {spread([ours for ours, _ in simulations], '.2f')} |")
    print(f"| torch's calls alone, in a loop | {spread([loop for _, loop in simulations], '.2f')} |")
    print(f"| ratio | {spread([ours / loop for ours, loop in simulations], '.2f')} |")


if __name__ == "__main__":
    main()
