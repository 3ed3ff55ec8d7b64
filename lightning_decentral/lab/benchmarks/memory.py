"""How much memory methods need beside parameters, gradients and the user's optimizer, in copies of the model.

    python -m lightning_decentral.lab.benchmarks.memory methods [--workers 4] [--parameters 1e7] [--shared]
    python -m lightning_decentral.lab.benchmarks.memory servers [--sizes 4,8]

Every method trains a perceptron for some steps in fresh processes with `Strategy`, and so does the same loop without
communication, whose memory is subtracted: that of the steps after the first four, which includes a round of local
updates. ``methods``: of the worker that needs most, next to what the method's page says for so many workers; and what
of it is the method's own, without messages under way and without a momentum in the place of the optimizer's, next to
what surveys of these methods count as their extra memory.
``servers``: of worker 0, which serves beside its training, and of the worker that needs most of all others, with
several numbers of workers.

Workers exchange over TCP, as those of several hosts do, and the figure is the largest resident memory, which the kernel
keeps; with ``--shared`` they exchange in memory that they share, of which each has its share, and every four
milliseconds are looked at.

malloc gives memory of more than 256 KiB back when it is freed (``M_MMAP_THRESHOLD``), so that what is counted is in
use. By default it keeps blocks of up to 32 MiB for what its thread asks for next, and needs more: ``--malloc default``.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import re
import statistics
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral.algorithms import (
    ADPSGD,
    APSGD,
    D2,
    DCDPSGD,
    DPSGD,
    SGP,
    BackupWorkers,
    ChocoSGD,
    CoCoDSGD,
    DecentLaM,
    DeepSqueeze,
    DiLoCo,
    EagerDiLoCo,
    GradientTracking,
    LocalSGD,
    OverlapLocalSGD,
    QGDSGDm,
    SyncSGD,
)
from lightning_decentral.lab.bench.contenders.ours import NoCommunication
from lightning_decentral.lab.benchmarks.report import QUIET, logging_off
from lightning_decentral.lab.results import environment
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm
from lightning_decentral.strategies import AsyncStrategy, GossipStrategy
from lightning_decentral.topology import Ring

LAYERS = 10  # what is computed on the way is as large as one of them
EVERY = 4  # steps of a round of local updates
FIRST = 4  # the step from which on memory is looked at
STEPS = 10
M_MMAP_THRESHOLD, THRESHOLD = -3, 1 << 18
ALONE = "none"


@dataclass(frozen=True)
class Contender:
    """What is measured.

    Attributes:
        algorithm: made for a number of workers.
        parts: what its page says, between hosts; in copies of the model, with n, the number of workers.
        usual: copies that are usually counted as the method's own; none if it has no such number.
    """

    algorithm: Callable[[int], AbstractAlgorithm]
    parts: dict[str, Callable[[int], float]]
    usual: str = ""

    def not_its_own(self, n: int) -> float:
        """Return the copies of messages under way, and of a momentum that the optimizer need not have."""
        return sum(copies(n) for part, copies in self.parts.items() if part in _NOT_ITS_OWN)


def _const(copies: float) -> Callable[[int], float]:
    return lambda n: copies


RECEIVED = {"received": _const(1)}
_NOT_ITS_OWN = ("received", "messages of 8 bits", "chunks of the ring", "momentum")
MESSAGES = {"messages of 8 bits": _const(0.75)}  # its own and those of two neighbours
CHUNKS = {"chunks of the ring": lambda n: 2 / n}
CONTENDERS: dict[str, Contender] = {
    "synchronous SGD": Contender(lambda n: SyncSGD(), CHUNKS, "at most 1"),
    "D-PSGD, one peer": Contender(lambda n: DPSGD(), RECEIVED, "0"),
    "D-PSGD, ring": Contender(lambda n: DPSGD(Ring(n)), {"received": _const(2)}, "0"),
    "D2": Contender(
        lambda n: D2(), {"correction": _const(1), "rounding": _const(0.5), "received": _const(2)}, "1 to 2"
    ),
    "gradient tracking": Contender(
        lambda n: GradientTracking(), {"tracker and last gradient": _const(2), "received": _const(2)}, "2"
    ),
    "SGP": Contender(lambda n: SGP(), RECEIVED, "0"),
    "QG-DSGDm": Contender(
        lambda n: QGDSGDm(), {"momentum": _const(1), "model of before": _const(1), "received": _const(2)}, "1"
    ),
    "DecentLaM": Contender(
        lambda n: DecentLaM(), {"momentum": _const(1), "model of before": _const(1), "received": _const(2)}, "1"
    ),
    "CHOCO-SGD": Contender(lambda n: ChocoSGD(), {"public copy and pull": _const(2), **MESSAGES}, "2"),
    "DCD-PSGD": Contender(lambda n: DCDPSGD(), {"own and differences": _const(2), **MESSAGES}, "2 to 3"),
    "DeepSqueeze": Contender(
        lambda n: DeepSqueeze(), {"error": _const(1), "in the exchange": _const(1), **MESSAGES}, "1"
    ),
    "local SGD": Contender(lambda n: LocalSGD(EVERY), CHUNKS, "at most 1"),
    "DiLoCo": Contender(lambda n: DiLoCo(EVERY), {"common model and momentum": _const(2), **CHUNKS}, "2"),
    "eager DiLoCo": Contender(
        lambda n: EagerDiLoCo(EVERY), {"common model, momentum, difference, average": _const(4), **CHUNKS}
    ),
    "CoCoD-SGD": Contender(lambda n: CoCoDSGD(EVERY), {"average and own model": _const(2), **CHUNKS}, "2"),
    "Overlap-Local-SGD": Contender(lambda n: OverlapLocalSGD(EVERY), {"average and anchor": _const(2), **CHUNKS}, "2"),
    "AD-PSGD": Contender(lambda n: ADPSGD(), {"snapshot": _const(1), "what a call sends": _const(1), **RECEIVED}, "2"),
}
SERVERS: dict[str, Callable[[int], AbstractAlgorithm]] = {
    "A-PSGD": lambda n: APSGD(),
    "backup workers": lambda n: BackupWorkers(n - 1),
}
_IN_SHARED_MEMORY = ("D-PSGD, one peer", "D-PSGD, ring", "D2", "local SGD", "DiLoCo", "AD-PSGD")


class Perceptron(LightningModule):
    """Some linear layers of one size."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.width = round((parameters / LAYERS) ** 0.5)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(self.width, self.width, bias=False) for _ in range(LAYERS)))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return a loss."""
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that remembers nothing."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Measure(Callback):
    """Looks at the memory of its process from the step `FIRST` on."""

    def __init__(self, path: str, shared: bool) -> None:
        self._path, self._shared = path, shared
        self._steps = self._peak = 0
        self._over = threading.Event()

    def on_train_batch_start(self, *_: object) -> None:
        """Begin to look."""
        if self._steps == FIRST:
            Path("/proc/self/clear_refs").write_text("5")  # the largest is what it is now
            threading.Thread(target=self._watch, daemon=True).start()
        self._steps += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down what was seen."""
        self._over.set()
        status = Path("/proc/self/status").read_text()
        largest = self._peak if self._shared else _kilobytes(status, "VmHWM")
        Path(f"{self._path}-{trainer.global_rank}").write_text(str(1024 * largest))

    def _watch(self) -> None:
        while not self._over.wait(0.004):
            rollup = Path("/proc/self/smaps_rollup").read_text()
            self._peak = max(self._peak, _kilobytes(rollup, "Pss_Anon") + _kilobytes(rollup, "Pss_Shmem"))


def _kilobytes(text: str, name: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB|^{name}:\t *(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1] or found[2])


def run(algorithm: AbstractAlgorithm, workers: int, parameters: int, shared: bool) -> list[int]:
    """Return the bytes of each worker."""
    seed_everything(0, verbose=False)
    model = Perceptron(parameters)
    options: dict[str, Any] = {"start_method": "fork", "average_at_end": False, "shared_memory": shared}
    asynchronous = isinstance(algorithm, AbstractAsynchronousAlgorithm)
    strategy = AsyncStrategy(algorithm, share_epoch=False, **options) if asynchronous else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy=strategy or GossipStrategy(algorithm, **options),
            accelerator="cpu",
            devices=workers,
            max_steps=STEPS,
            max_epochs=-1,
            **QUIET,
            callbacks=[Measure(f"{folder}/worker", shared)],
        )
        data = TensorDataset(torch.randn(4 * workers * (STEPS + 1), model.width))
        trainer.fit(model, DataLoader(data, batch_size=4))
        return [int(Path(f"{folder}/worker-{rank}").read_text()) for rank in range(workers)]


def measured(name: str, workers: int, options: argparse.Namespace) -> list[int]:
    """Run one contender in processes of its own, for what an earlier run left in memory would be forked along."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def work() -> None:
        algorithm = NoCommunication() if name == ALONE else _algorithm(name, workers)
        sending.send(run(algorithm, workers, int(options.parameters), options.shared))

    process = context.Process(target=work)
    process.start()
    sending.close()
    result: list[int] = receiving.recv()
    process.join()
    print(f"  {name}, {workers} workers: {[round(one / 1e6) for one in result]} MB", file=sys.stderr, flush=True)
    return result


def _algorithm(name: str, workers: int) -> AbstractAlgorithm:
    return SERVERS[name](workers) if name in SERVERS else CONTENDERS[name].algorithm(workers)


def copies(name: str, workers: int, base: float, options: argparse.Namespace) -> list[float]:
    """Return the copies of the model that each worker has more than without communication."""
    return [(one - base) / (4 * options.parameters) for one in measured(name, workers, options)]


def print_methods(options: argparse.Namespace) -> None:
    """Print the table of the methods."""
    n = options.workers
    names = [name for name in CONTENDERS if not options.shared or name in _IN_SHARED_MEMORY]
    names = options.names.split(";") if options.names else names
    base = statistics.median(measured(ALONE, n, options))
    rows = [(name, max(copies(name, n, base, options))) for name in names]
    says = not options.shared
    before, after = ("needs, by its page | in all | ", " its own | usual count |") if says else ("", "")
    print(f"| method | {before}measured, model copies |{after}")
    print("|---|---|" + "---|---|---|---|" * says)
    for name, most in rows:
        contender = CONTENDERS[name]
        parts = {part: each(n) for part, each in contender.parts.items()}
        text = ", ".join(f"{part} {each:g}" for part, each in parts.items())
        before = f"{text} | {sum(parts.values()):g} | " if says else ""
        after = f" {most - contender.not_its_own(n):.2f} | {contender.usual} |" if says else ""
        print(f"| {name} | {before}{most:.2f} |{after}")


def print_servers(options: argparse.Namespace) -> None:
    """Print the table of the servers."""
    sizes = [int(size) for size in options.sizes.split(",")]
    bases = {size: statistics.median(measured(ALONE, size, options)) for size in sizes}
    print("| method | workers | worker 0, model copies | most of the others |")
    print("|---|---|---|---|")
    for name in SERVERS:
        for size in sizes:
            server, *others = copies(name, size, bases[size], options)
            print(f"| {name} | {size} | {server:.2f} | {max(others):.2f} |")


def main() -> None:
    """Measure, and print a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("methods", "servers"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--sizes", default="4,8", help="numbers of workers, of `servers`")
    parser.add_argument("--parameters", type=float, default=1e7)
    parser.add_argument("--shared", action="store_true", help="exchange in memory that workers share")
    parser.add_argument("--malloc", choices=("threshold", "default"), default="threshold")
    parser.add_argument("--names", help="some contenders of `methods`, as A;B")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    if options.malloc == "threshold":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    print(f"# Memory in copies of the model: {options.what}\n\n{environment()}\n")
    where = "in memory that they share" if options.shared else "over TCP"
    keeps = "which gives back what is freed" if options.malloc == "threshold" else "as it is by default"
    print(
        f"{options.parameters / 1e6:g} million float32 parameters in {LAYERS} layers; workers of one machine that "
        f"exchange {where}; malloc {keeps}. Beyond parameters, gradients and optimizer.\n"
    )
    (print_methods if options.what == "methods" else print_servers)(options)


if __name__ == "__main__":
    main()
