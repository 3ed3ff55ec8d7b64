"""Pretraining in a loop of one's own: the text model with Fabric and DiLoCo, as a user of LitGPT writes it.

    python recipes/text/pretrain.py --devices 8 --strategy diloco --every 50

Any name of a method works, and "ddp". With ``--resume`` it goes on where ``--out`` has a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_decentral import FabricStrategy
from lightning_decentral.methods import METHODS
from lightning_decentral.recipes import Shakespeare, TransformerLM


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--strategy", default="diloco")
    parser.add_argument("--every", type=int, help="local steps of a round, of the methods that have some")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--eval-interval", type=int, default=200)
    parser.add_argument("--save-interval", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> Any:
    """What Fabric takes as its strategy: a name, or an object where a method gets an option."""
    if options.every is None or options.strategy not in METHODS:
        return options.strategy
    algorithm: Any = METHODS[options.strategy].load()()
    return FabricStrategy(dataclasses.replace(algorithm, every=options.every))


def main(fabric: Fabric, options: argparse.Namespace) -> None:
    """Train one worker's model."""
    fabric.seed_everything(options.seed + fabric.global_rank)  # each worker draws windows of its own
    data = Shakespeare(context_length=options.context_length, batch_size=options.micro_batch_size)
    data.setup("fit")
    train, validation = fabric.setup_dataloaders(data.train_dataloader(), data.val_dataloader())
    with fabric.init_module(empty_init=False):
        model = TransformerLM(depth=2, width=options.width, context_length=options.context_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    if options.resume:
        fabric.load(options.out / "last.ckpt", state)
    fit(fabric, state, endless(train), validation, options)
    with fabric.strategy.consensus() if isinstance(fabric.strategy, FabricStrategy) else nullcontext():
        loss = validate(fabric, model, validation)
    fabric.print(f"end: {loss / math.log(2):.3f} bits per character")
    fabric.save(options.out / "last.ckpt", state)


def fit(
    fabric: Fabric,
    state: dict[str, Any],
    batches: Iterator[Tensor],
    validation: DataLoader[Tensor],
    options: argparse.Namespace,
) -> None:
    """Make all steps that are left."""
    model, optimizer = state["model"], state["optimizer"]
    began = time.perf_counter()
    while state["step"] < options.max_steps:
        warm = min(1.0, (state["step"] + 1) / options.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warm
        for micro_step in range(options.accumulate):
            batch = next(batches)
            with fabric.no_backward_sync(model, enabled=micro_step < options.accumulate - 1):
                logits = model(batch[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                fabric.backward(loss / options.accumulate)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if state["step"] % options.eval_interval == 0:
            with fabric.strategy.consensus() if isinstance(fabric.strategy, FabricStrategy) else nullcontext():
                mean = validate(fabric, model, validation)
            seconds = time.perf_counter() - began
            fabric.print(f"step {state['step']}: {mean / math.log(2):.3f} bits per character, {seconds:.0f} s")
        if state["step"] % options.save_interval == 0:
            fabric.save(options.out / "last.ckpt", state)


@torch.no_grad()
def validate(fabric: Fabric, model: torch.nn.Module, loader: DataLoader[Tensor]) -> float:
    """The mean loss over all workers' shares of the held-out windows, in nats per token."""
    model.eval()
    losses = [F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()) for batch in loader]
    model.train()
    mean: Tensor = fabric.all_reduce(torch.stack(losses).mean())
    return float(mean)


def endless(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    """The batches of one epoch after the other."""
    while True:
        yield from loader


if __name__ == "__main__":
    given = parse()
    fabric = Fabric(strategy=chosen(given), accelerator=given.accelerator, devices=given.devices)
    fabric.launch()
    main(fabric, given)
