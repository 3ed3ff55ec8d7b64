"""Who races: one small adapter per framework, and a table of what each can run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import cast

from lightning_decentral.errors import ConfigurationError, did_you_mean
from lightning_decentral.lab.bench.record import Recorder
from lightning_decentral.lab.bench.task import Task
from lightning_decentral.methods import METHODS

Run = Callable[[Task, Recorder, Mapping[str, str]], None]
"""What an adapter module's ``run`` is: trains one worker of a task and finishes its recorder. Its process has the
environment that torchrun gives, and ports MASTER_PORT and MASTER_PORT + 1 of MASTER_ADDR to itself."""


@dataclass(frozen=True)
class Contender:
    """One way to train a model on several hosts.

    Attributes:
        name: in commands, files and tables.
        title: what a person would call it.
        module: of this package; its ``run`` is a `Run`.
        options: given to ``run``; they say which of the module's contenders it is.
        method: what the planner would call it: ``"ddp"``, alone or with the name of a compressor, or the name of a
            method; of one that is planned on several graphs, with the name of a topology. ``None``: it has no such
            method.
        environment: the name of the virtual environment with its packages; ``None``: torch and this package do.
        packages: what pip installs into that environment.
        asynchronous: whether a worker may stop at any step, because nobody waits for it.
        each_gradient: whether each worker's gradient is applied by itself, with a learning rate for that; see
            `Task.for_each_gradient`.
    """

    name: str
    title: str
    module: str
    options: Mapping[str, str] = field(default_factory=dict)
    method: str | None = None
    environment: str | None = None
    packages: tuple[str, ...] = ()
    asynchronous: bool = False
    each_gradient: bool = False

    def load(self) -> Run:
        """Return the adapter's function; imports its framework."""
        return cast(Run, import_module(f"{__name__}.{self.module}").run)


def _plain(name: str, title: str, method: str | None = None, asynchronous: bool = False) -> Contender:
    return Contender(name, title, "plain", {"method": name}, method, asynchronous=asynchronous)


def _ours(name: str, title: str, method: str | None, strategy: str, asynchronous: bool = False) -> Contender:
    options, alone = {"strategy": strategy}, strategy in _EACH_GRADIENT
    return Contender(name, title, "ours", options, method, asynchronous=asynchronous, each_gradient=alone)


_EACH_GRADIENT = (
    "apsgd",
    "apsgd_4_servers",
    "delay_adaptive",
    "hogwild",
    "ringleader",
    "ringmaster",
    "stale_synchronous",
)
"""Who applies each worker's gradient by itself, at full rate, by the name of the strategy."""


def _decent_dp(name: str, topology: str, method: str | None) -> Contender:
    packages = ("decent-dp==0.2.3",)
    title = f"Decent-DP, {topology}"
    return Contender(f"decent_dp_{name}", title, "decent_dp", {"topology": topology}, method, "decent_dp", packages)


def _torchft(name: str, title: str) -> Contender:
    packages = ("torchft==0.2.0",)
    return Contender(f"torchft_{name}", title, "torchft", {"method": name}, None, "torchft", packages)


_RACED_WITH: dict[str, tuple[str, str]] = {
    "dpsgd": (", one peer", " one_peer_exponential"),
    "d2": (", lazy ring", ""),
    "choco_sgd": (", ring, int8", ""),
    "moniqua_sgd": (", one peer, 8 bits", ""),
    "saef": (", 5 % of the values", ""),
    "ef21": (", 5 % of the values", ""),
}
"""What a method of the table races with, by its name: for its title, and for the planner."""


def _of_the_table(name: str) -> Contender:
    method = METHODS[name]
    title, detail = _RACED_WITH.get(name, ("", ""))
    return _ours(name, f"{method.title}{title}", f"{name}{detail}", name, method.asynchronous)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        _plain("none", "no communication", asynchronous=True),
        _plain("ddp", "torch DDP", "ddp"),
        _plain("ddp_fp16", "torch DDP, fp16 hook"),
        _plain("ddp_powersgd", "torch DDP, PowerSGD rank 1"),
        _plain("torch_post_local_sgd", "torch post-local SGD, every 8"),
        _plain("torch_local_sgd", "torch PeriodicModelAverager, every 8"),
        _ours("lightning_none", "Lightning, no communication", None, "none", asynchronous=True),
        _ours("lightning_ddp", "Lightning DDP", "ddp", "ddp"),
        _ours("ddp_cast", "Lightning DDP, fp16", "ddp cast", "ddp_cast"),
        _ours("ddp_low_rank", "Lightning DDP, PowerSGD rank 1", None, "ddp_low_rank"),
        _ours("ddp_int8", "Lightning DDP, int8", "ddp int8", "ddp_int8"),
        _ours("ddp_scaled_sign", "Lightning DDP, scaled sign", "ddp scaled_sign", "ddp_scaled_sign"),
        _ours("ddp_topk", "Lightning DDP, top 1 %", "ddp topk", "ddp_topk"),
        *map(_of_the_table, METHODS),
        _ours("dpsgd_ring", "D-PSGD, ring", "dpsgd ring", "dpsgd_ring"),
        _ours("dpsgd_matching", "D-PSGD, hypercube matching", "dpsgd hypercube_matching", "dpsgd_matching"),
        _ours("dpsgd_alternating", "D-PSGD, alternating matching", "dpsgd alternating_matching", "dpsgd_alternating"),
        _ours("dpsgd_sites", "D-PSGD, two sites", "dpsgd sites", "dpsgd_sites"),
        _ours("apsgd_4_servers", "A-PSGD, 4 servers", None, "apsgd_4_servers", asynchronous=True),
        _ours("backup_workers_6", "Backup workers, the first 6", None, "backup_workers_6", asynchronous=True),
        _ours("diloco_32", "DiLoCo, every 32", "diloco", "diloco_32"),
        _ours("streaming_diloco_32", "Streaming DiLoCo, every 32, delay 14", "streaming_diloco", "streaming_diloco_32"),
        _ours("streaming_diloco_32_fp4", "Streaming DiLoCo, every 32, delay 14, FP4", None, "streaming_diloco_32_fp4"),
        _ours("sgp_overlap", "SGP, messages a step late", None, "sgp_overlap"),
        _ours("choco_sgd_sign", "CHOCO-SGD, ring, scaled sign", None, "choco_sgd_sign"),
        # Its graphs are matchings: one peer per step, on a hypercube and on a ring, or an all-reduce among all.
        _decent_dp("one_peer", "one-peer-exp", "dpsgd hypercube_matching"),
        _decent_dp("ring", "ring", "dpsgd alternating_matching"),
        _decent_dp("complete", "complete", None),
        _torchft("local_sgd", "torchft LocalSGD, every 8"),
        _torchft("diloco", "torchft DiLoCo, every 8"),
        _torchft("streaming_diloco_32", "torchft streaming DiLoCo, every 32, delay 14"),
        Contender("hivemind", "hivemind Optimizer", "hivemind", {}, None, "hivemind", ("hivemind==1.1.12",), True),
    )
}
"""By name: bare torch, this package through Lightning's Trainer, and its peers."""


def contender(name: str) -> Contender:
    """Return the contender of that name.

    Raises:
        ConfigurationError: if there is none.
    """
    if name not in CONTENDERS:
        raise ConfigurationError(
            f"Got the contender {name!r}, need one of {', '.join(CONTENDERS)}. {did_you_mean(name, CONTENDERS)}"
        )
    return CONTENDERS[name]
