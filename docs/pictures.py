"""The pictures that are computed and not drawn: `python docs/pictures.py` writes them.

The graphs are those of all topologies that have a name, of eight workers. The timelines are those of the simulator:
four workers, one of them three times slower, on a link that takes four tenths of a gradient's time for one model. With
``--check`` nothing is written, and the exit status is 1 if one has changed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import networkx as nx

from lightning_decentral.algorithms import ADPSGD, DPSGD, SyncSGD
from lightning_decentral.flat import SizeOnlyVector
from lightning_decentral.pipeline.clock import timeline, used
from lightning_decentral.pipeline.drawing import draw
from lightning_decentral.pipeline.schedules import SCHEDULES, Schedule
from lightning_decentral.protocol import AbstractAlgorithm, Gradient
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import (
    TOPOLOGY_NAMES,
    AbstractTopology,
    DirectedGraph,
    EquiStatic,
    FastestGraph,
    HypercubeMatching,
    Matcha,
    OnePeerEqui,
    from_name,
)

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
GRAPH_WORKERS, RADIUS, NODE, MARGIN, EDGE_COLOUR = 8, 70, 10, 18, "#333333"  # of the pictures of graphs
CIRCLE = (tuple(range(GRAPH_WORKERS)),)
# Where one circle would hide what the graph is.
CIRCLES = {"torus": ((0, 1, 2, 3), (4, 5, 6, 7)), "hypercube": ((0, 1, 3, 2), (4, 5, 7, 6))}
# Graphs that need more than a number of workers: two groups with one link between them; and shortcuts one way only.
MORE_GRAPHS: dict[str, Callable[[int], AbstractTopology]] = {
    "directed_graph": lambda size: DirectedGraph([[(rank + 1) % size, *([0] * (rank % 2))] for rank in range(size)]),
    "equi_static_symmetric": lambda size: EquiStatic(size, symmetric=True),
    "fastest_graph": lambda size: FastestGraph(nx.barbell_graph(size // 2, 0)),
    "matcha": lambda size: Matcha(nx.barbell_graph(size // 2, 0)),
    "one_peer_equi_symmetric": lambda size: OnePeerEqui(size, symmetric=True),
}
PIPELINE_STAGES, PIPELINE_BATCHES = 4, 8
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


def graph(topology: AbstractTopology, circles: Sequence[Sequence[int]] = CIRCLE) -> str:
    """The picture of a topology, as SVG: one for each of its first rounds, with an arrow for each one-way message.

    Args:
        topology: of `GRAPH_WORKERS`.
        circles: the workers on each circle, from the outer one to the inner one.
    """
    rounds = min(topology.period or 3, 4)
    width = 2 * RADIUS + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {rounds * width} {width + 16}" '
        f'width="{rounds * width}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{EDGE_COLOUR}"/></marker></defs>',
        f'<rect width="{rounds * width}" height="{width + 16}" fill="white"/>',
    ]
    for step in range(rounds):
        at = {}
        for number, ranks in enumerate(circles):
            radius = RADIUS * (1 - number / len(circles))
            for place, rank in enumerate(ranks):
                angle = 2 * math.pi * place / len(ranks) - math.pi / 2
                x, y = radius * math.cos(angle), radius * math.sin(angle)
                at[rank] = (step * width + MARGIN + RADIUS + x, MARGIN + RADIUS + y)
        edges = set(topology.edges(step))
        for sender, receiver in sorted(edges):
            both = (receiver, sender) in edges
            if both and sender > receiver:
                continue
            (x, y), (to_x, to_y) = at[sender], at[receiver]
            share = 1 - (NODE + 1) / math.dist(at[sender], at[receiver])  # an arrow ends where the circle begins
            end = (to_x, to_y) if both else (x + share * (to_x - x), y + share * (to_y - y))
            tip = "" if both else ' marker-end="url(#tip)"'
            lines.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{EDGE_COLOUR}" '
                f'stroke-width="1.2"{tip}/>'
            )
        for rank, (x, y) in sorted(at.items()):
            fill, text = ("white", "black") if topology.initiates(rank) else ("#555555", "white")
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{NODE}" fill="{fill}" stroke="black"/>')
            lines.append(
                f'<text x="{x:.1f}" y="{y + 4:.1f}" font-size="11" text-anchor="middle" fill="{text}">{rank}</text>'
            )
        if topology.period != 1:
            lines.append(
                f'<text x="{(step + 0.5) * width:.1f}" y="{width + 8}" font-size="12" text-anchor="middle">'
                f"step {step}</text>"
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def pipeline(schedule: Schedule) -> str:
    """The picture of a schedule, as SVG."""
    forward = [schedule.stages * share for share in schedule.shares]
    spans = timeline(schedule, PIPELINE_BATCHES, forward, [2 * each for each in forward])
    share = f"{used(spans, schedule):.0%} of the time is work, filling and draining included"
    return draw(schedule, spans, f"{schedule.stages} stages, {PIPELINE_BATCHES} batches: {share}")


def graph_of(name: str, workers: int) -> AbstractTopology:
    """One of the graphs of the gallery, of so many workers."""
    return MORE_GRAPHS[name](workers) if name in MORE_GRAPHS else from_name(name, workers)


def pictures() -> dict[str, str]:
    """All pictures, by their names in the folder."""
    graphs = {
        f"topologies/{name}.svg": graph(graph_of(name, GRAPH_WORKERS), CIRCLES.get(name, CIRCLE))
        for name in (*TOPOLOGY_NAMES, *MORE_GRAPHS)
    }
    pipelines = {f"pipelines/{name}.svg": pipeline(make(PIPELINE_STAGES)) for name, make in SCHEDULES.items()}
    return {"timelines.svg": timelines(), **graphs, **pipelines}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a picture has changed")
    options = parser.parse_args(argv)
    for name, text in pictures().items():
        path = FOLDER / name
        if options.check:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                print(f"docs/pictures/{name} is out of date: run python docs/pictures.py", file=sys.stderr)
                return 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
