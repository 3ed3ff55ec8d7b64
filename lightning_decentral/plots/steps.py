"""How long a step takes by method: on one network, and on slower and faster ones."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from pathlib import Path

from lightning_decentral.plots.canvas import figure, legend_below, line_style, save

_ALIKE = 0.01  # lines nearer to each other than this share are one line to the eye


def plot_steps(
    methods: Sequence[str],
    steps: Sequence[tuple[float, float]],
    factors: Sequence[float],
    networks: Sequence[Sequence[float]],
    path: Path,
    title: str,
) -> None:
    """Draw steps as bars, and how they change with the network as lines; methods with the same line share one.

    Args:
        methods: what they are called.
        steps: of each method, the seconds in which it computes in a step, and those in which it only waits.
        factors: bandwidths, times that of the bars.
        networks: of each method, the seconds of a step at each of these bandwidths.
        path: of the picture.
        title: over it.
    """
    drawn, ((bars, lines),) = figure(1, 2, 12.5, 0.33 * len(steps) + 3.2)
    places = range(len(steps))
    computing, waiting = zip(*steps, strict=True)
    bars.barh(places, computing, color="#0072B2", edgecolor="black", linewidth=0.6, label="computing")
    bars.barh(
        places, waiting, left=computing, color="#EEEEEE", edgecolor="black", linewidth=0.6, hatch="///", label="waiting"
    )
    for place, total in zip(places, map(sum, zip(computing, waiting, strict=True)), strict=True):
        bars.annotate(f"{total:.3g} s", (total, place), (4, 0), textcoords="offset points", va="center")
    bars.set_yticks(list(places), methods)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set_xlabel("seconds per step")
    bars.set_title("on this network", fontsize="medium")
    bars.legend(loc="upper left", bbox_to_anchor=(0.0, 0.0), borderaxespad=4.0, ncols=2, frameon=False)
    for index, (alike, seconds) in enumerate(lines_that_differ(methods, networks)):
        lines.plot(factors, seconds, label="\n".join(alike), **line_style(index))
    lines.axvline(1.0, color="grey", linewidth=0.8)
    lines.set_xscale("log", base=2)
    lines.set_yscale("log")
    lines.set_xticks(list(factors), [f"1/{1 / factor:.0f}" if factor < 1 else f"{factor:.0f}" for factor in factors])
    lines.set_xlabel("bandwidth of all links, times this network's")
    lines.set_ylabel("seconds per step")
    lines.set_title("on slower and faster networks", fontsize="medium")
    lines.grid(alpha=0.3)
    legend_below(drawn, lines)
    save(drawn, path, title)


def lines_that_differ(
    methods: Sequence[str], networks: Sequence[Sequence[float]]
) -> list[tuple[list[str], Sequence[float]]]:
    """Give the lines that differ, each with the methods that have it."""
    lines: list[tuple[list[str], Sequence[float]]] = []
    for method, seconds in zip(methods, networks, strict=True):
        for alike, drawn in lines:
            if all(isclose(one, other, rel_tol=_ALIKE) for one, other in zip(seconds, drawn, strict=True)):
                alike.append(method)
                break
        else:
            lines.append(([method], seconds))
    return lines
