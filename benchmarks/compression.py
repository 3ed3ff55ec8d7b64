"""What compressing costs, in copies of the vector: `python benchmarks/compression.py [--elements 25e6] [--only NAME]`.

One thread. Every round copies the vector (`tensor.clone()`, into new memory) and then compresses and decompresses it with
every scheme, one after the other; reported is the median over rounds of the ratio to the copy of the same round. Messages
are decoded into new memory too. The error is `||C(x) - x||^2 / ||x||^2` for Gaussian values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_decentral.bench.report import environment
from lightning_decentral.compression import COMPRESSORS, AbstractCompressor, Payload, compressor


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
]


def seconds(action: Callable[[], object]) -> tuple[float, object]:
    """How long it takes, and what it gives."""
    begin = time.perf_counter()
    result = action()
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=25e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(COMPRESSORS), action="append", help="these schemes alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = int(options.elements)
    chosen = [c for c in CONTENDERS if options.only is None or isinstance(c.scheme, tuple(map(COMPRESSORS.get, options.only)))]
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    copies: list[float] = []
    ratios: dict[AbstractCompressor, list[tuple[float, float]]] = {c.scheme: [] for c in chosen}
    errors: dict[AbstractCompressor, float] = {}
    for warm_up in [True] + [False] * options.rounds:
        copy = min(seconds(x.clone)[0] for _ in range(3))
        for contender in chosen:
            scheme = contender.scheme
            generator = torch.Generator().manual_seed(1)
            there, payload = seconds(lambda: scheme.compress(x, generator))
            assert isinstance(payload, Payload)
            back, result = seconds(lambda: scheme.decompress(payload))
            assert isinstance(result, torch.Tensor)
            if warm_up:
                errors[scheme] = float((result - x).square_().sum() / x.square().sum())
            else:
                ratios[scheme].append((there / copy, back / copy))
        if not warm_up:
            copies.append(copy)
    print(f"# Compressors\n\n{environment()}\n")
    print(
        f"`python benchmarks/compression.py --elements {options.elements:g} --rounds {options.rounds}`: {n / 1e6:g} million "
        f"float32 values, Gaussian, one thread. Times in units of `tensor.clone()` in the same round, {min(copies) * 1e3:.0f} "
        f"to {max(copies) * 1e3:.0f} ms; medians, smallest and largest in parentheses.\n"
    )
    print("| compressor | bits per element | error | compress | decompress | target |")
    print("|---|---|---|---|---|---|")
    for contender in chosen:
        rounds = ratios[contender.scheme]
        columns = [[one[i] for one in rounds] for i in (0, 1)]
        cells = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        target = " / ".join(f"{t:g}" for t in (contender.compress_target, contender.decompress_target) if t is not None)
        bits = contender.scheme.num_bits(n) / n
        print(f"| `{contender.scheme}` | {bits:.3g} | {errors[contender.scheme]:.2g} | {cells[0]} | {cells[1]} | {target} |")


if __name__ == "__main__":
    main()
