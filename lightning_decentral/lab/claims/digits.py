"""The task of simulated claims: handwritten digits, a network of one hidden layer, any method on any cluster.

The simulator tells how long it would have taken; only the gradients are really computed, by hand, because most of a
step of so small a network would be autograd's overhead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor
from lightning_decentral.errors import DecodingError
from lightning_decentral.flat import AbstractVector, Vector
from lightning_decentral.lab.claims.claim import Curve
from lightning_decentral.lab.digits import digits
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.worker import Worker

HIDDEN, CLASSES, PIXELS = 32, 10, 784
NUM_BYTES = 4 * (HIDDEN * PIXELS + HIDDEN + CLASSES * HIDDEN + CLASSES)
"""Bytes of the network's parameters."""


@dataclass(frozen=True)
class Digits:
    """A run of a method on 4,000 digits.

    Args:
        algorithm: makes the method.
        workers: how many.
        gradients: how many all workers compute together.
        cluster: how long computing and sending take.
        batch: samples of a gradient.
        data: ``"shared"``: every worker draws from all digits. ``"classes"``: from those of as few classes as possible,
            each worker from others.
        compressor: what every gradient goes through before it is used; none by default.
        measured: how often accuracy and loss are measured.
        momentum: of each worker's optimizer, stochastic gradient descent.
        after: so many gradients later than at equal parts of them; 1 where a round ends at each part, so that what its
            end has made of the models is measured.

    A call returns what was measured: ``gradients``, ``seconds`` of the virtual clock, ``megabytes`` that one worker has
    sent on average, ``accuracy`` on 500 other digits in percent, and ``loss`` on those trained on, of the mean of all
    models. Where the loss is no longer finite, or messages can no longer be read, it ends.
    """

    algorithm: Callable[[], AbstractAlgorithm]
    workers: int
    gradients: int
    cluster: Cluster
    batch: int = 16
    data: Literal["shared", "classes"] = "shared"
    compressor: Callable[[], AbstractCompressor] | None = None
    measured: int = 25
    after: int = 0
    momentum: float = 0.0

    def __call__(self, learning_rate: float, seed: int) -> Curve:
        images, labels = _digits("train")
        parts = _parts(labels, self.workers, self.data)
        draws = [torch.Generator().manual_seed(1000 * seed + rank) for rank in range(self.workers)]
        start = Vector([_start(seed)])
        simulator = Simulator(self.algorithm(), [start.clone() for _ in range(self.workers)], self.cluster, seed)
        gradients: dict[int, Vector] = {}
        for worker in simulator.workers:
            worker.read_gradient = functools.partial(gradients.__getitem__, worker.rank)
        compressor = self.compressor() if self.compressor else None

        def gradient(worker: Worker) -> Vector:
            part, draw = parts[worker.rank], draws[worker.rank]
            chosen = part[torch.randint(len(part), (self.batch,), generator=draw)]
            assert isinstance(worker.snapshot, Vector)
            value = _gradient(worker.snapshot.buffers[0], images[chosen], labels[chosen])
            if compressor is not None:
                value = compressor.decompress(compressor.compress(value, draw))
            return Vector([value])

        curve: list[dict[str, float]] = []
        momenta: dict[int, AbstractVector] = {}
        every, count = max(1, self.gradients // self.measured), 0
        demands = simulator.demands()
        while count < self.gradients:
            try:
                request, worker = demands.send(None)
            except DecodingError:  # models too far from each other for what is sent: as good as diverged
                zeros = dict.fromkeys(("seconds", "megabytes", "accuracy"), 0.0)
                return [*curve, {"gradients": count, **zeros, "loss": math.inf}]
            if isinstance(request, Gradient):
                gradients[worker.rank] = gradient(worker)
                count += 1
                if count % every == self.after:
                    curve.append(self._measure(simulator, count))
                    if not math.isfinite(curve[-1]["loss"]):
                        break
            else:
                direction = worker.gradient if request.gradient is None else request.gradient
                if self.momentum:
                    remembered = momenta.setdefault(worker.rank, direction.zeros_like())
                    direction = remembered.mul_(self.momentum).add_(direction)
                request.target(worker).add_(direction, alpha=-learning_rate)
        demands.close()
        return curve

    def _measure(self, simulator: Simulator, count: int) -> dict[str, float]:
        """Evaluate the mean of all models."""
        mean = simulator.consensus().buffers[0].float()
        images, labels = _digits("val")
        accuracy = float((_forward(mean, images)[1].argmax(1) == labels).double().mean())
        images, labels = (each[:1000] for each in _digits("train"))
        loss = float(torch.nn.functional.cross_entropy(_forward(mean, images)[1], labels))
        sent = sum(one.bytes_sent for one in simulator.traffic) / self.workers
        return {
            "gradients": count,
            "seconds": simulator.seconds,
            "megabytes": sent / 1e6,
            "accuracy": 100 * accuracy,
            "loss": loss,
        }


def reached(axis: str, measure: str, level: float, curve: Curve) -> float:
    """Return at which point of an axis a measure first was as large as this; infinite: it never was."""
    return next((point[axis] for point in curve if point[measure] >= level), math.inf)


def fallen(axis: str, measure: str, level: float, curve: Curve) -> float:
    """Return at which point of an axis a measure first was as small as this; infinite: it never was."""
    return next((point[axis] for point in curve if point[measure] <= level), math.inf)


def last(measure: str, curve: Curve, over: int = 5) -> float:
    """Return the mean of the last measurements; 0 if the training has diverged."""
    values = [point[measure] for point in curve[-over:]]
    return math.fsum(values) / len(values) if all(map(math.isfinite, (p["loss"] for p in curve))) else 0.0


def _digits(split: str) -> tuple[Tensor, Tensor]:
    """Read normalized images ``[n, 784]`` and labels ``[n]``."""
    images, labels = digits(split)
    return images.flatten(1), labels


def _parts(labels: Tensor, workers: int, data: str) -> Sequence[Tensor]:
    """Return the samples from which each worker draws."""
    if data == "shared":
        return [torch.arange(len(labels))] * workers
    return list(torch.argsort(labels, stable=True).tensor_split(workers))


def _start(seed: int) -> Tensor:
    """Make the network's first parameters: Kaiming's, and no biases."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(HIDDEN, PIXELS, generator=generator) * math.sqrt(2 / PIXELS)
    second = torch.randn(CLASSES, HIDDEN, generator=generator) * math.sqrt(1 / HIDDEN)
    return torch.cat([first.flatten(), torch.zeros(HIDDEN), second.flatten(), torch.zeros(CLASSES)])


def _layers(parameters: Tensor) -> list[Tensor]:
    """Return weights and biases as views."""
    first, bias, second, offset = torch.split(parameters, [HIDDEN * PIXELS, HIDDEN, CLASSES * HIDDEN, CLASSES])
    return [first.view(HIDDEN, PIXELS), bias, second.view(CLASSES, HIDDEN), offset]


def _forward(parameters: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the hidden layer ``[n, 32]`` and the scores ``[n, 10]``."""
    first, bias, second, offset = _layers(parameters)
    hidden = torch.addmm(bias, images, first.t()).relu_()
    return hidden, torch.addmm(offset, hidden, second.t())


def _gradient(parameters: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Compute the gradient of the mean cross entropy."""
    hidden, scores = _forward(parameters, images)
    errors = scores.softmax(1)
    errors[torch.arange(len(labels)), labels] -= 1.0
    errors /= len(labels)
    back = (errors @ _layers(parameters)[2]).mul_(hidden > 0)
    return torch.cat([(back.t() @ images).flatten(), back.sum(0), (errors.t() @ hidden).flatten(), errors.sum(0)])
