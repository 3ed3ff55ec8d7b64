"""What a normalization layer costs in training: forward and backward pass, against BatchNorm2d, on ResNet-20's shapes.

    python -m lightning_decentral.lab.benchmarks.full_norm [--batch 128] [--rounds 15] [--threads 2]

Every round times all layers one after the other on each shape, so that a machine that changes its speed changes it for
all; reported is each round's ratio to BatchNorm2d. The last column is a whole ResNet-20: its 7, 6 and 6 layers of the
three shapes. Memory is what a layer keeps between batches, and what it keeps of a batch for its backward pass.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor, nn

from lightning_decentral.lab.benchmarks.compression import now
from lightning_decentral.lab.results import environment
from lightning_decentral.normalization import BatchRenorm, FullNorm2d, GhostBatchNorm, MovingAverageBatchNorm

SHAPES = {(16, 32, 32): 7, (32, 16, 16): 6, (64, 8, 8): 6}  # channels, height, width: layers of ResNet-20
LAYERS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "FullNorm2d": FullNorm2d,
    "BatchRenorm": BatchRenorm,
    "MovingAverageBatchNorm": MovingAverageBatchNorm,
    "GhostBatchNorm, parts of 32": lambda channels: GhostBatchNorm(channels, ghost_size=32),
    "GroupNorm, 8 groups": lambda channels: nn.GroupNorm(8, channels),
}


def seconds(layer: nn.Module, x: Tensor, gradient: Tensor) -> float:
    """Measure one forward and backward pass."""
    started = now(x)
    layer(x).backward(gradient)
    return now(x) - started


def measure(
    batch: int, rounds: int, memory_format: torch.memory_format, device: str = "cpu"
) -> dict[str, list[list[float]]]:
    """Seconds per layer: a list over rounds of a list over shapes."""
    cases = []
    for shape in SHAPES:
        x = torch.randn(batch, *shape).to(device, memory_format=memory_format).requires_grad_()
        gradient = torch.randn(batch, *shape).to(device, memory_format=memory_format)
        cases.append((x, gradient, {name: make(shape[0]).to(device) for name, make in LAYERS.items()}))
    times: dict[str, list[list[float]]] = {name: [] for name in LAYERS}
    for round_number in range(rounds + 2):  # two to warm up
        for name in LAYERS:
            measured = [statistics.median(seconds(layers[name], x, g) for _ in range(3)) for x, g, layers in cases]
            if round_number >= 2:
                times[name].append(measured)
    return times


def table(times: dict[str, list[list[float]]]) -> str:
    """Ratios to BatchNorm2d as Markdown: the median over rounds, smallest and largest."""
    shapes = [f"{channels} x {height} x {width}" for channels, height, width in SHAPES]
    lines = [f"| layer | {' | '.join(shapes)} | ResNet-20 |", "|---" * (len(shapes) + 2) + "|"]
    base = times["BatchNorm2d"]
    counts = list(SHAPES.values())
    for name, own in times.items():
        columns = [[a[i] / b[i] for a, b in zip(own, base, strict=True)] for i in range(len(SHAPES))]
        columns.append([weighted(a, counts) / weighted(b, counts) for a, b in zip(own, base, strict=True)])
        cells = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def weighted(times: list[float], counts: list[int]) -> float:
    return sum(count * value for count, value in zip(counts, times, strict=True))


def memory(name: str) -> tuple[float, float]:
    """Numbers per channel that a layer keeps (parameters left out), and activations that it keeps of a batch."""
    layer, x = LAYERS[name](16), torch.randn(8, 16, 32, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
    numbers = sum(buffer.numel() for buffer in layer.buffers() if buffer.is_floating_point())
    return numbers / 16, sum(kept.values()) / x.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(f"# Normalization layers: time and memory\n\n{environment()}\n", flush=True)
    print(
        f"`python -m lightning_decentral.lab.benchmarks.full_norm --batch {options.batch} --rounds {options.rounds} "
        "--threads "
        f"{options.threads}`: float32, {options.threads} threads. Forward and backward pass "
        "divided by that of `BatchNorm2d` in the same round: median over rounds (smallest to largest).\n"
    )
    for title, memory_format in (("Contiguous", torch.contiguous_format), ("Channels last", torch.channels_last)):
        print(f"## {title}\n\n{table(measure(options.batch, options.rounds, memory_format))}\n", flush=True)
    print("## Memory\n\n| layer | numbers kept per channel | kept of a batch, in inputs |\n|---|---|---|")
    for name in LAYERS:
        numbers, activations = memory(name)
        print(f"| {name} | {numbers:g} | {activations:.2f} |")


if __name__ == "__main__":
    main()
