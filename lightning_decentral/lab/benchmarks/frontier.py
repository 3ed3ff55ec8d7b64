"""The race to a loss: a small Transformer on four networks, with the best of each family against DDP and its hooks.

    python -m lightning_decentral.lab.benchmarks.frontier --output FOLDER [--networks gigabit,far] [--target 2.6]

Four workers train the text recipe, in emulated hosts (Linux, root) except over loopback. Gradients are real; a batch
takes 50 ms at least, by sleeping, so that four workers of two cores do not wait for the cores. On the last network one
worker is four times slower, and another is killed 75 seconds after its process was started. Each run ends at the
target, when a worker was lost and the method cannot go on without it, or at the first evaluation after ``--seconds``:
a limit that is looked at in each step, as `max_time` is, lets each of DDP's steps wait for a message more. Runs that
ended are kept in ``FOLDER/runs``: the command may be stopped and repeated. torchft and Decent-DP have no Lightning
strategy: theirs are loops of their own (`lab.bench.to_a_loss`), in environments that are made when first needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_decentral.commands.telling import SECONDS, Curve, read_curve
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench.contenders import contender
from lightning_decentral.lab.bench.environments import python_for
from lightning_decentral.lab.bench.to_a_loss import PEERS
from lightning_decentral.lab.emulation import EmulatedNetwork, Event, exit_code, run_in_hosts
from lightning_decentral.lab.emulation.hosts import torchrun_environment
from lightning_decentral.lab.results import environment
from lightning_decentral.plots.canvas import figure, legend_below, line_style, save
from lightning_decentral.simulation.cluster_file import ClusterFile, Host

ROOT = Path(__file__).parents[3]
WORKERS, COMPUTE_SECONDS = 4, 0.05
_MEGABYTES, _LOSS = "progress/megabytes", "val_loss"
_PORT = 29650  # and the next one, of another package's workers over loopback
_START_SECONDS = 120.0  # that processes may take to start and to end, beside the race
_ALGORITHMS, _COMPRESSION = "lightning_decentral.algorithms", "lightning_decentral.compression"


@dataclass(frozen=True)
class Network:
    """What the workers are joined by.

    Args:
        title: in the table.
        rate: bytes per second of each link; ``None``: over loopback, without hosts.
        delay: seconds, one way.
        slowdown: of worker 1.
        killed: when worker 3 is killed, in seconds after its start; ``None``: never.
    """

    title: str
    rate: float | None = None
    delay: float = 0.0
    slowdown: float = 1.0
    killed: float | None = None

    @property
    def hosts(self) -> ClusterFile:
        """The hosts to emulate."""
        assert self.rate is not None
        slow = (1.0, self.slowdown, 1.0, 1.0)
        return ClusterFile("frontier", tuple(Host(self.rate, self.delay, slowdown=factor) for factor in slow))


NETWORKS = {
    "loopback": Network("loopback"),
    "gigabit": Network("1 Gbit/s", 125e6),
    "far": Network("200 Mbit/s, 50 ms", 25e6, 0.05),
    "dying": Network("20 Mbit/s, 50 ms, one slow and one dying host", 2.5e6, 0.05, 4.0, 75.0),
}


def _gossip(strategy: str, name: str, told: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    algorithm = {"class_path": f"{_ALGORITHMS}.{name}", "init_args": options}
    init = {"algorithm": algorithm, **(told or {})}
    return {"strategy": {"class_path": f"lightning_decentral.{strategy}", "init_args": init}}


def _compressed(name: str, **options: Any) -> dict[str, Any]:
    compressor = {"class_path": f"{_COMPRESSION}.{name}", "init_args": options}
    callback = {
        "class_path": "lightning_decentral.callbacks.GradientCompression",
        "init_args": {"compressor": compressor},
    }
    return {"strategy": "ddp", "callbacks+": [callback]}


CONTENDERS: dict[str, dict[str, Any]] = {
    "DDP": {"strategy": "ddp"},
    "DDP, fp16": _compressed("Cast", dtype="float16"),
    "DDP, PowerSGD": _compressed("PowerSGD", rank=2),
    "D-PSGD": _gossip("GossipStrategy", "DPSGD"),
    "AD-PSGD": _gossip("AsyncStrategy", "ADPSGD"),
    "Streaming DiLoCo": _gossip("GossipStrategy", "StreamingDiLoCo", every=32, fragments=4, delay=2),
    "DiLoCo": _gossip("GossipStrategy", "DiLoCo", every=32),
    "FedBuff": _gossip("AsyncStrategy", "FedBuff", every=16, by_speed=True),
}
"""What each is told of its own, by name; all else is the same."""
OPEN = {
    "AD-PSGD": _gossip("OpenStrategy", "ADPSGD"),
    "D-PSGD": _gossip("OpenStrategy", "DPSGD"),
    "DiLoCo": _gossip("OpenStrategy", "DiLoCo", {"grace": 3.0}, every=32),
    "FedBuff": _gossip("OpenStrategy", "FedBuff", every=16, by_speed=True),
}
"""What these are told where a host dies: workers may be lost."""


class EndAfter(Callback):
    """Ends a run at an evaluation, where all workers meet anyway.

    Args:
        seconds: since training began, after which the next evaluation is the last.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when it began."""
        self._ends = time.monotonic() + self.seconds

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run if it is time at one of the workers."""
        late = trainer.strategy.reduce_boolean_decision(time.monotonic() >= self._ends, all=False)
        trainer.should_stop = trainer.should_stop or late


@dataclass(frozen=True)
class Ran:
    """What came of a run: its validations, and the exit code; 0: it ended by itself."""

    curve: Curve
    exit_code: int

    def seconds_to(self, target: float) -> float:
        """Return when the loss first was so low; infinite: never."""
        return next((point[SECONDS] for point in self.curve if point[_LOSS] <= target), math.inf)


def main(argv: Sequence[str] | None = None) -> int:
    """Race; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="some of them")
    parser.add_argument(
        "--contenders", default=";".join([*CONTENDERS, *PEERS]), help="some of them, separated by semicolons"
    )
    parser.add_argument("--target", type=float, default=2.6, help="loss on other plays (2.6)")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which a run is ended (120)")
    options = parser.parse_args(argv)
    networks = _some("--networks", options.networks.split(","), NETWORKS)
    contenders = _some("--contenders", options.contenders.split(";"), {**CONTENDERS, **PEERS})
    found: dict[str, dict[str, Ran]] = {network: {} for network in networks}
    for network in networks:
        for number, name in enumerate(contenders):
            folder = options.output / "runs" / f"{network}-{name.replace(', ', '-').replace(' ', '-')}"
            if not (folder / "ended.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                code = _race(NETWORKS[network], name, folder, options.target, options.seconds)
                (folder / "ended.json").write_text(json.dumps({"exit_code": code}), encoding="utf-8")
            metrics = folder / "curve" / "metrics.csv"
            code = json.loads((folder / "ended.json").read_text(encoding="utf-8"))["exit_code"]
            ran = Ran(read_curve(metrics) if metrics.exists() else [], code)
            found[network][name] = ran
            seconds = ran.seconds_to(options.target)
            said = f"{seconds:.1f} s" if math.isfinite(seconds) else "not reached"
            print(f"<!-- {network}, {number + 1} of {len(contenders)}: {name}: {said} -->", flush=True)
    print(f"# The race to a loss of {options.target:g}\n\n{environment()}\n\n{table(found, options.target)}")
    draw(found, options.target, options.output / "plot.png")
    return 0


def table(found: Mapping[str, Mapping[str, Ran]], target: float) -> str:
    """Write a row for each network and contender."""
    headings = (
        "network",
        "contender",
        f"seconds to a loss of {target:g}",
        "MB sent by all until then",
        "best loss",
        "end",
    )
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for network, runs in found.items():
        for name, ran in runs.items():
            reached = [point for point in ran.curve if point[_LOSS] <= target][:1]
            best = f"{min(point[_LOSS] for point in ran.curve):.3f}" if ran.curve else "-"
            seconds, sent = (f"{reached[0][SECONDS]:.1f}", reached[0][_MEGABYTES]) if reached else ("-", math.nan)
            megabytes = f"{sent:.0f}" if math.isfinite(sent) else "-"
            end = "at the target" if reached else ("time was up" if ran.exit_code == 0 else "a worker was lost")
            lines.append(f"| {NETWORKS[network].title} | {name} | {seconds} | {megabytes} | {best} | {end} |")
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Mapping[str, Ran]], target: float, path: Path) -> None:
    """Draw the loss over the seconds, a panel for each network."""
    drawn, (panels,) = figure(1, len(found), 3.6 * len(found), 4.2, sharey=True)
    for panel, (network, runs) in zip(panels, found.items(), strict=True):
        for index, (name, ran) in enumerate(runs.items()):
            at, losses = [p[SECONDS] for p in ran.curve], [p[_LOSS] for p in ran.curve]
            panel.plot(at, losses, label=name, **line_style(index))
        panel.axhline(target, color="grey", linewidth=0.8)
        panel.set_title(NETWORKS[network].title.replace(", one", ",\none"), fontsize="medium")
        panel.set_xlabel("seconds")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss on other plays")
    legend_below(drawn, panels[0])
    save(drawn, path, f"A Transformer, 4 workers: a line ends at a loss of {target:g}, or where the run ended")


def _race(network: Network, name: str, folder: Path, target: float, seconds: float) -> int:
    """Make one run; returns its exit code, 0 where its time was up."""
    if name in PEERS:
        return _race_peer(network, name, folder, target, seconds)
    is_open = network.killed is not None and name in OPEN
    told = OPEN[name] if is_open else CONTENDERS[name]
    file = folder / "run.yaml"
    file.write_text(json.dumps(_settings(network, told, folder, target, seconds), indent=1), encoding="utf-8")
    recipe = ROOT / "recipes" / "text" / "base.yaml"
    fit = [sys.executable, "-m", "lightning_decentral", "fit", "-c", str(recipe), "-c", str(file)]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    limit = seconds * 2 + _START_SECONDS
    if network.rate is not None:
        command = fit if not is_open else ["bash", "-c", f'{_RENDEZVOUS} exec "$@"', "worker", *fit]
        return _in_hosts(network, command, variables, limit, folder)
    return _beside_each_other([fit], [variables], limit, folder)


def _race_peer(network: Network, name: str, folder: Path, target: float, seconds: float) -> int:
    """Make one run of another package, with the loop that its users write; see `_race`."""
    python = python_for(contender(PEERS[name]), install=True)
    told = _settings(network, {"strategy": ""}, folder, target, seconds)
    recipe = {
        "model": {"depth": 2, "heads": 4, "learning_rate": 4e-3, **told["model"]["init_args"]},
        "data": {"batch_size": 8, **told["data"]["init_args"]},
        "seed": told["seed_everything"],
        "target": target,
        "seconds": seconds,
        "compute_seconds": COMPUTE_SECONDS,
        "may_lose": network.killed is not None,
    }
    file = folder / "run.json"
    file.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    module = "lightning_decentral.lab.bench.to_a_loss"
    command = [python, "-m", module, name, str(file), str(folder)]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    limit = seconds + _START_SECONDS  # it ends by itself at an evaluation, unless it stands still
    if network.rate is not None:
        return _in_hosts(network, command, variables, limit, folder)
    places = [torchrun_environment(rank, WORKERS, "127.0.0.1", _PORT, "frontier") for rank in range(WORKERS)]
    return _beside_each_other([command] * WORKERS, [variables | place for place in places], limit, folder)


def _in_hosts(
    network: Network, command: Sequence[str], variables: Mapping[str, str], limit: float, folder: Path
) -> int:
    """Run a command in each host; returns the exit code, 0 where the time was up."""
    events = [] if network.killed is None else [Event("kill", network.killed, ((3,),))]
    with (
        (folder / "output.txt").open("w", encoding="utf-8") as output,
        EmulatedNetwork(network.hosts, "frontier") as hosts,
    ):

        def say(host: int | None, line: str) -> None:
            print(host, line, file=output, flush=True)

        began = time.monotonic()
        outcomes = run_in_hosts(hosts, command, variables, events, timeout_seconds=limit, grace_seconds=5.0, output=say)
    return 0 if time.monotonic() - began >= limit else exit_code(outcomes)


def _beside_each_other(
    commands: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]], limit: float, folder: Path
) -> int:
    """Run commands on this machine; returns the exit code of one that failed, or 0; 0 where the time was up."""
    deadline = time.monotonic() + limit
    with (folder / "output.txt").open("w", encoding="utf-8") as output, ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(command, env=os.environ | own, stdout=output, stderr=output, start_new_session=True)
            )
            for command, own in zip(commands, variables, strict=True)
        ]
        try:
            return max(abs(each.wait(max(0.0, deadline - time.monotonic()))) for each in running)
        except subprocess.TimeoutExpired:
            for each in running:
                with suppress(ProcessLookupError):
                    os.killpg(each.pid, signal.SIGKILL)  # the workers that it has started, too
            return 0


# The first host has the rendezvous as well, which ends with it.
_RENDEZVOUS = (
    f'[ "$NODE_RANK" != 0 ] || "{sys.executable}" -m lightning_decentral rendezvous --host "$MASTER_ADDR" '
    '--port "$MASTER_PORT" &'
)


def _settings(network: Network, told: Mapping[str, Any], folder: Path, target: float, seconds: float) -> dict[str, Any]:
    """Write what is the same for all, and what a contender is told."""
    callbacks = [
        {"class_path": "lightning_decentral.callbacks.Progress"},
        {
            "class_path": "lightning_decentral.callbacks.Stragglers",
            "init_args": {"slowdown": None if network.rate else {}, "compute_seconds": COMPUTE_SECONDS},
        },
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": _LOSS, "mode": "min", "stopping_threshold": target, "patience": 100_000},
        },
        {"class_path": "lightning_decentral.lab.benchmarks.frontier.EndAfter", "init_args": {"seconds": seconds}},
    ]
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "curve", "version": "", "flush_logs_every_n_steps": 1},
    }
    return {
        "seed_everything": 1,
        "trainer": {
            "devices": WORKERS if network.rate is None else 1,
            "num_nodes": 1 if network.rate is None else WORKERS,
            "accelerator": "cpu",
            "max_epochs": -1,
            "logger": logger,
            "callbacks": [*callbacks, *told.get("callbacks+", [])],
            "strategy": told["strategy"],
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
        },
        "model": {"init_args": {"width": 64, "context_length": 64, "warmup_steps": 20}},
        "data": {"init_args": {"context_length": 64, "samples_per_epoch": 1280, "validation_samples": 64}},
    }


def _some(option: str, names: Sequence[str], table: Mapping[str, object]) -> list[str]:
    if unknown := [name for name in names if name not in table]:
        raise ConfigurationError(f"{option} got {unknown[0]!r}, needs some of {', '.join(table)}. Correct the name.")
    return list(names)


if __name__ == "__main__":
    sys.exit(main())
