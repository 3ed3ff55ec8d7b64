"""A topology for people: as text and as a picture."""

from __future__ import annotations

from math import cos, inf, pi, sin
from typing import TYPE_CHECKING, Literal, Protocol

import networkx as nx

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Neighbour lists longer than this hide the numbers above them.
MAX_LISTED_WORKERS = 16
MAX_LISTED_ROUNDS = 4
MAX_LABELLED_WORKERS = 32
LINES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")  # of steps: they differ without colour too
# Eigenvalues of a 2048 x 2048 matrix take some seconds.
MAX_ANALYSED_WORKERS = 2048
# The eigenvalue must be above -1/3; of the ring, which has exactly -1/3, it is computed with an error of about 1e-16.
D2_MARGIN = 1e-9


class _Graph(Protocol):
    """What is drawn and described: see `AbstractTopology`, which has all of it and uses this module."""

    @property
    def size(self) -> int: ...
    @property
    def period(self) -> int: ...
    @property
    def is_symmetric(self) -> bool: ...
    @property
    def is_bipartite(self) -> bool: ...
    @property
    def spectral_gap(self) -> float: ...
    @property
    def smallest_eigenvalue(self) -> float: ...
    def rounds_to_consensus(self, tolerance: float) -> float: ...
    def edges(self, step: int) -> list[tuple[int, int]]: ...
    def in_neighbors(self, rank: int, step: int) -> tuple[int, ...]: ...


def describe(topology: _Graph) -> str:
    """Tell what `str(topology)` says."""
    lines = [
        f"{topology!r}",
        f"  workers               {topology.size}",
        f"  rounds                {_rounds(topology)}",
        f"  peers per step        {_peers_per_step(topology)}",
        f"  messages per step     {_range([len(topology.edges(step)) for step in range(max(topology.period, 1))])}",
        f"  symmetric             {_yes(topology.is_symmetric)}",
        f"  bipartite             {_yes(topology.is_bipartite)}",
    ]
    if topology.size <= MAX_ANALYSED_WORKERS:
        rounds = topology.rounds_to_consensus(1e-3)
        lines += [
            f"  spectral gap          {topology.spectral_gap:.6g}",
            f"  rounds to consensus   {'never' if rounds == inf else rounds} (disagreement down to 0.1 %)",
            f"  smallest eigenvalue   {_smallest_eigenvalue(topology)}",
        ]
    else:
        lines.append(f"  spectral gap          not computed above {MAX_ANALYSED_WORKERS} workers; ask .spectral_gap")
    if 1 < topology.size <= MAX_LISTED_WORKERS:
        lines += _listing(topology)
    return "\n".join(lines)


def plot(topology: _Graph, ax: Axes | None, step: int | None) -> Axes:
    """Tell what `topology.plot(ax, step)` draws."""
    try:
        import matplotlib
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib, got an environment without it. Install it with `pip install matplotlib`."
        ) from error

    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.figure(layout="constrained").add_subplot()
    period = topology.period
    steps = [step] if step is not None else list(range(max(period, 1)))
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    angles = [pi / 2 - 2 * pi * rank / topology.size for rank in range(topology.size)]  # as the hours of a clock
    positions = {rank: (cos(angle), sin(angle)) for rank, angle in enumerate(angles)}
    node_size = min(300.0, 6000.0 / topology.size)
    nx.draw_networkx_nodes(
        nx.empty_graph(topology.size), positions, ax=ax, node_color="white", edgecolors="black", node_size=node_size
    )
    if topology.size <= MAX_LABELLED_WORKERS:
        nx.draw_networkx_labels(nx.empty_graph(topology.size), positions, ax=ax, font_size=9)
    looks = {each: (colors[(each % (period or 10)) % len(colors)], LINES[each % len(LINES)]) for each in steps}
    for each, (color, line) in looks.items():
        kind = nx.Graph if topology.is_symmetric else nx.DiGraph
        graph = kind(topology.edges(each))
        nx.draw_networkx_edges(graph, positions, ax=ax, edge_color=[color], style=line, node_size=node_size)
    if len(steps) > 1:
        handles = [
            Line2D([], [], color=color, linestyle=line, label=f"step {each}") for each, (color, line) in looks.items()
        ]
        ax.legend(
            handles=handles, title=f"repeats every {period} steps", loc="upper left", bbox_to_anchor=(1.0, 1.0),
            frameon=False,
        )  # fmt: skip
    when = "" if period == 1 or len(steps) > 1 else f", step {steps[0]}"
    ax.set_title(f"{type(topology).__name__}, {topology.size} workers{when}")
    ax.set_aspect("equal")
    ax.set_axis_off()
    return ax


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _rounds(topology: _Graph) -> str:
    if topology.period == 0:
        return "drawn anew at every step"
    return "the same at every step" if topology.period == 1 else f"repeat after {topology.period} steps"


def _peers_per_step(topology: _Graph) -> str:
    steps = range(max(topology.period, 1))
    return _range([len(topology.in_neighbors(rank, step)) for step in steps for rank in range(topology.size)])


def _range(counts: list[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _smallest_eigenvalue(topology: _Graph) -> str:
    if not topology.is_symmetric:
        return "not real in general (directed): D2 cannot use it"
    value = round(topology.smallest_eigenvalue, 12) + 0.0  # no -8e-17, no -0
    if topology.period != 1:
        return f"{value:.6g}; D2 cannot use it: it needs the same W at every step"
    if value > -1 / 3 + D2_MARGIN:
        return f"{value:.6g}; D2 may use it (needs more than -1/3)"
    return f"{value:.6g}; D2 cannot use it (needs more than -1/3), but it can use (I + W) / 2"


def _listing(topology: _Graph) -> list[str]:
    lines = []
    for step in range(min(max(topology.period, 1), MAX_LISTED_ROUNDS)):
        edges = topology.edges(step)
        lines.append(f"  step {step}, who receives from whom:" if topology.period != 1 else "  who receives from whom:")
        is_pairing = topology.is_symmetric and len({sender for sender, _ in edges}) == len(edges)
        if is_pairing:
            lines.append("    " + "  ".join(f"{a}-{b}" for a, b in edges if a < b))
            continue
        for rank in range(topology.size):
            sources = topology.in_neighbors(rank, step)
            lines.append(f"    {rank:2} <- " + " ".join(map(str, sources)))
    if topology.period > MAX_LISTED_ROUNDS:
        lines.append(f"  and {topology.period - MAX_LISTED_ROUNDS} more rounds")
    return lines
