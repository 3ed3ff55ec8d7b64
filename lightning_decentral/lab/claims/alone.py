"""The tasks of claims on optimizers and layers: one device trains, and what is measured is counted in gradients.

Digits, of 28 x 28 pixels for networks of one hidden layer and of 7 x 7 for a small residual network; sparse logistic
regression on passages of plays for optimizers that see values of the loss only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from lightning_decentral.lab.benchmarks.zeroth_order import Passages, optimum, train
from lightning_decentral.lab.claims.claim import Curve
from lightning_decentral.lab.claims.stages import small_digits
from lightning_decentral.lab.digits import digits
from lightning_decentral.normalization import convert_full_norm
from lightning_decentral.optimizers import CLARS, LARS, RSGD
from lightning_decentral.recipes.resnet import CIFARResNet

Optimizers = Callable[[nn.Module, float], Optimizer]
"""Makes the optimizer of a model, with a learning rate."""


def constant(share: float) -> float:
    """Keep the learning rate."""
    return 1.0


def falling(share: float) -> float:
    """Let the learning rate fall to 0, as a cosine."""
    return (1.0 + math.cos(math.pi * share)) / 2


def decaying(share: float) -> float:
    """Let the learning rate fall to 0 by power 2."""
    return (1.0 - share) ** 2


def warmed_up(share: float) -> float:
    """Begin with a quarter of the learning rate, reach it after a fifth of the batches, then let it fall by power 2."""
    return 0.25 + 0.75 * share / 0.2 if share < 0.2 else ((1.0 - share) / 0.8) ** 2


def larger(schedule: Callable[[float], float], times: float, share: float) -> float:
    """Take a learning rate that is so many times as large, on a schedule."""
    return times * schedule(share)


@dataclass(frozen=True)
class Alone:
    """A run of one device on 4,000 digits.

    Args:
        optimizer: makes it.
        batches: that are trained on.
        batch: images of one.
        network: ``"hidden"``: one hidden layer of 32. ``"residual"``: ResNet-8 of width 8, with BatchNorm;
            ``"residual, FN"``: with Full Normalization, both momenta 0.05.
        order: ``"shuffled"``, or each batch of ``"one class"``.
        schedule: which part of the learning rate is taken at a share of the batches.
        parts: micro-batches of a batch, one backward pass each.
        measured: how often is measured.

    A call returns what was measured: ``gradients``, the batches so far; ``accuracy`` on 500 other digits in percent,
    and ``loss`` there. An optimizer with two iterates is evaluated at the one that it exploits. Where the loss is no
    longer finite, the run ends.
    """

    optimizer: Optimizers
    batches: int
    batch: int = 16
    network: Literal["hidden", "residual", "residual, FN"] = "hidden"
    order: Literal["shuffled", "one class"] = "shuffled"
    schedule: Callable[[float], float] = constant
    parts: int = 1
    measured: int = 20

    def __call__(self, learning_rate: float, seed: int) -> Curve:
        read = digits if self.network == "hidden" else small_digits
        (images, labels), others = read("train"), read("val")
        torch.manual_seed(seed)
        model = _network(self.network)
        optimizer = self.optimizer(model, learning_rate)
        draw = torch.Generator().manual_seed(1000 * seed)
        curve: list[dict[str, float]] = []
        for count in range(1, self.batches + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * max(self.schedule((count - 1) / self.batches), 1e-6)
            chosen = _drawn(labels, self.batch, self.order, draw)
            optimizer.zero_grad()
            for part in chosen.chunk(self.parts):
                torch.autograd.backward(F.cross_entropy(model(images[part]), labels[part]) / self.parts)
            optimizer.step()
            if count % max(1, self.batches // self.measured) == 0:
                curve.append({"gradients": count, **_evaluate(model, optimizer, *others)})
                if not math.isfinite(curve[-1]["loss"]):
                    break
        return curve


def momentum(model: nn.Module, rate: float) -> Optimizer:
    """Make SGD with a momentum of 0.9."""
    return SGD(model.parameters(), lr=rate, momentum=0.9)


def rsgd(residual: Literal["ema", "block", "topk"]) -> Optimizers:
    """Make RSGD with a residual of this kind."""
    return lambda model, rate: RSGD(model.parameters(), lr=rate, residual=residual)


def lars(model: nn.Module, rate: float) -> Optimizer:
    """Make LARS, with weight decay on weights."""
    return LARS(_groups(model), lr=rate, momentum=0.9, trust=_TRUST)


def clars(rate_in_buffer: bool) -> Optimizers:
    """Make CLARS, which sees the micro-batches."""

    def make(model: nn.Module, rate: float) -> Optimizer:
        optimizer = CLARS(
            _groups(model), lr=rate, momentum=0.9, trust=_TRUST, max_rate=1e4, rate_in_buffer=rate_in_buffer
        )
        optimizer.observe()
        return optimizer

    return make


_TRUST = 0.32


@dataclass(frozen=True)
class FewQueries:
    """A run of a zeroth-order method: sparse logistic regression of 101 numbers on passages of plays.

    Args:
        method: as the benchmark of zeroth-order methods calls it.

    A call returns what was measured: ``queries``, values of the loss of one passage, in thousands; ``gap``, the
    objective less its minimum; and its ``digits``, -log10 of it.
    """

    method: str

    def __call__(self, learning_rate: float, seed: int) -> Curve:
        least = _least()
        curve = []
        for row in train(self.method, learning_rate, seed, _passages()):
            gap = row["objective"] - least
            curve.append({"queries": row["queries"] / 1e3, "gap": gap, "digits": -math.log10(max(gap, 1e-8))})
        return [point for point in curve if math.isfinite(point["gap"])]


def _network(name: str) -> nn.Module:
    if name == "hidden":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    model: nn.Module = CIFARResNet(depth=8, in_channels=1, width=8)
    return convert_full_norm(model, 0.05, 0.05) if name == "residual, FN" else model


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return [{"params": weights, "weight_decay": 2e-4}, {"params": others, "weight_decay": 0.0}]


def _drawn(labels: Tensor, size: int, order: str, draw: torch.Generator) -> Tensor:
    """Draw the samples of a batch."""
    if order == "shuffled":
        return torch.randint(len(labels), (size,), generator=draw)
    own = torch.nonzero(labels == torch.randint(10, (), generator=draw)).flatten()
    return own[torch.randint(len(own), (size,), generator=draw)]


@torch.no_grad()
def _evaluate(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> dict[str, float]:
    model.eval()
    if isinstance(optimizer, RSGD):
        optimizer.eval()
    scores = model(images)
    if isinstance(optimizer, RSGD):
        optimizer.train()
    model.train()
    accuracy = 100 * float((scores.argmax(1) == labels).double().mean())
    return {"accuracy": accuracy, "loss": float(F.cross_entropy(scores, labels))}


@functools.cache
def _passages() -> Passages:
    return Passages.load()


@functools.cache
def _least() -> float:
    """Compute the minimum of the objective."""
    return optimum(_passages())[0]
