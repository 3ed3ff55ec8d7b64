"""The pictures of the README that are computed and not drawn: `python docs/pictures.py` writes them.

The timelines are those of the simulator: four workers, one of them three times slower, on a link that takes four tenths
of a gradient's time for one model. With ``--check`` nothing is written, and the exit status is 1 if one has changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_decentral.algorithms import ADPSGD, DPSGD, SyncSGD
from lightning_decentral.flat import SizeOnlyVector
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import HypercubeMatching

FOLDER = Path(__file__).parent / "pictures"
WORKERS, SLOW, FACTOR, SECONDS = 4, 2, 3.0, 12.0
CLUSTER = Cluster(compute_seconds=1.0, bandwidth_bytes_per_second=2.5e6, slowdown={SLOW: FACTOR})
MODEL_BYTES = 1_000_000
METHODS: tuple[tuple[str, str, AbstractAlgorithm], ...] = (
    ("all-reduce", "everybody waits for the slowest, and for the network", SyncSGD()),
    ("dpsgd", "the exchange runs beside the gradient; only neighbours wait", DPSGD(HypercubeMatching(WORKERS))),
    ("adpsgd", "nobody waits for the gradient of another worker", ADPSGD()),
)
LEFT, WIDTH, ROW, GAP, HEAD = 100, 760, 15, 4, 40
STEP_COLOUR, SLOW_COLOUR, WAIT_COLOUR = "#4c78a8", "#f58518", "#e7e7e7"


def gradients(algorithm: AbstractAlgorithm) -> list[list[tuple[float, float]]]:
    """When each worker computes its gradients, from second to second of the virtual clock."""
    simulator = Simulator(algorithm, [SizeOnlyVector(MODEL_BYTES)] * WORKERS, CLUSTER)
    for worker in simulator.workers:
        worker.read_gradient = worker.x.clone
    spans: list[list[tuple[float, float]]] = [[] for _ in range(WORKERS)]
    for request, worker in simulator.demands():
        if isinstance(request, Gradient):
            takes = CLUSTER.compute_seconds * (FACTOR if worker.rank == SLOW else 1.0)
            spans[worker.rank].append((simulator.seconds - takes, simulator.seconds))
        if min(ends[-1][1] if ends else 0.0 for ends in spans) > SECONDS:
            return spans
    raise RuntimeError("The simulation ended before the picture.")


def timelines() -> str:
    """The picture of all methods, as SVG."""
    block = HEAD + WORKERS * (ROW + GAP) + 12
    height = block * len(METHODS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {height}" font-family="sans-serif">',
        f'<rect width="{LEFT + WIDTH + 10}" height="{height}" fill="white"/>',
    ]
    for number, (name, what, algorithm) in enumerate(METHODS):
        spans, top = gradients(algorithm), number * block + 12
        steps = sum(1 for worker in spans for _, end in worker if end <= SECONDS)
        lines.append(
            f'<text x="{LEFT}" y="{top + 12}" font-size="14"><tspan font-weight="bold">{name}</tspan>: {what} '
            f"({steps} steps)</text>"
        )
        for rank, worker in enumerate(spans):
            y = top + HEAD - 18 + rank * (ROW + GAP)
            lines.append(f'<text x="4" y="{y + 12}" font-size="11">worker {rank}{" (slow)" * (rank == SLOW)}</text>')
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW}" fill="{WAIT_COLOUR}"/>')
            colour = SLOW_COLOUR if rank == SLOW else STEP_COLOUR
            for begin, end in worker:
                first, last = (min(max(second, 0.0), SECONDS) / SECONDS * WIDTH for second in (begin, end))
                if last > first:
                    lines.append(
                        f'<rect x="{LEFT + first:.1f}" y="{y}" width="{max(last - first - 1, 0.5):.1f}" '
                        f'height="{ROW}" fill="{colour}"/>'
                    )
    return "\n".join([*lines, "</svg>"]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a picture has changed")
    options = parser.parse_args(argv)
    path, text = FOLDER / "timelines.svg", timelines()
    if options.check:
        return int(not path.exists() or path.read_text(encoding="utf-8") != text)
    FOLDER.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
