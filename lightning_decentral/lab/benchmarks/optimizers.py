"""What a step of the optimizers costs, against torch's momentum SGD, on the shapes of ResNet-50's parameters.

    python -m lightning_decentral.lab.benchmarks.optimizers [--rounds 7] [--steps 3] [--threads 1]

Every round times each contender for some steps, one contender after the other, so that a machine that changes its
speed changes it for all. Reported: each round's shortest step, as a ratio to momentum SGD (``foreach=True``, with
weight decay) of the same round. The gradients are there already; what CLARS adds to a backward pass, the norms of the
gradients, has a row of its own. The parameters of a contender are made anew in each round, and freed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_decentral.lab.results import environment
from lightning_decentral.optimizers import CLARS, LAMB, LARS, RSGD


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Return the 161 parameter tensors of ResNet-50 (He et al., 2016; 25.56 million numbers), in order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))  # the projection of the shortcut
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]  # and its normalization
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


DECAY = 1e-4
CONTENDERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "momentum SGD (torch, foreach)": lambda p: SGD(p, lr=1e-3, momentum=0.9, weight_decay=DECAY, foreach=True),
    "LARS": lambda p: LARS(p, lr=1e-3, weight_decay=DECAY),
    "CLARS": lambda p: CLARS(p, lr=1e-3, weight_decay=DECAY),
    "RSGD, ema": lambda p: RSGD(p, lr=1e-3, weight_decay=DECAY),
    "AdamW (torch, foreach)": lambda p: AdamW(p, lr=1e-6, weight_decay=DECAY, foreach=True),
    "LAMB": lambda p: LAMB(p, lr=1e-6, weight_decay=DECAY),
}


def seconds_per_step(make: Callable[[list[nn.Parameter]], Optimizer], steps: int) -> float:
    """Return the shortest of some steps, after one that makes the state."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape) * 0.05) for shape in resnet50_shapes()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 0.01
    optimizer = make(parameters)
    if isinstance(optimizer, CLARS):
        optimizer.observe()
    times = []
    for _ in range(steps + 1):
        if isinstance(optimizer, CLARS):
            # What the backward passes leave behind: a norm for each parameter, taken by its hook.
            see_gradients(parameters)
        before = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - before)
    return min(times[1:])


def see_gradients(parameters: list[nn.Parameter]) -> None:
    """Make a backward pass that adds nothing to the gradients, so that hooks run."""
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    sum((parameter.sum() for parameter in parameters), torch.zeros(())).backward()
    for parameter, gradient in zip(parameters, kept, strict=True):
        parameter.grad = gradient


def seconds_per_norms(steps: int) -> float:
    """Tell what the hooks of CLARS do in one backward pass."""
    gradients: list[Tensor] = [torch.randn(shape) for shape in resnet50_shapes()]
    times = []
    for _ in range(steps + 1):
        before = time.perf_counter()
        for gradient in gradients:
            torch.linalg.vector_norm(gradient, dtype=torch.float32)
        times.append(time.perf_counter() - before)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = next(iter(CONTENDERS))
    norms = "norms of one micro-batch, for CLARS"
    ratios: dict[str, list[float]] = {name: [] for name in [*CONTENDERS, norms]}
    seconds = []
    for _ in range(options.rounds):
        for name, make in CONTENDERS.items():
            own = seconds_per_step(make, options.steps)
            gc.collect()
            if name == base:
                seconds.append(own)
            ratios[name].append(own / seconds[-1])
        ratios[norms].append(seconds_per_norms(options.steps) / seconds[-1])
        print({name: round(values[-1], 3) for name, values in ratios.items()}, file=sys.stderr, flush=True)
    count = sum(torch.Size(shape).numel() for shape in resnet50_shapes())
    print(f"# Steps of the optimizers\n\n{environment()}\n")
    print(
        f"`python -m lightning_decentral.lab.benchmarks.optimizers --rounds {options.rounds} --steps {options.steps} "
        "--threads "
        f"{options.threads}`: {len(resnet50_shapes())} tensors of the shapes of ResNet-50's parameters, {count} "
        "numbers in float32, with weight decay. The shortest step of momentum SGD took "
        f"{1e3 * statistics.median(seconds):.1f} ms (median of rounds).\n"
    )
    print("| contender | time of a step / momentum SGD: median (min to max) |")
    print("|---|---|")
    for name, values in ratios.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")


if __name__ == "__main__":
    main()
