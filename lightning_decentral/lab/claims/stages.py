"""The tasks of claims on pipelines: small models in stages, trained in this process; the schedule's clock gives times.

What each gradient is, and how stale, is that of a pipeline on as many devices. How long computing and sending take is
emulated: devices are taken to have equal shares of the model, whatever the small models' stages are.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from lightning_decentral.lab.claims.claim import Curve
from lightning_decentral.lab.digits import digits
from lightning_decentral.pipeline.clock import seconds_per_batch
from lightning_decentral.pipeline.local import LocalPipeline
from lightning_decentral.pipeline.schedules import Schedule
from lightning_decentral.recipes import Shakespeare, TransformerLM
from lightning_decentral.recipes.resnet import CIFARResNet

FORWARD, BACKWARD = 0.1, 0.2
"""Seconds of the whole model's passes on one device."""
_SLOW_TIMES, _RANDOM_TIMES, _RANDOM_ONE_IN = 2.0, 4.0, 8
_CONTEXT = 16
_CLOCK_BATCHES = 240


@dataclass(frozen=True)
class Task:
    """A model, and what it is trained on.

    Args:
        model: with its first parameters.
        step: gives the loss of a batch; calls the model once.
        batch: draws a batch.
        optimizer: makes that of a stage, with a learning rate.
        evaluate: computes what is measured.
    """

    model: nn.Module
    step: Callable[[Any], Tensor]
    batch: Callable[[], Any]
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer]
    evaluate: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Staged:
    """A run of a schedule.

    Args:
        schedule: of the stages.
        task: makes the task of a seed.
        batches: that are trained on.
        devices: that have all of the model and a share of each batch; the schedule has one stage then.
        warm_up: batches in which the rate grows.
        measured: how often is measured.
        falls: whether the rate falls to 0 afterwards, by a cosine.

    A call returns what was measured: ``gradients``, the batches so far; ``seconds`` of the schedule's clock, with links
    that take no time; ``seconds_slow``, where one stage in the middle takes 2 times as long; ``seconds_random``, where
    each stage takes 4 times as long on one batch in 8, drawn anew for each; ``seconds_large``, where sending the
    model's gradients takes as long as computing them on one device and sending activations a thirtieth of that;
    ``seconds_small``, where it is the other way around; and what the task measures.
    """

    schedule: Schedule
    task: Callable[[int], Task]
    batches: int
    devices: int = 1
    warm_up: int = 40
    measured: int = 10
    falls: bool = False

    def __call__(self, learning_rate: float, seed: int) -> Curve:
        times = self._times(seed)
        measured = _trained(
            self.schedule, self.task, self.batches, self.warm_up, self.measured, self.falls, learning_rate, seed
        )
        return [{**point, **{name: point["gradients"] * value for name, value in times.items()}} for point in measured]

    def _times(self, seed: int) -> dict[str, float]:
        """Tell how long a batch takes."""
        stages = self.schedule.stages
        shares = [share / self.devices for share in self.schedule.shares]
        forward, backward = [share * FORWARD for share in shares], [share * BACKWARD for share in shares]
        whole = FORWARD + BACKWARD

        def at(sending: float, slowdown: Callable[[int, int], float] = lambda stage, batch: 1.0) -> float:
            return seconds_per_batch(self.schedule, _CLOCK_BATCHES, forward, backward, sending, slowdown)

        def reduced(seconds: float) -> float:
            return 2 * (self.devices - 1) / self.devices * seconds

        def drawn(stage: int, batch: int) -> float:
            return _RANDOM_TIMES if random.Random(f"{seed} {stage} {batch}").randrange(_RANDOM_ONE_IN) == 0 else 1.0

        return {
            "seconds": at(0.0),
            "seconds_slow": at(0.0, lambda stage, batch: _SLOW_TIMES if stage == stages // 2 else 1.0),
            "seconds_random": at(0.0, drawn),
            "seconds_large": at(whole / 30) + reduced(whole),
            "seconds_small": at(whole) + reduced(whole / 30),
        }


@functools.cache
def _trained(
    schedule: Schedule,
    make: Callable[[int], Task],
    batches: int,
    warm_up: int,
    measured: int,
    falls: bool,
    rate: float,
    seed: int,
) -> Curve:
    """Train by a schedule; two contenders that differ in time only are trained once."""
    task = make(seed)
    optimizers: list[Optimizer] = []

    def optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizers.append(task.optimizer(parameters, rate))
        return optimizers[-1]

    pipeline = LocalPipeline(schedule, task.model, task.step, optimizer, seed=seed)
    curve: list[dict[str, float]] = []
    for count in range(1, batches + 1):
        done = max(0, count - warm_up) / max(1, batches - warm_up) if falls else 0.0
        for each in optimizers:
            each.param_groups[0]["lr"] = rate * min(1.0, count / warm_up) * (1 + math.cos(math.pi * done)) / 2
        pipeline.train(task.batch())
        if count % max(1, batches // measured) == 0:
            if count == batches:
                pipeline.drain()
            task.model.eval()
            with torch.no_grad():
                curve.append({"gradients": count, **task.evaluate()})
            task.model.train()
            if not math.isfinite(curve[-1]["loss"]):
                break
    return curve


def speed(name: str, curve: Curve) -> float:
    """Return how many times as many batches a second there are as on one device with the whole model, undisturbed."""
    return (FORWARD + BACKWARD) * curve[-1]["gradients"] / curve[-1][name]


def kept(name: str, curve: Curve) -> float:
    """Return which share of its own speed, undisturbed, a contender has."""
    return curve[-1]["seconds"] / curve[-1][name]


def digits_in_stages(seed: int) -> Task:
    """Make the task of a residual network of 8 layers on 4,000 handwritten digits of 7 x 7 pixels."""
    images, labels = small_digits("train")
    torch.manual_seed(seed)
    model = CIFARResNet(depth=8, in_channels=1, width=8)
    draw = torch.Generator().manual_seed(1000 * seed)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (32,), generator=draw)
        return images[chosen], labels[chosen]

    def evaluate() -> dict[str, float]:
        others, theirs = small_digits("val")
        scores = model(others)
        accuracy = 100 * float((scores.argmax(1) == theirs).double().mean())
        return {"accuracy": accuracy, "loss": float(F.cross_entropy(scores, theirs))}

    return Task(
        model,
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]),
        batch,
        lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4),
        evaluate,
    )


def plays_in_stages(seed: int) -> Task:
    """Make the task of a Transformer of four blocks, with a tied embedding, on Shakespeare's plays by letter."""
    texts = _plays()
    torch.manual_seed(seed)
    model = TransformerLM(vocabulary_size=128, depth=4, width=32, heads=2, context_length=_CONTEXT)
    draw = torch.Generator().manual_seed(1000 * seed)
    fixed = torch.linspace(0, len(texts["val"]) - _CONTEXT - 1, 128).long()

    def windows(text: Tensor, starts: Tensor) -> Tensor:
        return text[starts[:, None] + torch.arange(_CONTEXT + 1)]

    def step(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    return Task(
        model,
        step,
        lambda: windows(texts["train"], torch.randint(len(texts["train"]) - _CONTEXT - 1, (16,), generator=draw)),
        lambda parameters, rate: AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
        lambda: {"loss": float(step(windows(texts["val"], fixed)))},
    )


@functools.cache
def small_digits(split: str) -> tuple[Tensor, Tensor]:
    """Read normalized images ``[n, 1, 7, 7]`` and labels ``[n]``."""
    images, labels = digits(split)
    return F.avg_pool2d(images, 4), labels


@functools.cache
def _plays() -> dict[str, Tensor]:
    """Read the plays as numbers of letters below 128."""
    return {split: text.long().clamp_(max=127) for split, text in Shakespeare().read_tokens().items()}
