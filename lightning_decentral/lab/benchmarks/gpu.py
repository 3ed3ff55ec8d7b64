"""What needs a GPU, in some minutes on one: the tests that are marked so, and three short measurements.

    python -m lightning_decentral.lab.benchmarks.gpu [--dry-run]

The measurements are what compressing costs in copies of the vector, operation by operation and with one kernel; what
normalization layers cost against BatchNorm2d; and what a step costs in four processes that share the card, whose
messages go through its host: D-PSGD against DDP. Each becomes a folder in ``results/data``. With ``--dry-run`` all of
it runs on the CPU, small, and nothing is kept; of the tests it is checked that they can be collected.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral.algorithms import DPSGD
from lightning_decentral.compression import compressor
from lightning_decentral.compression.fused import VARIABLE
from lightning_decentral.lab import results
from lightning_decentral.lab.benchmarks import compression, full_norm
from lightning_decentral.lab.benchmarks.report import QUIET
from lightning_decentral.strategies import GossipStrategy

SCHEMES = ("int8", "scaled_sign", "onebit", "qsgd", "topk", "powersgd", "orq")
CONTENDERS = ("ddp", "dpsgd")
_WIDTH, _BATCH, _WARM_UP, _STEPS = 2048, 64, 10, 40
_SECONDS = 120.0  # that the processes of one contender may take
_COMMAND = "python3 tasks.py gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, and keep nothing")
    parser.add_argument("--output", type=Path, default=results.DATA, help="where measurements are (results/data)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work(options.worker, options.dry_run)
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print(f"Got no CUDA device, need one. Check all that needs none: {_COMMAND} --dry-run", file=sys.stderr)
        return 1
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *(["--collect-only"] if options.dry_run else [])]
    tests = subprocess.run(command, check=False).returncode
    for subject, title, body in (
        ("gpu-compressors", "Compressing on a GPU, in copies of the vector", compressors(options.dry_run)),
        ("gpu-layers", "Normalization layers on a GPU, BatchNorm2d = 1", layers(options.dry_run)),
        ("gpu-processes", "Steps of four processes that share a GPU", processes(options.dry_run)),
    ):
        report = f"# {title}\n\n{results.environment()}\n\n`{_COMMAND}`, {_device(options.dry_run)}\n\n{body}\n"
        print(report, flush=True)
        if not options.dry_run:
            one = results.new(options.output, subject, title, _COMMAND)
            results.Measurement(**{**vars(one), "tables": results.tables(body)}).write()
            (one.folder / "report.md").write_text(report, encoding="utf-8")
    print(f"{time.monotonic() - began:.0f} s. The tests ended with status {tests}.", flush=True)
    return tests


def compressors(small: bool) -> str:
    """Measure what compressing costs, operation by operation and with kernels: a table in Markdown."""
    x = torch.randn(10_000 if small else 25_000_000).to(_device(small))
    modes = ("0",) if small else ("0", "1")
    ratios: dict[tuple[str, str], list[tuple[float, float]]] = {}
    before = os.environ.get(VARIABLE)
    try:
        for number in range(2 if small else 6):  # the first compiles and warms up
            copy = compression.copy_seconds(x)
            for name in SCHEMES:
                for mode in modes:
                    os.environ[VARIABLE] = mode
                    (compress, decompress, _), _, _ = compression.measure(compressor(name), x)
                    if number:
                        ratios.setdefault((name, mode), []).append((compress / copy, decompress / copy))
    finally:
        os.environ.pop(VARIABLE, None)
        os.environ.update({} if before is None else {VARIABLE: before})
    lines = ["| compressor | kernels | compress | decompress |", "|---|---|---|---|"]
    for (name, mode), measured in ratios.items():
        cells = [_spread([pair[index] for pair in measured]) for index in range(2)]
        lines.append(f"| `{name}` | {'yes' if mode == '1' else 'no'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layers(small: bool) -> str:
    """Measure what normalization layers cost, forward and backward: a table in Markdown."""
    batch, rounds = (4, 1) if small else (256, 15)
    return full_norm.table(full_norm.measure(batch, rounds, torch.channels_last, _device(small)))


def processes(small: bool) -> str:
    """Measure the steps of contenders whose processes share the device, in turn: a table in Markdown."""
    workers, rounds = (2, 1) if small else (4, 2)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            times[name].append(_run(name, workers, small))
    lines = ["| contender | seconds per step, DDP = 1 |", "|---|---|"]
    for name, measured in times.items():
        ratios = [one / base for one, base in zip(measured, times["ddp"], strict=True)]
        lines.append(f"| {name} | {_spread(ratios)} |")
    return "\n".join(lines)


def _run(name: str, workers: int, small: bool) -> float:
    """Start the processes of a contender; returns the median of seconds per step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lightning_decentral.lab.benchmarks.gpu", "--worker", name]
    started = [
        subprocess.Popen(
            command + ["--dry-run"] * small,
            env=os.environ
            | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(workers),
                "NODE_RANK": str(rank),
                "LOCAL_RANK": "0",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    try:
        said = [process.communicate(timeout=_SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(f"A process of {name} has failed: see above.")
    return statistics.median(json.loads(said[0].splitlines()[-1]))


def work(name: str, small: bool) -> None:
    """Train as one process of a contender, and print the seconds of its steps."""
    strategy = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "dpsgd": lambda: GossipStrategy(DPSGD(), process_group_backend="gloo"),
    }[name]()
    clock = _Clock()
    steps = 4 if small else _WARM_UP + _STEPS
    trainer = Trainer(
        accelerator="cpu" if small else "cuda",
        devices=1 if small else [0],
        num_nodes=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_steps=steps,
        callbacks=[clock],
        **QUIET,
    )
    width = 32 if small else _WIDTH
    batches = torch.randn(_BATCH, width).expand(steps * int(os.environ["WORLD_SIZE"]), -1, -1)
    trainer.fit(_Net(width), DataLoader(TensorDataset(batches), batch_size=None))
    print(json.dumps(clock.seconds[1 if small else _WARM_UP :]), flush=True)


class _Net(LightningModule):
    """A network of four square layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, width), nn.ReLU())))

    def training_step(self, batch: tuple[Tensor]) -> Tensor:
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class _Clock(Callback):
    """Takes the time between the ends of batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        now = time.perf_counter()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


def _device(small: bool) -> str:
    return "cpu" if small else "cuda"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
