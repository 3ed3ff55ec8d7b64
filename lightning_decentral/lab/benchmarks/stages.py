"""How fast pipelines are, and what their stages keep, with a sleep as compute and everything else real.

    python -m lightning_decentral.lab.benchmarks.stages speed [--rounds 3] [--workers 4] [--output FOLDER]
    python -m lightning_decentral.lab.benchmarks.stages link [--rounds 3]
    python -m lightning_decentral.lab.benchmarks.stages data-parallel [--rounds 3]
    python -m lightning_decentral.lab.benchmarks.stages memory
    python -m lightning_decentral.lab.benchmarks.stages simulator [--rounds 5]

A model sleeps in its forward pass and twice as long in its backward pass, each stage once for all of its blocks, as an
accelerator computes them one after the other without asking; a replay sleeps again. Stages are processes of their own,
with Lightning's loop, that send each other tensors. Counted is how many batches a second go through once the pipeline
is full, by the median of their times, over the same figure of one process that has the whole model and no strategy.
Workers have equal shares of the model, so the ring of Ouroboros has a stage more than workers, and the first and the
last of them are half as long as the others.

``speed``: K = 1, 2, 4 workers on one machine, without a limit to what they send; with four of them also one, in the
middle, that takes twice as long. ``link``: four emulated hosts with links of 1 Gbit/s (needs Linux and root), and 4 MB
of activations at each cut. ``data-parallel``: three such hosts, Ouroboros and Lightning's DDP with the same batches,
once with a model that is large against its activations, and once the other way around. ``memory``: what each of four
stages keeps at most, counted, and by the method's formula. ``simulator``: the seconds that one process needs for 1,000
ticks of eight stages of one number each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_decentral import PipelineStrategy
from lightning_decentral.lab.bench.prefork import Prefork
from lightning_decentral.lab.bench.worker import environment_of
from lightning_decentral.lab.benchmarks.report import QUIET, spread
from lightning_decentral.lab.emulation import EmulatedNetwork, run_in_hosts
from lightning_decentral.lab.results import environment
from lightning_decentral.pipeline.local import LocalPipeline
from lightning_decentral.pipeline.schedules import SCHEDULES, Schedule, dsp, gpipe, one_f_one_b, ouroboros
from lightning_decentral.simulation.cluster_file import ClusterFile, Host

ROWS = 24
_DDP_BLOCKS = 6  # whose gradients are sent one after the other, while the next one is computed
FORWARD_SECONDS, BACKWARD_SECONDS = 0.6, 1.2
"""Of the whole model on one device, for a batch."""
GIGABIT_BYTES = 125e6
_TIMEOUT_SECONDS = 300
_SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
_SLOW_TIMES = 2.0

CONTENDERS: dict[str, Callable[[int], Schedule]] = {
    "DSP": dsp,
    "DSP, graphs kept": partial(dsp, recompute=False),
    "DDG": SCHEDULES["ddg"],
    "Features Replay": SCHEDULES["features_replay"],
    "PipeDream-2BW": SCHEDULES["pipe_2bw"],
    "Ouroboros": lambda workers: ouroboros(workers + 1),
    "GPipe": lambda workers: gpipe(workers, 8 if workers > 1 else 1),
    "1F1B": lambda workers: one_f_one_b(workers, 8 if workers > 1 else 1),
}
"""Schedules for so many workers."""


@dataclass(frozen=True)
class Run:
    """What one run trains.

    Args:
        contender: the schedule, or ``"one device"``, or ``"DDP"``.
        workers: how many.
        forward_seconds: of the whole model, for a batch.
        slow: whether a worker in the middle takes twice as long.
        model_bytes: of all parameters.
        activation_bytes: of a batch at each cut.
        hosts: whether workers are emulated hosts, with links of 1 Gbit/s.
    """

    contender: str
    workers: int
    forward_seconds: float = FORWARD_SECONDS
    slow: bool = False
    model_bytes: int = 32_000
    activation_bytes: int = 24_000
    hosts: bool = False

    @property
    def schedule(self) -> Schedule | None:
        """The schedule, if it is a pipeline."""
        make = CONTENDERS.get(self.contender)
        return None if make is None else make(self.workers)

    @property
    def fill(self) -> int:
        """The batches that are left out, in which the pipeline fills."""
        schedule = self.schedule
        return 2 if schedule is None or schedule.flush else schedule.lags[0] + 3

    @property
    def counted(self) -> int:
        """The batches that are counted, after those."""
        return 3 if self.workers == 1 else 10

    @property
    def blocks(self) -> tuple[float, ...]:
        """The share of the model of each block: one for a stage, whose workers have equal ones."""
        schedule = self.schedule
        if schedule is not None:
            return schedule.shares
        return (1 / _DDP_BLOCKS,) * _DDP_BLOCKS if self.contender == "DDP" else (1.0,)


class _Sleep(torch.autograd.Function):
    """Passes its input on, after a sleep in both directions; the gradient of the weight is that of its mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward_seconds: float, backward_seconds: float) -> Tensor:
        ctx.seconds, ctx.like = backward_seconds * len(x) / ROWS, weight
        time.sleep(forward_seconds * len(x) / ROWS)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(ctx.seconds)
        return errors[0].clone(), torch.full_like(ctx.like, 1e-6), None, None


class _Block(nn.Module):
    def __init__(self, numbers: int, forward_seconds: float, backward_seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numbers))
        self.seconds = forward_seconds, backward_seconds
        self.times = 1.0

    def forward(self, x: Tensor) -> Tensor:
        forward, backward = self.seconds
        passed: Tensor = _Sleep.apply(x, self.weight, self.times * forward, self.times * backward)
        return passed


class _Model(LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(
                _Block(round(share * run.model_bytes / 4), share * run.forward_seconds, share * BACKWARD_SECONDS)
                for share in run.blocks
            )
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class _Measure(Callback):
    """Writes when each batch began, and what the stages kept."""

    def __init__(self, folder: str, run: Run) -> None:
        self.folder, self.run = folder, run
        self.began: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        schedule = self.run.schedule
        if self.run.slow and schedule is not None and trainer.global_rank == schedule.worker_of(schedule.stages // 2):
            for block in module.net:  # type: ignore[union-attr]
                block.times = _SLOW_TIMES  # type: ignore[union-attr]

    def on_train_batch_start(self, *_: object) -> None:
        self.began.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        strategy = trainer.strategy
        kept = [list(each) for each in strategy.kept] if isinstance(strategy, PipelineStrategy) else []
        path = Path(self.folder) / f"{trainer.global_rank}.json"
        path.write_text(json.dumps({"began": self.began, "kept": kept}), encoding="utf-8")


def train(run: Run, folder: str) -> None:
    """Train, as one of the workers."""
    rows, strategy = ROWS, "auto"
    if run.schedule is not None:
        strategy = PipelineStrategy(run.schedule, cuts=range(1, run.schedule.stages))  # type: ignore[assignment]
    elif run.contender == "DDP":
        rows, strategy = ROWS // run.workers, "ddp"
    batches = run.fill + run.counted + 1
    width = max(1, run.activation_bytes // 4 // ROWS)
    data = TensorDataset(torch.ones(ROWS * batches, 1).expand(-1, width))
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        num_nodes=run.workers,
        max_epochs=1,
        **QUIET,
        callbacks=[_Measure(folder, run)],
    )
    trainer.fit(_Model(run), DataLoader(data, batch_size=rows))


@dataclass(frozen=True)
class Ran:
    """What came of a run.

    Attributes:
        batches_per_second: once the pipeline was full.
        kept: by worker and its stages: inputs, graphs, copies of weights.
    """

    batches_per_second: float
    kept: list[list[list[int]]]


class Machines:
    """Where workers run: processes of this machine, or emulated hosts, which are made once for each number.

    Args:
        folder: for the socket of the process that workers are forked from.
    """

    def __init__(self, folder: Path) -> None:
        self._networks: dict[int, EmulatedNetwork] = {}
        self._runs = 0
        name = "lightning_decentral.lab.benchmarks.stages"
        self._prefork = Prefork(sys.executable, ["lightning.pytorch"], folder / "prefork", f"{name}_worker")

    def close(self) -> None:
        """Remove the hosts, and end the process."""
        self._prefork.close()
        for network in self._networks.values():
            network.remove()

    def run(self, run: Run) -> Ran:
        """Make a run, in fresh processes.

        Raises:
            RuntimeError: if it fails; with what it said.
        """
        self._runs += 1
        port = str(29500 + 20 * (self._runs % 500))
        with tempfile.TemporaryDirectory() as folder:
            command = self._prefork.command([json.dumps(asdict(run)), folder])
            said: list[str] = []
            if run.hosts:
                outcomes = run_in_hosts(
                    self._network(run.workers),
                    command,
                    {**_SETTINGS, "MASTER_PORT": port},
                    timeout_seconds=_TIMEOUT_SECONDS,
                    output=lambda host, line: said.append(f"{host}: {line}"),
                )
                failed = any(outcome.exit_code for outcome in outcomes)
            else:
                failed = any(_run_here(command, run.workers, port, said))
            if failed:
                raise RuntimeError(f"{run} failed:\n" + "\n".join(said[-20:]))
            wrote = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(run.workers)]
        began = wrote[0]["began"]
        began = began[run.fill : run.fill + run.counted + 1]
        seconds = statistics.median(after - before for before, after in pairwise(began))  # others use the machine, too
        return Ran(1 / seconds, [each["kept"] for each in wrote])

    def _network(self, hosts: int) -> EmulatedNetwork:
        if hosts not in self._networks:
            cluster = ClusterFile("stages", tuple(Host(rate_bytes_per_second=GIGABIT_BYTES) for _ in range(hosts)))
            network = EmulatedNetwork(cluster, f"stages{hosts}")
            network.create()
            network.limit()
            self._networks[hosts] = network
        return self._networks[hosts]


def _run_here(command: Sequence[str], workers: int, port: str, said: list[str]) -> list[int]:
    """Run a command for each worker on this machine; returns their exit statuses."""
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **_SETTINGS, **environment_of(rank, workers, "127.0.0.1", int(port))},
                stdout=output,
                stderr=output,
            )
            for rank in range(workers)
        ]
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        try:
            return [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            output.seek(0)
            said += output.read().splitlines()


@contextmanager
def _machines() -> Iterator[Machines]:
    with tempfile.TemporaryDirectory() as folder:
        machines = Machines(Path(folder))
        try:
            yield machines
        finally:
            machines.close()


def _measure(machines: Machines, runs: Sequence[Run], rounds: int) -> dict[Run, list[float]]:
    """Measure the batches per second of all runs in each round, one after the other."""
    found: dict[Run, list[float]] = {run: [] for run in runs}
    for number in range(rounds):
        for run in runs:
            found[run].append(machines.run(run).batches_per_second)
            print(f"  round {number + 1}, {run}: {found[run][-1]:.3f} batches/s", file=sys.stderr, flush=True)
    return found


def _ratios(values: Sequence[float], to: Sequence[float]) -> str:
    """Write by how many times one is faster, round by round."""
    return spread([value / base for value, base in zip(values, to, strict=True)], ".2f")


def _heading(title: str) -> None:
    print(f"# {title}\n\n{environment()}\n")


def ideal(contender: str, workers: int) -> float:
    """Compute how fast a full pipeline of equal workers is whose processors never wait but where the method does."""
    schedule = CONTENDERS[contender](workers)
    if contender == "Ouroboros":  # a way around, with the last stage's backward pass
        around = FORWARD_SECONDS + schedule.shares[-1] * BACKWARD_SECONDS
        return min(float(workers), (FORWARD_SECONDS + BACKWARD_SECONDS) / around)
    if schedule.flush:
        return workers * schedule.parts / (schedule.parts + workers - 1)
    work = (1 if not schedule.replays(0) else 2) * FORWARD_SECONDS + BACKWARD_SECONDS
    return workers * (FORWARD_SECONDS + BACKWARD_SECONDS) / work


def draw(path: Path, speeds: Mapping[str, Sequence[float]], numbers: Sequence[int] = (1, 2, 4)) -> None:
    """Draw the speeds of schedules against the number of workers, and, behind these, with a slow one among the most.

    Args:
        path: of the picture.
        speeds: by schedule: for each number of workers, and one more for the most of them with a slow one.
        numbers: of workers, ascending.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (lines, bars) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    lines.plot(numbers, numbers, color="black", lw=0.8, label="as many times as workers")
    for index, (name, values) in enumerate(speeds.items()):
        lines.plot(numbers, values[: len(numbers)], "o-", color=f"C{index}", label=name, ms=4, lw=1.2)
        bars.barh(index, values[len(numbers) - 1], color=f"C{index}", alpha=0.35)
        bars.barh(index, values[len(numbers)], height=0.45, color=f"C{index}")
    lines.set_xticks(numbers)
    lines.set_xlabel("workers")
    lines.set_ylabel("speed; one device is 1")
    lines.grid(alpha=0.3)
    lines.legend(fontsize="x-small")
    bars.set_yticks(range(len(speeds)), list(speeds))
    bars.invert_yaxis()
    bars.set_xlabel(f"{numbers[-1]} workers; narrow: one of them {_SLOW_TIMES:g} times slower")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def speed(rounds: int, only: Sequence[int] = (1, 2, 4), output: Path | None = None) -> None:
    """Measure K = 1, 2, 4 workers on this machine, or some of these, and with all of them four of which one is slow.

    Args:
        rounds: of all runs, one after the other.
        only: some of the numbers of workers.
        output: a folder for a picture of all of them.
    """
    one, backward = Run("one device", 1), Run("one device", 1, forward_seconds=0.0)
    named = [(name, name, {}) for name in CONTENDERS]
    named.append(("Ouroboros, backward passes alone", "Ouroboros", {"forward_seconds": 0.0}))
    columns: list[tuple[str, dict[str, Any]]] = [
        ("K = 1", {"workers": 1}),
        ("K = 2", {"workers": 2}),
        ("K = 4", {"workers": 4}),
        ("K = 4, one 2 times slower", {"workers": 4, "slow": True}),
    ]
    columns = [column for column in columns if column[1]["workers"] in only][: len(only) + (len(only) == 3)]
    runs = {
        (row, column): Run(contender, **{**options, **told})
        for row, contender, options in named
        for column, told in columns
    }
    with _machines() as machines:
        found = _measure(machines, [one, backward, *runs.values()], rounds)
    _heading("Pipelines: speed with a sleep as compute")
    print(
        f"One device: {statistics.mean(found[one]):.3f} batches a second ({FORWARD_SECONDS} s forward, "
        f"{BACKWARD_SECONDS} s backward). The figures are how many times as fast; of backward passes alone, in which "
        "forward passes take no time, over one device that has none either. *Ideal*: four workers by the method's own "
        "work and waiting, replays counted as work. GPipe and 1F1B have 8 micro-batches.\n"
    )
    print(f"| schedule | {' | '.join(column for column, _ in columns)} | ideal, K = 4 | K = 4, of the ideal |")
    print("|---" * (len(columns) + 3) + "|")
    if output is not None and len(columns) == 4:
        output.mkdir(parents=True, exist_ok=True)
        speeds = {
            row: [statistics.median(map(truediv, found[runs[row, column]], found[one])) for column, _ in columns]
            for row, _, options in named
            if not options
        }
        draw(output / "plot.png", speeds)
    for row, contender, options in named:
        base = found[backward if options else one]
        cells = [_ratios(found[runs[row, column]], base) for column, _ in columns]
        if 4 not in only:
            print(f"| {row} | {' | '.join(cells)} |  |  |")
            continue
        best = 4.0 if options else ideal(contender, 4)
        share = statistics.mean(v / b for v, b in zip(found[runs[row, "K = 4"]], base, strict=True)) / best
        print(f"| {row} | {' | '.join(cells)} | {best:.2f} | {share:.3f} |")


def link(rounds: int) -> None:
    """Measure four hosts whose links have 1 Gbit/s, with 4 MB at each cut, and the same without a limit."""
    one = Run("one device", 1, activation_bytes=4_000_000)
    runs = {
        (name, hosts): Run(name, 4, activation_bytes=4_000_000, hosts=hosts)
        for name in CONTENDERS
        for hosts in (False, True)
    }
    with _machines() as machines:
        found = _measure(machines, [one, *runs.values()], rounds)
    _heading("Pipelines: 4 MB of activations over 1 Gbit/s")
    print(
        "Four workers, how many times as fast as one device. Sending 4 MB takes 33 ms of such a link, a stage computes "
        f"{(FORWARD_SECONDS + BACKWARD_SECONDS) / 4:.1f} s on a batch.\n"
    )
    print("| schedule | no limit | 1 Gbit/s | 1 Gbit/s, of no limit |\n|---|---|---|---|")
    for name in CONTENDERS:
        free, limited = found[runs[name, False]], found[runs[name, True]]
        share = statistics.mean(a / b for a, b in zip(limited, free, strict=True))
        print(f"| {name} | {_ratios(free, found[one])} | {_ratios(limited, found[one])} | {share:.3f} |")


def data_parallel(rounds: int) -> None:
    """Compare Ouroboros and DDP on three hosts, with the same batches."""
    sizes = (
        ("large model, small activations", 64_000_000, 240_000),
        ("large model, large activations", 64_000_000, 16_000_000),
        ("small model, small activations", 640_000, 240_000),
        ("small model, large activations", 640_000, 16_000_000),
    )
    one = Run("one device", 1)
    runs = {
        (title, name): Run(name, 3, model_bytes=model, activation_bytes=activations, hosts=True)
        for title, model, activations in sizes
        for name in ("Ouroboros", "DDP")
    }
    with _machines() as machines:
        found = _measure(machines, [one, *runs.values()], rounds)
    _heading("Ouroboros and data parallelism on three hosts with links of 1 Gbit/s")
    print("Batches of the same size, how many times as many a second as on one device.\n")
    print("| model and activations | model, MB | activations, MB | Ouroboros | DDP | Ouroboros / DDP |")
    print("|---|---|---|---|---|---|")
    for title, model, activations in sizes:
        ours, theirs = found[runs[title, "Ouroboros"]], found[runs[title, "DDP"]]
        cells = _ratios(ours, found[one]), _ratios(theirs, found[one]), _ratios(ours, theirs)
        print(f"| {title} | {model / 1e6:g} | {activations / 1e6:g} | {' | '.join(cells)} |")


def memory(rounds: int) -> None:
    """Count what four stages keep at most, in processes of their own."""
    del rounds
    _heading("Pipelines: what stages keep at most")
    print("Inputs without a graph, graphs, and copies of the weights beside the weights themselves.\n")
    print("| schedule | stage | staleness | inputs | graphs | copies of weights | by the formula |")
    print("|---|---|---|---|---|---|---|")
    with _machines() as machines:
        for name, make in CONTENDERS.items():
            schedule = make(4)
            ran = machines.run(replace(Run(name, 4), forward_seconds=FORWARD_SECONDS / 4))
            for stage in range(schedule.stages):
                worker = schedule.worker_of(stage)
                kept = ran.kept[worker][schedule.stages_of(worker).index(stage)]
                cells = " | ".join(map(str, kept))
                print(f"| {name} | {stage} | {schedule.staleness[stage]} | {cells} | {_formula(schedule, stage)} |")


def _formula(schedule: Schedule, stage: int) -> str:
    """Write what a stage keeps by its method's formula."""
    lag = schedule.lags[stage]
    what = "inputs" if schedule.replays(stage) else "graphs"
    copies = (
        "2 copies" if schedule.weights == "previous" else f"{lag + 1} copies" if schedule.stashes(stage) else "none"
    )
    return f"{lag + 1} {what}, {copies}"


class _Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def tick_seconds(schedule: Schedule, ticks: int) -> float:
    """Measure the processor's seconds for so many ticks of stages of one number each, in this process."""
    net = nn.Sequential(*(_Scalar() for _ in range(schedule.stages)))
    pipeline = LocalPipeline(
        schedule,
        net,
        lambda x: net(x).square().mean(),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
        tuple(range(1, schedule.stages)),
    )
    batch = torch.ones(8)
    began = time.process_time()
    for _ in range(ticks):
        pipeline.train(batch)
    assert math.isfinite(float(net[0].weight.detach()))
    return time.process_time() - began


def simulator(rounds: int) -> None:
    """Measure 1,000 ticks of eight stages in one process."""
    _heading("Pipelines in one process: eight stages of one number, 1,000 ticks")
    print("| schedule | processor seconds |\n|---|---|")
    for name in ("dsp", "ddg", "features_replay", "ouroboros", "pipedream", "pipe_2bw"):
        print(f"| {name} | {spread([tick_seconds(SCHEDULES[name](8), 1000) for _ in range(rounds)], '.2f')} |")


COMMANDS: dict[str, Callable[[int], None]] = {
    "speed": speed,
    "link": link,
    "data-parallel": data_parallel,
    "memory": memory,
    "simulator": simulator,
}


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="1,2,4", help="of speed: some of 1, 2, 4")
    parser.add_argument("--output", type=Path, help="of speed: a folder for a picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "speed":
        speed(options.rounds, [int(each) for each in options.workers.split(",")], options.output)
        return
    COMMANDS[options.what](options.rounds)


if __name__ == "__main__":
    main()
