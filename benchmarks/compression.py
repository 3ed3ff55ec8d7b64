"""What compressing costs, in copies of the vector: `python benchmarks/compression.py [--elements 25e6] [--only NAME]`.

One thread. Every round copies the vector (`tensor.clone()`, into new memory) and then compresses and decompresses it
with every scheme, one after the other; reported is the median over rounds of the ratio to the copy of the same round.
Messages are decoded into new memory too. The error is `||C(x) - x||^2 / ||x||^2` for Gaussian values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from lightning_decentral.bench.report import environment
from lightning_decentral.compression import COMPRESSORS, AbstractCompressor, compressor


@dataclass(frozen=True)
class Contender:
    scheme: AbstractCompressor
    compress_target: float | None = None
    decompress_target: float | None = None


CONTENDERS = [
    Contender(compressor("identity")),
    Contender(compressor("cast", dtype="bfloat16"), 1.5, 1.0),
    Contender(compressor("cast", dtype="float16"), 1.5, 1.0),
    Contender(compressor("int8"), 1.5, 1.0),
    Contender(compressor("int8", stochastic=True), 5.0),
    Contender(compressor("scaled_sign"), 1.5, 1.0),
    Contender(compressor("signsgd"), 1.5, 1.0),
    Contender(compressor("onebit"), 1.5, 1.0),
    Contender(compressor("qsgd"), 5.0),
    Contender(compressor("terngrad"), 5.0),
    Contender(compressor("natural")),
    Contender(compressor("nuqsgd")),
    Contender(compressor("bingrad"), 5.0),
    Contender(compressor("bingrad", variant="b")),
    Contender(compressor("orq"), 45.0),
]


def measure(scheme: AbstractCompressor, x: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Seconds to compress and to decompress, and the result."""
    generator = torch.Generator().manual_seed(1)
    begin = time.perf_counter()
    payload = scheme.compress(x, generator)
    middle = time.perf_counter()
    result = scheme.decompress(payload)
    return middle - begin, time.perf_counter() - middle, result


def copy_seconds(x: torch.Tensor) -> float:
    """The shortest of three copies."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        x.clone()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=25e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(COMPRESSORS), action="append", help="these schemes alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = int(options.elements)
    kinds = tuple(COMPRESSORS[name] for name in options.only or COMPRESSORS)
    chosen = [contender for contender in CONTENDERS if isinstance(contender.scheme, kinds)]
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    copies: list[float] = []
    ratios: dict[AbstractCompressor, list[tuple[float, float]]] = {one.scheme: [] for one in chosen}
    errors: dict[AbstractCompressor, float] = {}
    for number in range(1 + options.rounds):  # the first warms up
        copy = copy_seconds(x)
        for contender in chosen:
            there, back, result = measure(contender.scheme, x)
            if number == 0:
                errors[contender.scheme] = float((result - x).square_().sum() / x.square().sum())
            else:
                ratios[contender.scheme].append((there / copy, back / copy))
            del result
        if number:
            copies.append(1e3 * copy)
    print(f"# Compressors\n\n{environment()}\n")
    print(
        f"`python benchmarks/compression.py --elements {options.elements:g} --rounds {options.rounds}`: {n / 1e6:g} "
        "million float32 values, Gaussian, one thread. Times in units of `tensor.clone()` in the same round, "
        f"{min(copies):.0f} to {max(copies):.0f} ms; medians, smallest and largest in parentheses.\n"
    )
    print("| compressor | bits per element | error | compress | decompress | target |")
    print("|---|---|---|---|---|---|")
    for one in chosen:
        columns = [[figures[i] for figures in ratios[one.scheme]] for i in (0, 1)]
        cells = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        targets = [f"{target:g}" for target in (one.compress_target, one.decompress_target) if target is not None]
        size = f"{one.scheme.num_bits(n) / n:.3g} | {errors[one.scheme]:.2g}"
        print(f"| `{one.scheme}` | {size} | {cells[0]} | {cells[1]} | {' / '.join(targets)} |")


if __name__ == "__main__":
    main()
