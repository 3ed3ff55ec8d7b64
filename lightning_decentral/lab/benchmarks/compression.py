"""What compressing costs, in copies of the vector.

    python -m lightning_decentral.lab.benchmarks.compression [--elements 25e6] [--only NAME]

One thread, or with `--device cuda` a GPU. Every round copies the vector (`tensor.clone()`, into new memory) and then
compresses and decompresses it with every scheme, one after the other, into new memory and into memory that is there
already; reported is the median over rounds of the ratio to the copy of the same round. Messages are decoded into new
memory too. The error is `||C(x) - x||^2 / ||x||^2` for Gaussian values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from lightning_decentral.compression import COMPRESSORS, AbstractCompressor, Lattice, Payload, compressor
from lightning_decentral.lab.results import environment


@dataclass(frozen=True)
class Contender:
    scheme: AbstractCompressor
    compress_target: float | None = None
    decompress_target: float | None = None
    slow: bool = False  # measured only if asked for by name


CONTENDERS = [
    Contender(compressor("identity")),
    Contender(compressor("cast", dtype="bfloat16"), 1.5, 1.0),
    Contender(compressor("cast", dtype="float16"), 1.5, 1.0),
    Contender(compressor("int8"), 1.5, 1.0),
    Contender(compressor("int8", stochastic=True), 5.0),
    Contender(compressor("fp8")),
    Contender(compressor("fp4")),
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
    Contender(compressor("orq", levels=9)),
    Contender(compressor("orq", refine=True)),
    Contender(compressor("topk"), 3.0),
    Contender(compressor("topk", ratio=0.001)),
    Contender(compressor("threshold", threshold=2.5)),
    Contender(compressor("randomk")),
    Contender(compressor("random_block")),
    Contender(compressor("powersgd")),
    Contender(compressor("lattice", step=0.01), 1.5, 1.0),
    Contender(compressor("lattice", step=0.1, levels=16), 1.5, 1.0),
    Contender(compressor("countsketch"), slow=True),
    Contender(compressor("dct_topk")),
]


def measure(scheme: AbstractCompressor, x: torch.Tensor) -> tuple[tuple[float, float, float], int, torch.Tensor]:
    """Seconds to compress, to decompress into new memory, and into the same memory again; bits sent; the result."""
    generator = torch.Generator(x.device).manual_seed(1)
    times = [now(x)]
    payload = scheme.compress(x, generator)
    times.append(now(x))
    result = _decompress(scheme, payload, x, None)
    times.append(now(x))
    _decompress(scheme, payload, x, result)
    times.append(now(x))
    return (times[1] - times[0], times[2] - times[1], times[3] - times[2]), payload.num_bits, result


def now(x: torch.Tensor) -> float:
    """Return the time when all that was started on the vector's device is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _decompress(
    scheme: AbstractCompressor, payload: Payload, x: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    return scheme.decompress_near(payload, x, out) if isinstance(scheme, Lattice) else scheme.decompress(payload, out)


def copy_seconds(x: torch.Tensor) -> float:
    """Time three copies, and return the shortest time."""
    times = []
    for _ in range(3):
        begin = now(x)
        x.clone()
        times.append(now(x) - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=25e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(COMPRESSORS), action="append", help="these schemes alone")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = int(options.elements)
    kinds = tuple(COMPRESSORS[name] for name in options.only or COMPRESSORS)
    chosen = [contender for contender in CONTENDERS if isinstance(contender.scheme, kinds)]
    if options.only is None:
        chosen = [contender for contender in chosen if not contender.slow]
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(options.device)
    copies: list[float] = []
    ratios: dict[AbstractCompressor, list[list[float]]] = {one.scheme: [] for one in chosen}
    errors: dict[AbstractCompressor, float] = {}
    sizes: dict[AbstractCompressor, float] = {}
    for number in range(1 + options.rounds):  # the first warms up
        copy = copy_seconds(x)
        for contender in chosen:
            times, bits, result = measure(contender.scheme, x)
            if number == 0:
                sizes[contender.scheme] = bits / n
                errors[contender.scheme] = float((result - x).square_().sum() / x.square().sum())
            else:
                ratios[contender.scheme].append([one / copy for one in times])
            del result
        if number:
            copies.append(1e3 * copy)
    print(f"# Compressors\n\n{environment()}\n")
    device = "" if options.device == "cpu" else f" --device {options.device}"
    where = "one thread" if options.device == "cpu" else torch.cuda.get_device_name(x.device)
    print(
        f"`python -m lightning_decentral.lab.benchmarks.compression --elements {options.elements:g} "
        f"--rounds {options.rounds}{device}`: "
        f"{n / 1e6:g} million float32 values, Gaussian, {where}. Times in units of `tensor.clone()` in the same round, "
        f"{min(copies):.0f} to {max(copies):.0f} ms; medians, smallest and largest in parentheses.\n"
    )
    print("| compressor | bits per element | error | compress | decompress | decompress into memory | target |")
    print("|---|---|---|---|---|---|---|")
    for one in chosen:
        columns = [[figures[i] for figures in ratios[one.scheme]] for i in range(3)]
        cells = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
        targets = [f"{target:g}" for target in (one.compress_target, one.decompress_target) if target is not None]
        size = f"{sizes[one.scheme]:.3g} | {errors[one.scheme]:.2g}"
        print(f"| `{one.scheme}` | {size} | {' | '.join(cells)} | {' / '.join(targets)} |")


if __name__ == "__main__":
    main()
